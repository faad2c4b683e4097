//! Capability sets of a container. Pure.
//!
//! Source: containerd v2.4.2, `pkg/oci/spec.go` (the default set) and `internal/cri/opts/spec_opts.go` (add and drop).

use std::collections::BTreeSet;

use protocols::cri::v1::Capability;

use super::SpecError;
use crate::oci::Capabilities;

/// What a container has without a request.
const DEFAULT: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// The sets of a container. `daemon` is this server's own permitted set: what `ALL` and privileged mean at most.
///
/// # Errors
/// [`SpecError::Capability`]: a name that is none.
pub fn resolve(request: Option<&Capability>, privileged: bool, daemon: &BTreeSet<String>) -> Result<Capabilities, SpecError> {
    if privileged {
        let all: Vec<String> = daemon.iter().cloned().collect();
        return Ok(Capabilities { bounding: all.clone(), effective: all.clone(), permitted: all, ..Capabilities::default() });
    }
    let empty = Capability::default();
    let request = request.unwrap_or(&empty);
    let mut set: BTreeSet<String> = DEFAULT.iter().map(|name| (*name).to_owned()).collect();
    if has_all(&request.add_capabilities) {
        set = daemon.clone();
    }
    if has_all(&request.drop_capabilities) {
        set.clear();
    }
    set.extend(named(&request.add_capabilities)?);
    let ambient = named(&request.add_ambient_capabilities)?;
    set.extend(ambient.iter().cloned());
    for dropped in named(&request.drop_capabilities)? {
        set.remove(&dropped);
    }
    let ambient: Vec<String> = ambient.into_iter().filter(|name| set.contains(name)).collect();
    let set: Vec<String> = set.into_iter().collect();
    Ok(Capabilities { bounding: set.clone(), effective: set.clone(), permitted: set, inheritable: ambient.clone(), ambient })
}

fn has_all(names: &[String]) -> bool {
    names.iter().any(|name| name.eq_ignore_ascii_case("ALL"))
}

fn named(names: &[String]) -> Result<BTreeSet<String>, SpecError> {
    names
        .iter()
        .filter(|name| !name.eq_ignore_ascii_case("ALL"))
        .map(|name| {
            let upper = name.to_ascii_uppercase();
            let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
            if linux::caps::Set::default().add(&full) { Ok(full) } else { Err(SpecError::Capability(name.clone())) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn request(add: &[&str], drop: &[&str], ambient: &[&str]) -> Capability {
        Capability { add_capabilities: strings(add), drop_capabilities: strings(drop), add_ambient_capabilities: strings(ambient) }
    }

    fn daemon() -> BTreeSet<String> {
        linux::caps::Set(0b1011).names().map(str::to_owned).collect()
    }

    #[test]
    fn add_and_drop() {
        let sets = |add: &[&str], drop: &[&str]| resolve(Some(&request(add, drop, &[])), false, &daemon()).expect("good").bounding;
        assert_eq!(sets(&[], &[]), strings(&DEFAULT));
        assert_eq!(sets(&[], &["ALL"]), strings(&[]));
        assert_eq!(sets(&["NET_ADMIN"], &["ALL"]), strings(&["CAP_NET_ADMIN"]));
        assert_eq!(sets(&["ALL"], &["chown"]), strings(&["CAP_DAC_OVERRIDE", "CAP_FOWNER"]));
        assert_eq!(sets(&["CAP_BPF"], &["ALL"]), strings(&["CAP_BPF"]));
        assert!(resolve(Some(&request(&["NONSENSE"], &[], &[])), false, &daemon()).is_err());
    }

    #[test]
    fn ambient_ones_are_in_every_set() {
        let sets = resolve(Some(&request(&[], &["ALL"], &["NET_RAW"])), false, &daemon()).expect("good");
        for set in [&sets.ambient, &sets.inheritable, &sets.bounding, &sets.permitted, &sets.effective] {
            assert_eq!(*set, strings(&["CAP_NET_RAW"]));
        }
    }

    #[test]
    fn privileged_has_what_the_daemon_has() {
        let sets = resolve(None, true, &daemon()).expect("good");
        assert_eq!(sets.bounding, strings(&["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER"]));
        assert!(sets.ambient.is_empty() && sets.inheritable.is_empty());
    }
}
