//! Mutated conflists and plugins' results: a list, an error that names the file, or no addresses; never a panic.

use camino::Utf8Path;
use serde_json::Map;
use testkit::fuzz::Fuzz;

use super::{conf, result_ips};

const LIST: &str = r#"{"cniVersion":"1.1.0","cniVersions":["0.3.1","1.0.0"],"name":"mynet","disableCheck":"true","disableGC":false,"plugins":[
{"type":"bridge","bridge":"b0","ipam":{"type":"host-local","ranges":[[{"subnet":"10.1.0.0/16"}]]},"capabilities":{"portMappings":true}},
{"type":"portmap","capabilities":{"portMappings":true,"bandwidth":true}}]}"#;
const PLUGIN: &str = r#"{"cniVersion":"0.4.0","name":"x","type":"loopback"}"#;
const RESULT: &str =
    r#"{"cniVersion":"1.0.0","ips":[{"address":"10.1.0.5/16","gateway":"10.1.0.1","interface":2},{"address":"::1/128"}],"dns":{}}"#;

#[test]
fn lists_and_results() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = Utf8Path::from_path(dir.path()).expect("UTF-8");
    let words = [
        "\"type\"",
        "\"../../bin/sh\"",
        "\"plugins\"",
        "\"name\"",
        "\"cniVersion\"",
        "1.1.0",
        "\"ips\"",
        "\"address\"",
        "/33",
        "capabilities",
    ];
    Fuzz::new("conflist").seed(LIST).seed(PLUGIN).seed(RESULT).words(&words).run(|input| {
        for name in ["10-a.conflist", "10-a.conf"] {
            let path = dir.join(name);
            std::fs::write(&path, input).expect("written");
            match conf::load(dir) {
                Ok(Some(list)) => {
                    for plugin in &list.plugins {
                        // What is executed is a file of the plugin directory.
                        assert!(!conf::plugin_type(plugin).contains('/') && !conf::plugin_type(plugin).starts_with('.'));
                        let _ = list.plugin_conf(plugin, &Map::new(), None);
                    }
                }
                Ok(None) => {}
                Err(error) => assert!(error.to_string().contains(name), "{error}"),
            }
            std::fs::remove_file(&path).expect("removed");
        }
        let _ = serde_json::from_slice(input).map(|result| result_ips(&result));
    });
}
