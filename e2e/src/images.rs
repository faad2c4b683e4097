//! The images of the tests, made of Debian's static busybox.

use std::fs;

use anyhow::{Context, Result};
use testkit::image::{Image, ImageSpec};
use testkit::tar::Entry;

const BUSYBOX: &str = "/bin/busybox";

/// The commands that the image has under their own names.
const APPLETS: [&str; 31] = [
    "cat", "chmod", "cp", "echo", "env", "false", "grep", "head", "hostname", "httpd", "id", "kill", "ln", "ls", "mkdir", "nc", "ps", "rm",
    "sed", "seq", "sh", "sleep", "stat", "stty", "tail", "tar", "touch", "true", "tty", "wc", "wget",
];

/// An image with a shell and its tools; `version` is the content of `/version`.
pub fn busybox(version: &str) -> Result<Image> {
    let executable = fs::read(BUSYBOX).with_context(|| format!("failed to read {BUSYBOX} (Debian's busybox-static)"))?;
    let mut entries = vec![
        Entry::dir("bin"),
        Entry::dir("tmp").mode(0o1777),
        Entry::dir("etc"),
        Entry::file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/:/bin/sh\n"),
        Entry::file("etc/group", "root:x:0:\nuser:x:1000:\n"),
        Entry::file("version", version),
        Entry::executable("bin/busybox", executable),
    ];
    entries.extend(APPLETS.iter().map(|applet| Entry::symlink(&format!("bin/{applet}"), "busybox")));
    let image = ImageSpec::new().layer(entries);
    Ok(image.config("Cmd", serde_json::json!(["sh"])).config("Env", serde_json::json!(["PATH=/bin"])).build())
}

/// An image whose only process sleeps: what containerd and foreign shims take for a sandbox.
pub fn sleeper() -> Result<Image> {
    let executable = fs::read(BUSYBOX).with_context(|| format!("failed to read {BUSYBOX} (Debian's busybox-static)"))?;
    let layer = [Entry::dir("bin"), Entry::executable("bin/busybox", executable), Entry::symlink("bin/sleep", "busybox")];
    Ok(ImageSpec::new().layer(layer).config("Entrypoint", serde_json::json!(["/bin/sleep", "1000000"])).build())
}
