//! Cluster IPs and node ports of Services: what a Service is given, and which fields follow from that
//! (`pkg/registry/core/service/storage/alloc.go`, v1.37, one IPv4 family).
//!
//! Pure: what is taken already is an argument, as far as it is known; [`crate::allocations`] keeps the record in the store, which
//! has the last word.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use apimachinery::field_error::FieldError;
use apimachinery::status::Status;
use serde_json::{Value, json};

use crate::object::{name, text};

/// An IPv4 range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    base: u32,
    prefix: u8,
}

impl std::str::FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no IPv4 range such as 10.96.0.0/12");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().ok().filter(|prefix| (8..=29).contains(prefix)).ok_or_else(wrong)?;
        let mask = u32::MAX << (32 - prefix);
        Ok(Self { base: u32::from(address) & mask, prefix })
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }
}

impl Cidr {
    /// Addresses that may be given out: all but the first and the last.
    fn usable(self) -> RangeInclusive<u32> {
        self.base + 1..=self.base + ((1 << (32 - self.prefix)) - 2)
    }

    /// The first usable address: that of the service `kubernetes`.
    pub fn first(self) -> Ipv4Addr {
        Ipv4Addr::from(self.base + 1)
    }
}

/// What one Service holds, and no other may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Held {
    /// A cluster IP.
    Address(Ipv4Addr),
    /// A node port, whatever its protocol.
    Port(u16),
}

/// What a Service is to hold that it does not hold yet.
#[derive(Debug)]
pub struct Wanted {
    /// This.
    pub held: Held,
    /// What is answered when another Service has it; `None`: it was chosen here, and any other does as well.
    pub refusal: Option<Status>,
}

/// All that a Service holds, each once.
pub fn held(service: &Value) -> Vec<Held> {
    let address = text(service, &["spec", "clusterIP"]).parse().ok().map(Held::Address);
    let ports = service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten();
    let mut all: Vec<Held> = address.into_iter().collect();
    for port in ports.map(|port| number(port, "nodePort")).filter(|port| *port > 0).map(Held::Port) {
        if !all.contains(&port) {
            all.push(port);
        }
    }
    all
}

fn number(port: &Value, field: &str) -> u16 {
    port.get(field).and_then(Value::as_u64).and_then(|number| u16::try_from(number).ok()).unwrap_or(0)
}

fn protocol(port: &Value) -> &str {
    port.get("protocol").and_then(Value::as_str).unwrap_or("TCP")
}

/// Whether node ports are chosen for a Service's ports (upstream's `shouldAllocateNodePorts`).
fn wants_node_ports(service: &Value) -> bool {
    match text(service, &["spec", "type"]) {
        "NodePort" => true,
        "LoadBalancer" => service.pointer("/spec/allocateLoadBalancerNodePorts") != Some(&Value::Bool(false)),
        _ => false,
    }
}

/// What there is to give out.
#[derive(Debug)]
pub struct Ranges {
    /// Cluster IPs.
    pub addresses: Cidr,
    /// Node ports.
    pub ports: RangeInclusive<u16>,
}

/// One Service that is given what it lacks.
struct Claim<'a> {
    ranges: &'a Ranges,
    /// Known to be another's.
    taken: &'a HashSet<Held>,
    seed: u32,
    wanted: Vec<Wanted>,
}

impl Ranges {
    /// Gives a Service that is created, or changed from `old`, what it lacks, and fills in the fields that follow. Answers what it does not
    /// hold yet. `taken` is what is known to be another's; `seed` is random.
    ///
    /// # Errors
    /// 422 for an address or port outside of its range, 500 when none is left.
    pub fn claim(&self, service: &mut Value, old: Option<&Value>, taken: &HashSet<Held>, seed: u32) -> Result<Vec<Wanted>, Status> {
        if text(service, &["spec", "type"]) == "ExternalName" {
            if let Some(spec) = service.get_mut("spec").and_then(Value::as_object_mut) {
                for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                    spec.remove(field);
                }
            }
            return Ok(Vec::new());
        }
        check_families(service)?;
        carry_over(service, old);
        let mut claim = Claim { ranges: self, taken, seed, wanted: Vec::new() };
        claim.address(service, old)?;
        fill_in_families(service);
        claim.ports(service, old)?;
        Ok(claim.wanted)
    }
}

