//! The images that critest 1.34 asks for, made of what the host has, and the mirrors that stand for their registries.
//!
//! Facts: sigs.k8s.io/cri-tools v1.34.0, `pkg/framework/util.go` and `pkg/validate/consts.go` (names), `images/` (users, groups).

use std::io;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::host::checked;
use crate::image::ImageSpec;
use crate::registry::Registry;
use crate::tar::Entry;

/// The registries whose names the images have.
pub const REGISTRIES: [&str; 3] = ["registry.k8s.io", "k8s.gcr.io", "gcr.io"];
/// What of [`crate`]'s `critest-tool` every image with a shell has.
const TOOLS: [&str; 2] = ["pgrep", "ipcs"];
/// The user of the images of cri-tools with a name.
const PASSWD: &str =
    "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &str = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n";

/// Serves all of the images from `registry`. `tool` is the static executable `critest-tool`, `shell` a busybox whose shell runs every command by
/// its path (Debian's dynamic one): critest asks for a command that is hidden by a mount.
///
/// # Errors
/// Without Debian's static `/bin/busybox`, `shell` or `tool`.
pub fn serve(registry: &Registry, tool: &Path, shell: &Path) -> io::Result<()> {
    let images = Images { base: base(tool, shell)?, tool: std::fs::read(tool)? };
    let busybox = images.shell("busybox").docker().with_index();
    registry.add("e2e-test-images/busybox", "1.29-2", &busybox.build());
    let server = |name: &str, command: &[&str]| {
        let entries = [Entry::dir("usr"), Entry::dir("usr/sbin"), Entry::executable(&format!("usr/sbin/{name}"), images.tool.clone())];
        images.shell(name).layer(entries).config("Cmd", json!(command))
    };
    let nginx = || server("nginx", &["nginx", "-g", "daemon off;"]);
    registry.add("e2e-test-images/nginx", "1.14-2", &nginx().build());
    registry.add("e2e-test-images/httpd", "2.4.39-4", &server("httpd", &["httpd"]).build());
    let architecture = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
    let host_network = nginx().config("Env", json!(["PATH=/usr/sbin:/bin", "PORT=12003"])).build();
    registry.add(&format!("k8s-staging-cri-tools/hostnet-nginx-{architecture}"), "latest", &host_network);
    let single = |path: &str, mode: u32| {
        let entry = Entry::executable(path, images.tool.clone()).mode(mode);
        ImageSpec::new().layer([Entry::dir("tmp").mode(0o1777), entry]).config("Entrypoint", json!([format!("/{path}")]))
    };
    registry.add("e2e-test-images/nonewprivs", "1.3", &single("nnp", 0o4755).build());
    registry.add("pause", "3.9", &single("pause", 0o755).with_index().build());

    let add = |name: &str, tag: &str, image: &ImageSpec| {
        registry.add(&format!("k8s-staging-cri-tools/{name}"), tag, &image.build());
    };
    for (name, user) in [("uid", "1002"), ("username", "www-data"), ("uid-group", "1003:1004"), ("username-group", "www-data:1004")] {
        add(&format!("test-image-user-{name}"), "latest", &images.shell(name).config("User", user));
    }
    add("test-image-predefined-group", "latest", &images.shell("predefined").layer(predefined_group()).config("User", "1000"));
    add("test-image-latest", "latest", &images.shell("latest"));
    for tag in ["test", "all"] {
        add("test-image-tag", tag, &images.shell(tag).with_index());
    }
    for number in ["1", "2", "3"] {
        add(&format!("test-image-{number}"), "latest", &images.shell(number).docker());
        add("test-image-tags", number, &images.shell("tags"));
    }
    Ok(())
}

/// Writes the `hosts.toml` files below `directory` by which `registry` stands for [`REGISTRIES`], and for no other.
///
/// # Errors
/// Those of the file system.
pub fn mirror(registry: &Registry, directory: &Path) -> io::Result<()> {
    for host in REGISTRIES {
        std::fs::create_dir_all(directory.join(host))?;
        let address = format!("http://{}", registry.address());
        let text = format!("server = \"{address}\"\n[host.\"{address}\"]\ncapabilities = [\"pull\", \"resolve\"]\n");
        std::fs::write(directory.join(host).join("hosts.toml"), text)?;
    }
    Ok(())
}

struct Images {
    base: Vec<Entry>,
    tool: Vec<u8>,
}

impl Images {
    /// An image with a shell, different from all others by a word.
    fn shell(&self, word: &str) -> ImageSpec {
        let image = ImageSpec::new().layer(self.base.clone()).layer([Entry::file("word", word)]);
        image.config("Cmd", json!(["sh"])).config("Env", json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]))
    }
}

/// The static busybox with another's shell.
fn base(tool: &Path, shell: &Path) -> io::Result<Vec<Entry>> {
    let busybox = std::fs::read("/bin/busybox")?;
    let mut entries: Vec<Entry> = ["bin", "dev", "etc", "home", "lib", "lib64", "proc", "root", "sys", "usr", "var", "var/run", "var/www"]
        .iter()
        .map(|name| Entry::dir(name))
        .collect();
    entries.extend([
        Entry::dir("tmp").mode(0o1777),
        Entry::file("etc/passwd", PASSWD),
        Entry::file("etc/group", GROUP),
        Entry::executable("bin/busybox", busybox),
        Entry::executable("bin/sh", std::fs::read(shell)?),
    ]);
    let applets = checked(Command::new("/bin/busybox").arg("--list").output()?)?;
    let own = ["sh", "ash", "busybox"];
    let applets = applets.lines().filter(|name| !own.contains(name) && !TOOLS.contains(name) && !name.starts_with('['));
    // Hard links: what hides one of them hides it alone.
    entries.extend(applets.map(|name| Entry::hardlink(&format!("bin/{name}"), "bin/busybox")));
    let tool = std::fs::read(tool)?;
    entries.extend(TOOLS.iter().map(|name| Entry::executable(&format!("bin/{name}"), tool.clone())));
    entries.extend(libraries(shell)?);
    Ok(entries)
}

/// The shared libraries of a program, under the paths where the loader looks for them.
fn libraries(program: &Path) -> io::Result<Vec<Entry>> {
    let lines = checked(Command::new("ldd").arg(program).output()?)?;
    let paths = lines.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    let mut entries = Vec::new();
    for path in paths {
        let mut dir = String::new();
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        for part in &parts[..parts.len() - 1] {
            dir = if dir.is_empty() { (*part).to_owned() } else { format!("{dir}/{part}") };
            entries.push(Entry::dir(&dir));
        }
        entries.push(Entry::executable(&parts.join("/"), std::fs::read(path)?));
    }
    Ok(entries)
}

fn predefined_group() -> [Entry; 2] {
    [
        Entry::file("etc/passwd", format!("{PASSWD}default-user:x:1000:1000::/home/default-user:/bin/sh\n")),
        Entry::file("etc/group", format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")),
    ]
}
