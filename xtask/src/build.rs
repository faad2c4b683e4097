//! The executables: `coracle`, and beside it the static shim, OCI runtime and test image's web server.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::sh;

/// The target of the static executables: named, so that `crt-static` reaches them and not the build scripts.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// The packages whose executables run once per pod or inside one.
const STATIC_PACKAGES: [&str; 3] = ["shim", "oci-runtime", "testkit"];

/// The executables that stand beside `coracle`.
const STATIC_EXECUTABLES: [&str; 4] = ["containerd-shim-coracle-v2", "coracle-oci", "hello-web", "critest-tool"];

/// How `coracle` itself is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// For tests.
    Dev,
    /// For users, the demo and benchmarks.
    Release,
}

impl Profile {
    /// Cargo's name of the profile, and of the folder of its output.
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Profile::Dev => ("dev", "debug"),
            Profile::Release => ("release", "release"),
        }
    }
}

/// Where the executables are.
#[derive(Clone, Debug)]
pub struct Executables {
    /// The folder that holds all of them.
    pub directory: PathBuf,
}

/// The folder of cargo's output.
pub fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| sh::root().join("target"), PathBuf::from)
}

/// Builds everything that runs, and puts the static executables beside `coracle`.
pub fn all(profile: Profile) -> Result<Executables> {
    let (flag, folder) = profile.names();
    sh::run("build coracle", &mut sh::cargo(["build", "--locked", "--package", "coracle", "--profile", flag]))?;
    let mut arguments = vec!["build", "--locked", "--profile", "small", "--bins", "--target", STATIC_TARGET];
    for package in STATIC_PACKAGES {
        arguments.extend(["--package", package]);
    }
    let mut command = sh::cargo(arguments);
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    sh::run("build the static executables", &mut command)?;

    let built = target_directory().join(folder);
    let directory = match profile {
        // `cargo test` puts its own, dynamic, builds of the same names into the folder of its profile.
        Profile::Dev => built.join("together"),
        Profile::Release => built.clone(),
    };
    std::fs::create_dir_all(&directory).with_context(|| format!("failed to make {}", directory.display()))?;
    let mut sources = STATIC_EXECUTABLES.map(|name| (name, target_directory().join(STATIC_TARGET).join("small"))).to_vec();
    if directory != built {
        sources.push(("coracle", built));
    }
    for (name, from) in sources {
        let from = from.join(name);
        let (temporary, to) = (directory.join(format!("{name}.new")), directory.join(name));
        std::fs::copy(&from, &temporary).with_context(|| format!("failed to copy {}", from.display()))?;
        // A rename, for the old file may be running.
        std::fs::rename(&temporary, &to).with_context(|| format!("failed to write {}", to.display()))?;
    }
    Ok(Executables { directory })
}