impl Claim<'_> {
    /// Whether another Service has it, as far as is known, or this one is to have it already.
    fn is_taken(&self, held: Held) -> bool {
        self.taken.contains(&held) || self.has(held)
    }

    fn has(&self, held: Held) -> bool {
        self.wanted.iter().any(|wanted| wanted.held == held)
    }

    fn address(&mut self, service: &mut Value, old: Option<&Value>) -> Result<(), Status> {
        let wanted = text(service, &["spec", "clusterIP"]).to_owned();
        if wanted == "None" || (!wanted.is_empty() && old.is_some_and(|old| text(old, &["spec", "clusterIP"]) == wanted)) {
            return Ok(());
        }
        let usable = self.ranges.addresses.usable();
        if wanted.is_empty() {
            // The first one is the API server's own.
            let (first, last) = (usable.start() + 1, *usable.end());
            let address = free(first..=last, 16, 256, self.seed, |address| self.is_taken(Held::Address(address.into())))
                .map(Ipv4Addr::from)
                .ok_or_else(|| Status::internal("failed to allocate a serviceIP: range is full"))?;
            self.wanted.push(Wanted { held: Held::Address(address), refusal: None });
            service["spec"]["clusterIP"] = address.to_string().into();
            return Ok(());
        }
        let refuse = |why: &str| {
            let why = format!("failed to allocate IP {wanted}: {why}");
            Status::invalid("", "Service", name(service), &[FieldError::invalid("spec.clusterIPs", json!([wanted]), why)])
        };
        let address: Ipv4Addr = wanted.parse().map_err(|_| refuse("it is no IPv4 address"))?;
        if !usable.contains(&u32::from(address)) {
            return Err(refuse("the provided network does not match the current range"));
        }
        let refusal = Some(refuse("provided IP is already allocated"));
        self.wanted.push(Wanted { held: Held::Address(address), refusal });
        Ok(())
    }

    fn ports(&mut self, service: &mut Value, old: Option<&Value>) -> Result<(), Status> {
        if !matches!(text(service, &["spec", "type"]), "NodePort" | "LoadBalancer") {
            return Ok(());
        }
        let service_name = name(service).to_owned();
        let before = old.map(held).unwrap_or_default();
        let mut ports = service.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
        // What is asked for comes first: none of it may be chosen for another.
        for (index, port) in ports.iter().map(|port| number(port, "nodePort")).enumerate().filter(|(_, port)| *port > 0) {
            if !before.contains(&Held::Port(port)) && !self.has(Held::Port(port)) {
                self.asked_port(port, index, &service_name)?;
            }
        }
        for index in 0..if wants_node_ports(service) { ports.len() } else { 0 } {
            if number(&ports[index], "nodePort") > 0 {
                continue;
            }
            // A new Service's ports of one number and several protocols share their node port.
            let same = ports.iter().filter(|other| old.is_none() && number(other, "port") == number(&ports[index], "port"));
            let shared = same.map(|other| number(other, "nodePort")).max().filter(|port| *port > 0);
            ports[index]["nodePort"] = shared.map_or_else(|| self.free_port(), Ok)?.into();
        }
        service["spec"]["ports"] = Value::Array(ports);
        Ok(())
    }

    fn free_port(&mut self) -> Result<u16, Status> {
        let range = u32::from(*self.ranges.ports.start())..=u32::from(*self.ranges.ports.end());
        let is_taken = |port: u32| u16::try_from(port).is_ok_and(|port| self.is_taken(Held::Port(port)));
        let port = free(range, 32, 128, self.seed, is_taken).and_then(|port| u16::try_from(port).ok());
        let port = port.ok_or_else(|| Status::internal("failed to allocate a nodePort: range is full"))?;
        self.wanted.push(Wanted { held: Held::Port(port), refusal: None });
        Ok(port)
    }

    fn asked_port(&mut self, port: u16, index: usize, service: &str) -> Result<(), Status> {
        let refuse = |why: String| {
            let field = format!("spec.ports[{index}].nodePort");
            Status::invalid("", "Service", service, &[FieldError::invalid(field, port, why)])
        };
        let ports = &self.ranges.ports;
        if !ports.contains(&port) {
            let (first, last) = (ports.start(), ports.end());
            return Err(refuse(format!("provided port is not in the valid range. The range of valid ports is {first}-{last}")));
        }
        let refusal = Some(refuse("provided port is already allocated".to_owned()));
        self.wanted.push(Wanted { held: Held::Port(port), refusal });
        Ok(())
    }
}

