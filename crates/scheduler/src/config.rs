//! The scheduler's flags, named as kube-scheduler's.

use std::path::PathBuf;

use clap::ArgAction;

/// What `coracle scheduler` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// How the API server is reached and who the scheduler is.
    #[arg(long)]
    pub kubeconfig: PathBuf,
    /// Whether to wait for the lease kube-system/kube-scheduler before scheduling.
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    pub leader_elect: bool,
    /// The value of spec.schedulerName that this scheduler takes care of.
    #[arg(long, default_value = "default-scheduler")]
    pub scheduler_name: String,
}
