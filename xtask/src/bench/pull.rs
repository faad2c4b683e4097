//! Pulls of a large image: both sides in turn, each image new to both.

use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};
use testkit::image::{Image, ImageSpec};
use testkit::registry::Registry;
use testkit::tar::Entry;

use super::runtime::Runtime;
use super::{min_median, table};
use crate::sh;

/// Pulls per side.
const PULLS: u64 = 3;
/// What an image is made of.
const LAYERS: u64 = 8;
const FILES_PER_LAYER: u64 = 120;
const FILE_BYTES: usize = 300_000;
/// Of each file this part is random and the rest repeats, so that about two thirds are left when it is packed.
const RANDOM_BYTES: usize = 210_000;

/// What was measured of one side.
pub struct Side {
    name: &'static str,
    milliseconds: Vec<f64>,
    cpu_seconds: Vec<f64>,
    /// Of one image, packed.
    bytes: usize,
}

impl Side {
    /// For programs.
    pub fn line(&self) -> Value {
        json!({ "bench": "pull", "side": self.name, "image_bytes": self.bytes, "layers": LAYERS, "ms": self.milliseconds, "cpu_s": self.cpu_seconds })
    }
}

/// Pulls.
pub fn measure(registry: &Registry, runtimes: &[Runtime]) -> Result<Vec<Side>> {
    let side = |runtime: &Runtime| Side { name: runtime.name, milliseconds: Vec::new(), cpu_seconds: Vec::new(), bytes: 0 };
    let mut sides: Vec<Side> = runtimes.iter().map(side).collect();
    for number in 0..PULLS {
        eprintln!("==> make image {} of {PULLS}, and pull it", number + 1);
        let image = image(number);
        let reference = registry.add("large", &number.to_string(), &image);
        for (side, runtime) in sides.iter_mut().zip(runtimes) {
            // What the other has written is on the disk before this one begins.
            sh::output(&mut Command::new("sync"))?;
            let before = runtime.group.cpu_seconds()?;
            side.milliseconds.push(runtime.pull(&reference)?);
            side.cpu_seconds.push(runtime.group.cpu_seconds()? - before);
            side.bytes = image.layers.iter().map(|layer| layer.bytes.len()).sum();
        }
    }
    Ok(sides)
}

/// An image of about 200 MB, packed; each number's is another.
fn image(number: u64) -> Image {
    // Marsaglia's xorshift64: reproducible, and quick also where this is not optimized.
    let mut state = number + 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut file = |path: String| {
        let mut content = Vec::with_capacity(FILE_BYTES);
        while content.len() < RANDOM_BYTES {
            content.extend_from_slice(&random().to_le_bytes());
        }
        let line = format!("{path} {number}\n");
        while content.len() < FILE_BYTES {
            content.extend_from_slice(line.as_bytes());
        }
        Entry::file(&path, content)
    };
    (0..LAYERS)
        .fold(ImageSpec::new(), |spec, layer| {
            let files = (0..FILES_PER_LAYER).map(|n| file(format!("usr/lib/layer-{layer}/part-{}/file-{n}", n % 10)));
            spec.layer(files.collect::<Vec<_>>())
        })
        .build()
}

/// The table.
pub fn print(sides: &[Side]) {
    let Some(first) = sides.first() else { return };
    println!("pull of an image of {} MB in {LAYERS} gzip layers from a registry on loopback, {PULLS} times", first.bytes / 1_000_000);
    table::head(&sides.iter().map(|side| side.name).collect::<Vec<_>>());
    table::spread("pull, ms, min / median", sides.iter().map(|side| min_median(side.milliseconds.iter().copied())));
    table::figure("CPU per pull, s", 2, sides.iter().map(|side| min_median(side.cpu_seconds.iter().copied()).1));
    println!();
}
