//! The API server beside kube-apiserver and etcd, by the client `api-bench` of `e2e`.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use super::table;
use super::table::Better::{self, Less, More};
use crate::sh;

/// One JSON object for each side.
pub fn measure(client: &Path, executables: &Path, peers: Option<&Path>, objects: u32) -> Result<Vec<Value>> {
    let mut command = Command::new(client);
    command.arg(objects.to_string()).env("CORACLE_BIN", executables).env_remove("CORACLE_PEERS").stdin(Stdio::null());
    if let Some(peers) = peers {
        command.env("CORACLE_PEERS", peers);
    }
    let lines = sh::output(&mut command)?;
    lines.lines().map(|line| serde_json::from_str(line).with_context(|| format!("api-bench printed no JSON: {line}"))).collect()
}

/// What a row shows: its name, digits after the point, which figure is better, and where the figures stand.
type Row = (&'static str, usize, Better, &'static [&'static str]);

const ROWS: [Row; 18] = [
    ("start to ready, s", 2, Less, &["/ready_s"]),
    ("PSS idle, KiB", 0, Less, &["/idle_pss_kib"]),
    ("PSS with all objects, KiB", 0, Less, &["/full_pss_kib"]),
    ("PSS after all lists, KiB", 0, Less, &["/listed_pss_kib"]),
    ("creates per second", 0, More, &["/create/per_second"]),
    ("CPU per create, us", 0, Less, &["/create/cpu_us"]),
    ("create, ms, min / median / p99", 2, Less, &["/create/latency_ms/min", "/create/latency_ms/median", "/create/latency_ms/p99"]),
    ("GETs per second", 0, More, &["/get/per_second"]),
    ("CPU per GET, us", 0, Less, &["/get/cpu_us"]),
    ("GET, ms, min / median / p99", 2, Less, &["/get/latency_ms/min", "/get/latency_ms/median", "/get/latency_ms/p99"]),
    ("LIST of all, JSON, ms, min / median", 1, Less, &["/list/json/latency_ms/min", "/list/json/latency_ms/median"]),
    ("LIST of all, Table, ms, min / median", 1, Less, &["/list/table/latency_ms/min", "/list/table/latency_ms/median"]),
    ("LIST of all, protobuf, ms, min / median", 1, Less, &["/list/protobuf/latency_ms/min", "/list/protobuf/latency_ms/median"]),
    ("CPU per LIST, JSON, ms", 0, Less, &["/list/json/cpu_ms"]),
    ("CPU per LIST, Table, ms", 0, Less, &["/list/table/cpu_ms"]),
    ("CPU per LIST, protobuf, ms", 0, Less, &["/list/protobuf/cpu_ms"]),
    ("last of 100 watchers, ms, min / median / p99", 1, Less, &["/watch/delay_ms/min", "/watch/delay_ms/median", "/watch/delay_ms/p99"]),
    ("CPU per watched event, us", 0, Less, &["/watch/cpu_us_per_event"]),
];

/// The table. What is compared is the first figure that is not a minimum.
pub fn print(sides: &[Value]) {
    let Some(first) = sides.first() else { return };
    println!("API servers: {} ConfigMaps of 1 kB, {} clients", first["objects"], first["clients"]);
    for side in sides {
        println!("{}: {}", side["side"].as_str().unwrap_or_default(), side["version"].as_str().unwrap_or_default());
    }
    table::head(&sides.iter().map(|side| side["side"].as_str().unwrap_or_default()).collect::<Vec<_>>());
    for (what, digits, better, places) in ROWS {
        let figures = |side: &Value| -> Vec<f64> { places.iter().filter_map(|place| side.pointer(place)?.as_f64()).collect() };
        let taken: Vec<Vec<f64>> = sides.iter().map(figures).collect();
        let cell = |figures: &Vec<f64>| figures.iter().map(|figure| format!("{figure:.digits$}")).collect::<Vec<_>>().join(" / ");
        let compared: Vec<f64> = taken.iter().filter_map(|figures| figures.get(usize::from(figures.len() > 1)).copied()).collect();
        table::row(what, &taken.iter().map(cell).collect::<Vec<_>>(), &compared, better);
    }
    println!();
}
