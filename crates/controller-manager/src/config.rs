//! Flags, by the names of kube-controller-manager's.

use std::path::PathBuf;
use std::time::Duration;

/// Everything that can be set.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Kubeconfig with the API server's address and this program's identity.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: PathBuf,
    /// PEM bundle that is published in each namespace as the ConfigMap kube-root-ca.crt; without it none is published.
    #[arg(long, value_name = "FILE")]
    pub root_ca_file: Option<PathBuf>,
    /// Give each controller its own service account in kube-system, with tokens from TokenRequest.
    #[arg(long, default_value_t = false, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub use_service_account_credentials: bool,
    /// Wait for a lease before acting, so that only one of several managers acts.
    #[arg(long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub leader_elect: bool,
    /// How long others wait after the leader's last renewal.
    #[arg(long, default_value = "15s", value_parser = parse_duration, value_name = "DURATION")]
    pub leader_elect_lease_duration: Duration,
    /// How long the leader tries to renew before it gives up.
    #[arg(long, default_value = "10s", value_parser = parse_duration, value_name = "DURATION")]
    pub leader_elect_renew_deadline: Duration,
    /// Time between tries to get or renew the lease.
    #[arg(long, default_value = "2s", value_parser = parse_duration, value_name = "DURATION")]
    pub leader_elect_retry_period: Duration,
    /// Namespace of the lease.
    #[arg(long, default_value = "kube-system")]
    pub leader_elect_resource_namespace: String,
    /// Name of the lease.
    #[arg(long, default_value = "kube-controller-manager")]
    pub leader_elect_resource_name: String,
    /// Controllers to run: '*' for all, NAME for one, -NAME for all but one.
    #[arg(long, default_value = "*", value_delimiter = ',', allow_hyphen_values = true)]
    pub controllers: Vec<String>,
    /// A node that has not reported for this long is marked Unknown.
    #[arg(long, default_value = "40s", value_parser = parse_duration, value_name = "DURATION")]
    pub node_monitor_grace_period: Duration,
    /// How often the nodes' reports are looked at.
    #[arg(long, default_value = "5s", value_parser = parse_duration, value_name = "DURATION")]
    pub node_monitor_period: Duration,
    /// Ended pods that may stay before the oldest are deleted; 0 for no limit.
    #[arg(long, default_value_t = 12500, value_name = "COUNT")]
    pub terminated_pod_gc_threshold: usize,
    /// Most endpoints of one EndpointSlice, 1 to 1000.
    #[arg(long, default_value_t = 100, value_name = "COUNT", value_parser = endpoints_max)]
    pub max_endpoints_per_slice: usize,
    /// How long changes of pods are collected before EndpointSlices are written.
    #[arg(long, default_value = "0", value_parser = parse_duration, value_name = "DURATION")]
    pub endpointslice_updates_batch_period: Duration,
    /// Services whose EndpointSlices are worked on at one time, 1 to 50.
    #[arg(long, default_value_t = 5, value_name = "COUNT", value_parser = workers)]
    pub concurrent_service_endpoint_syncs: usize,
}

fn endpoints_max(text: &str) -> Result<usize, String> {
    number(text, 1000)
}

fn workers(text: &str) -> Result<usize, String> {
    number(text, 50)
}

fn number(text: &str, max: usize) -> Result<usize, String> {
    text.parse().ok().filter(|number| (1..=max).contains(number)).ok_or_else(|| format!("{text:?} is no number from 1 to {max}"))
}

/// A Go duration: `300ms`, `1m30s`, `2h`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no duration (say 40s, 1m30s or 500ms)");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
        let number: f64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total += number
            * match &rest[..unit] {
                "ms" => 0.001,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(bad()),
            };
        rest = &rest[unit..];
    }
    if text.is_empty() {
        return Err(bad());
    }
    Duration::try_from_secs_f64(total).map_err(|_| bad())
}

impl Config {
    /// Whether `--controllers` names a controller.
    pub fn enabled(&self, name: &str) -> bool {
        let named = |wanted: &str| self.controllers.iter().any(|given| given == wanted);
        !named(&format!("-{name}")) && (named("*") || named(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        assert_eq!(parse_duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for bad in ["", "5", "s", "1x", "-1s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn controllers_are_chosen() {
        use clap::Parser;
        #[derive(Parser)]
        struct Cli {
            #[command(flatten)]
            config: Config,
        }
        let parse = |list: &str| Cli::try_parse_from(["x", "--kubeconfig", "k", "--controllers", list]).expect("flags").config;
        assert!(parse("*").enabled("deployment"));
        assert!(!parse("*,-deployment").enabled("deployment"));
        assert!(!parse("namespace").enabled("deployment"));
    }
}