/// A free number of a range: one of its upper part, else one of the lower, which is kept for those who choose their own: the `part`th
/// part, at least 16 and at most `most` (upstream's `calculateRangeOffset`).
fn free(range: RangeInclusive<u32>, part: u32, most: u32, seed: u32, is_taken: impl Fn(u32) -> bool) -> Option<u32> {
    let (first, size) = (*range.start(), range.end() - range.start() + 1);
    let band = if size <= 16 { 0 } else { (size / part).clamp(16, most) };
    let turn = |from: u32, size: u32| (0..size).map(move |step| from + (seed % size + step) % size);
    turn(first + band, size - band).chain(turn(first, band)).find(|number| !is_taken(*number))
}

/// Fills in what follows from the address.
fn fill_in_families(service: &mut Value) {
    let address = text(service, &["spec", "clusterIP"]).to_owned();
    let spec = &mut service["spec"];
    spec["clusterIPs"] = json!([address]);
    // A headless Service without selector has endpoints of whatever family somebody writes.
    let open = address == "None" && spec.get("selector").and_then(Value::as_object).is_none_or(serde_json::Map::is_empty);
    let (families, policy) =
        if open { (json!(["IPv4", "IPv6"]), json!("RequireDualStack")) } else { (json!(["IPv4"]), json!("SingleStack")) };
    for (field, value) in [("ipFamilies", families), ("ipFamilyPolicy", policy)] {
        if spec.get(field).is_none_or(Value::is_null) {
            spec[field] = value;
        }
    }
}

/// One family, IPv4, is all that this server has; a headless Service without selector may name any.
fn check_families(service: &Value) -> Result<(), Status> {
    let selector = service.pointer("/spec/selector").and_then(Value::as_object);
    if text(service, &["spec", "clusterIP"]) == "None" && selector.is_none_or(serde_json::Map::is_empty) {
        return Ok(());
    }
    let mut errors = Vec::new();
    if text(service, &["spec", "ipFamilyPolicy"]) == "RequireDualStack" {
        let why = "this cluster is not configured for dual-stack services";
        errors.push(FieldError::invalid("spec.ipFamilyPolicy", "RequireDualStack", why));
    }
    let families = service.pointer("/spec/ipFamilies").and_then(Value::as_array).into_iter().flatten();
    for (index, family) in families.enumerate().filter(|(_, family)| *family != "IPv4") {
        errors.push(FieldError::invalid(format!("spec.ipFamilies[{index}]"), family.clone(), "not configured on this cluster"));
    }
    if errors.is_empty() { Ok(()) } else { Err(Status::invalid("", "Service", name(service), &errors)) }
}

