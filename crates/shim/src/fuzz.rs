//! What starts a shim, and what a runtime logs, mutated: an answer or an error, never a panic.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use prost::Message;
use protocols::shim::bootstrap::v1::BootstrapParams;
use protocols::shim::options::{RUNC_TYPE_URL, runc};
use testkit::fuzz::Fuzz;

use crate::args::Args;
use crate::process::Sink;
use crate::runtime::last_error;
use crate::start::understand;

#[test]
fn starts() {
    let options = runc::Options { shim_cgroup: "/pods/shim".to_owned(), ..runc::Options::default() };
    let options = prost_types::Any { type_url: RUNC_TYPE_URL.to_owned(), value: options.encode_to_vec() };
    let params = BootstrapParams { instance_id: "x".into(), namespace: "n".into(), socket_dir: Some("/s".into()), ..Default::default() };
    let fuzz = Fuzz::new("start").seed("-namespace\0n\0-id\0x\0-address\0/a\0start").seed("keeper\0--state=/s");
    let fuzz = fuzz.seed(params.encode_to_vec()).seed(options.encode_to_vec()).seed("cri-log:///a/b").seed("binary://x?y");
    fuzz.words(&["-id", "-bundle=", "--state", "delete", "\0", "fifo://", "file:///", "://", "runc"]).run(|input| {
        let words = input.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec()));
        let _ = Args::parse(words).is_ok();
        for version in [None, Some("3")] {
            let _ = understand(input, "x", "n", version);
        }
        let _ = Sink::parse(&String::from_utf8_lossy(input)).is_ok();
    });
}

#[test]
fn runtime_logs() {
    let seed = "{\"level\":\"info\",\"msg\":\"a\"}\n{\"level\":\"error\",\"msg\":\" b \",\"time\":\"t\"}\n";
    Fuzz::new("runtime-log").seed(seed).words(&["\"level\"", "\"error\"", "\"msg\"", "\n"]).run(|input| {
        let _ = last_error(input);
    });
}
