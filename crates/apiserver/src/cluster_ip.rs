//! Cluster IPs and node ports of Services (`pkg/registry/core/service`, v1.37, one IPv4 family).
//!
//! What is taken is held in memory and is nothing but what the stored Services say: it is filled from them at the start, so
//! there is no second record that could disagree and need repair.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

#[derive(Default)]
struct Taken {
    addresses: HashMap<u32, String>,
    ports: HashMap<(String, u16), String>,
}

/// Gives out addresses and ports.
pub struct Allocator {
    range: Cidr,
    ports: RangeInclusive<u16>,
    taken: Mutex<Taken>,
}

/// What was taken for a Service that is not yet stored; given back unless [`Claim::keep`] is called.
#[must_use]
pub struct Claim {
    allocator: Arc<Allocator>,
    addresses: Vec<u32>,
    ports: Vec<(String, u16)>,
}

impl Claim {
    /// The Service is stored.
    pub fn keep(mut self) {
        self.addresses.clear();
        self.ports.clear();
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut taken = self.allocator.lock();
        for address in &self.addresses {
            taken.addresses.remove(address);
        }
        for port in &self.ports {
            taken.ports.remove(port);
        }
    }
}

fn owner(service: &Value) -> String {
    format!("{}/{}", text(service, &["metadata", "namespace"]), name(service))
}

fn addresses(service: &Value) -> Vec<u32> {
    let parse = |text: &str| text.parse::<Ipv4Addr>().ok().map(u32::from);
    parse(text(service, &["spec", "clusterIP"])).into_iter().collect()
}

fn node_ports(service: &Value) -> Vec<(String, u16)> {
    let ports = service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten();
    let number = |port: &Value| {
        let number = port.get("nodePort").and_then(Value::as_u64).and_then(|number| u16::try_from(number).ok())?;
        (number > 0).then(|| (protocol(port), number))
    };
    ports.filter_map(number).collect()
}

fn protocol(port: &Value) -> String {
    port.get("protocol").and_then(Value::as_str).unwrap_or("TCP").to_owned()
}

fn wants_node_ports(service: &Value) -> bool {
    match text(service, &["spec", "type"]) {
        "NodePort" => true,
        "LoadBalancer" => service.pointer("/spec/allocateLoadBalancerNodePorts") != Some(&Value::Bool(false)),
        _ => false,
    }
}