/// An update that leaves allocated fields out keeps them.
fn carry_over(service: &mut Value, old: Option<&Value>) {
    let Some(old) = old else { return };
    if text(service, &["spec", "clusterIP"]).is_empty() && text(old, &["spec", "type"]) != "ExternalName" {
        service["spec"]["clusterIP"] = old["spec"]["clusterIP"].clone();
    }
    if !wants_node_ports(service) || !wants_node_ports(old) {
        return;
    }
    let before = old.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
    for port in service.pointer_mut("/spec/ports").and_then(Value::as_array_mut).into_iter().flatten() {
        let unset = number(port, "nodePort") == 0;
        let same = before.iter().find(|old| protocol(old) == protocol(port) && old.get("port") == port.get("port"));
        if let (true, Some(number)) = (unset, same.and_then(|old| old.get("nodePort"))) {
            port["nodePort"] = number.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, spec: Value) -> Value {
        json!({"metadata": {"namespace": "d", "name": name}, "spec": spec})
    }

    fn ranges() -> Ranges {
        Ranges { addresses: "10.96.0.0/28".parse().expect("range"), ports: 30000..=30001 }
    }

    /// What a Service is given, and whether it asked for it.
    fn claim(service: &mut Value, old: Option<&Value>, taken: &HashSet<Held>) -> Result<Vec<(Held, bool)>, u16> {
        let wanted = ranges().claim(service, old, taken, 7).map_err(|status| status.code)?;
        Ok(wanted.into_iter().map(|wanted| (wanted.held, wanted.refusal.is_some())).collect())
    }

    #[test]
    fn addresses_are_chosen_asked_for_kept_or_refused() {
        let mut taken = HashSet::new();
        let mut asked = service("a", json!({"clusterIP": "10.96.0.1"}));
        assert_eq!(claim(&mut asked, None, &taken), Ok(vec![(Held::Address(Ipv4Addr::new(10, 96, 0, 1)), true)]));
        assert_eq!(asked["spec"]["clusterIPs"], json!(["10.96.0.1"]));
        assert_eq!(claim(&mut service("b", json!({"clusterIP": "10.0.0.1"})), None, &taken), Err(422));
        let mut headless = service("h", json!({"clusterIP": "None"}));
        assert_eq!(claim(&mut headless, None, &taken), Ok(vec![]));
        assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
        // All but the network, the broadcast and the API server's own.
        for _ in 0..13 {
            let mut next = service("s", json!({}));
            let given = claim(&mut next, None, &taken).expect("room for 13");
            assert_eq!(held(&next), [given[0].0]);
            assert!(!given[0].1 && taken.insert(given[0].0));
            let mut kept = service("s", json!({}));
            assert_eq!(claim(&mut kept, Some(&next), &taken), Ok(vec![]));
            assert_eq!(kept["spec"]["clusterIP"], next["spec"]["clusterIP"]);
        }
        assert_eq!(claim(&mut service("z", json!({})), None, &taken), Err(500));
    }

    #[test]
    fn node_ports_are_chosen_asked_for_shared_or_refused() {
        let ports = |ports: Value| service("a", json!({"type": "NodePort", "clusterIP": "None", "ports": ports}));
        let taken = HashSet::new();
        let mut both = ports(json!([{"port": 80}, {"port": 81, "nodePort": 30001}]));
        assert_eq!(claim(&mut both, None, &taken), Ok(vec![(Held::Port(30001), true), (Held::Port(30000), false)]));
        // One number for TCP and UDP, and one record.
        let mut shared = ports(json!([{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP", "nodePort": 30001}]));
        assert_eq!(claim(&mut shared, None, &taken), Ok(vec![(Held::Port(30001), true)]));
        assert_eq!(held(&shared), [Held::Port(30001)]);
        // A change keeps what the Service has.
        let mut changed = ports(json!([{"port": 53, "protocol": "UDP"}, {"port": 99}]));
        assert_eq!(claim(&mut changed, Some(&shared), &HashSet::from([Held::Port(30001)])), Ok(vec![(Held::Port(30000), false)]));
        assert_eq!(changed["spec"]["ports"][0]["nodePort"], 30001);
        assert_eq!(claim(&mut ports(json!([{"port": 80, "nodePort": 80}])), None, &taken), Err(422));
        assert_eq!(claim(&mut ports(json!([{"port": 1}, {"port": 2}, {"port": 3}])), None, &taken), Err(500));
    }
}