impl Allocator {
    /// An allocator with nothing taken.
    pub fn new(range: Cidr, ports: RangeInclusive<u16>) -> Self {
        Self { range, ports, taken: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what a stored Service has, at the start. Answers what another Service has already.
    pub fn restore(&self, service: &Value) -> Vec<String> {
        let mut taken = self.lock();
        let own = owner(service);
        let mut clashes = Vec::new();
        for address in addresses(service) {
            let kept = taken.addresses.entry(address).or_insert_with(|| own.clone());
            if *kept != own {
                clashes.push(format!("cluster IP {} of {own} belongs to {kept}", Ipv4Addr::from(address)));
            }
        }
        for port in node_ports(service) {
            let text = format!("node port {}/{}", port.1, port.0);
            let kept = taken.ports.entry(port).or_insert_with(|| own.clone());
            if *kept != own {
                clashes.push(format!("{text} of {own} belongs to {kept}"));
            }
        }
        clashes
    }

    /// Gives back what a Service had and `kept` (its successor) has no more.
    pub fn release(&self, service: &Value, kept: Option<&Value>) {
        let mut taken = self.lock();
        let own = owner(service);
        let (addresses_kept, ports_kept) = (kept.map(addresses).unwrap_or_default(), kept.map(node_ports).unwrap_or_default());
        for address in addresses(service).into_iter().filter(|address| !addresses_kept.contains(address)) {
            if taken.addresses.get(&address) == Some(&own) {
                taken.addresses.remove(&address);
            }
        }
        for port in node_ports(service).into_iter().filter(|port| !ports_kept.contains(port)) {
            if taken.ports.get(&port) == Some(&own) {
                taken.ports.remove(&port);
            }
        }
    }

    /// Gives a Service that is created or changed its addresses and ports, and fills in the fields that follow from them.
    ///
    /// # Errors
    /// 422 for an address or port that is taken or outside of the range, 500 when none is left.
    pub fn claim(self: &Arc<Self>, service: &mut Value, old: Option<&Value>) -> Result<Claim, Status> {
        let mut claim = Claim { allocator: self.clone(), addresses: Vec::new(), ports: Vec::new() };
        let external = text(service, &["spec", "type"]) == "ExternalName";
        if external {
            if let Some(spec) = service.get_mut("spec").and_then(Value::as_object_mut) {
                for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                    spec.remove(field);
                }
            }
            return Ok(claim);
        }
        check_families(service)?;
        carry_over(service, old);
        self.claim_address(service, old, &mut claim)?;
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
        if wants_node_ports(service) {
            self.claim_ports(service, old, &mut claim)?;
        }
        Ok(claim)
    }

    fn claim_address(&self, service: &mut Value, old: Option<&Value>, claim: &mut Claim) -> Result<(), Status> {
        let wanted = text(service, &["spec", "clusterIP"]).to_owned();
        if wanted == "None" || (!wanted.is_empty() && old.is_some_and(|old| text(old, &["spec", "clusterIP"]) == wanted)) {
            return Ok(());
        }
        let own = owner(service);
        let mut taken = self.lock();
        let address = if wanted.is_empty() {
            self.free_address(&taken).ok_or_else(|| Status::internal("failed to allocate a serviceIP: range is full"))?
        } else {
            let refuse = |why: &str| {
                let why = format!("failed to allocate IP {wanted}: {why}");
                Err(Status::invalid("", "Service", name(service), &[FieldError::invalid("spec.clusterIPs", json!([wanted]), why)]))
            };
            let Ok(address) = wanted.parse::<Ipv4Addr>().map(u32::from) else { return refuse("it is no IPv4 address") };
            if !self.range.usable().contains(&address) {
                return refuse("the provided network does not match the current range");
            }
            if taken.addresses.contains_key(&address) {
                return refuse("provided IP is already allocated");
            }
            address
        };
        taken.addresses.insert(address, own);
        claim.addresses.push(address);
        service["spec"]["clusterIP"] = Ipv4Addr::from(address).to_string().into();
        Ok(())
    }

    /// A free address of the upper band (the lower one is kept for those who choose their own), else of the lower.
    fn free_address(&self, taken: &Taken) -> Option<u32> {
        let usable = self.range.usable();
        let (first, last) = (*usable.start(), *usable.end());
        let size = last - first + 1;
        let band = (size / 16).clamp(16, 256).min(size);
        let upper = size - band;
        let seed = uuid::Uuid::new_v4().as_fields().0;
        let above = (0..upper).map(|step| first + band + (seed.wrapping_add(step)) % upper);
        above.chain(first + 1..first + band).find(|address| !taken.addresses.contains_key(address))
    }

    fn claim_ports(&self, service: &mut Value, old: Option<&Value>, claim: &mut Claim) -> Result<(), Status> {
        let own = owner(service);
        let service_name = name(service).to_owned();
        let before = old.map(node_ports).unwrap_or_default();
        let mut taken = self.lock();
        let ports = service.pointer_mut("/spec/ports").and_then(Value::as_array_mut).into_iter().flatten();
        for (index, port) in ports.enumerate() {
            let protocol = protocol(port);
            let wanted = port.get("nodePort").and_then(Value::as_u64).and_then(|number| u16::try_from(number).ok()).unwrap_or(0);
            if before.contains(&(protocol.clone(), wanted)) {
                continue;
            }
            let refuse = |why: String| {
                let field = format!("spec.ports[{index}].nodePort");
                Status::invalid("", "Service", &service_name, &[FieldError::invalid(field, wanted, why)])
            };
            let number = if wanted == 0 {
                let size = self.ports.end() - self.ports.start() + 1;
                let seed = uuid::Uuid::new_v4().as_fields().1;
                let mut free = (0..size).map(|step| self.ports.start() + seed.wrapping_add(step) % size);
                free.find(|number| !taken.ports.contains_key(&(protocol.clone(), *number)))
                    .ok_or_else(|| Status::internal("failed to allocate a nodePort: range is full"))?
            } else if !self.ports.contains(&wanted) {
                return Err(refuse(format!(
                    "provided port is not in the valid range. The range of valid ports is {}-{}",
                    self.ports.start(),
                    self.ports.end()
                )));
            } else if taken.ports.contains_key(&(protocol.clone(), wanted)) {
                return Err(refuse("provided port is already allocated".to_owned()));
            } else {
                wanted
            };
            taken.ports.insert((protocol.clone(), number), own.clone());
            claim.ports.push((protocol, number));
            port["nodePort"] = number.into();
        }
        Ok(())
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
        let unset = port.get("nodePort").and_then(Value::as_u64).unwrap_or(0) == 0;
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

    #[test]
    fn addresses_are_given_kept_refused_and_given_back() {
        let allocator = Arc::new(Allocator::new("10.96.0.0/28".parse().expect("range"), 30000..=30001));
        let mut first = service("a", json!({"clusterIP": "10.96.0.1"}));
        allocator.claim(&mut first, None).expect("free").keep();
        assert_eq!(first["spec"]["clusterIPs"], json!(["10.96.0.1"]));
        let mut clash = service("b", json!({"clusterIP": "10.96.0.1"}));
        assert_eq!(allocator.claim(&mut clash, None).map(drop).map_err(|status| status.code), Err(422));
        let mut outside = service("b", json!({"clusterIP": "10.0.0.1"}));
        assert_eq!(allocator.claim(&mut outside, None).map(drop).map_err(|status| status.code), Err(422));
        let mut headless = service("h", json!({"clusterIP": "None"}));
        allocator.claim(&mut headless, None).expect("nothing to take").keep();
        assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
        // Dropped without being stored: free again.
        let mut lost = service("c", json!({}));
        drop(allocator.claim(&mut lost, None).expect("free"));
        let mut found = Vec::new();
        for index in 0..13 {
            let mut next = service(&format!("s{index}"), json!({}));
            allocator.claim(&mut next, None).expect("room for 13 more").keep();
            found.push(next);
        }
        assert_eq!(allocator.claim(&mut service("z", json!({})), None).map(drop).map_err(|status| status.code), Err(500));
        allocator.release(&found[3], None);
        let mut again = service("z", json!({}));
        allocator.claim(&mut again, None).expect("one is free").keep();
        assert_eq!(again["spec"]["clusterIP"], found[3]["spec"]["clusterIP"]);
    }

    #[test]
    fn node_ports() {
        let allocator = Arc::new(Allocator::new("10.96.0.0/24".parse().expect("range"), 30000..=30001));
        let ports =
            json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP"}, {"port": 81, "protocol": "TCP", "nodePort": 30001}]});
        let mut first = service("a", ports);
        // The chosen port may be given out before it is seen, so both orders are fine as long as they differ or are refused.
        if let Ok(claim) = allocator.claim(&mut first, None) {
            claim.keep();
            assert_ne!(first["spec"]["ports"][0]["nodePort"], first["spec"]["ports"][1]["nodePort"]);
        }
        let mut bad = service("b", json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 80}]}));
        assert_eq!(allocator.claim(&mut bad, None).map(drop).map_err(|status| status.code), Err(422));
    }
}
