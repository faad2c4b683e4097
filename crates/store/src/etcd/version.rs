//! What a member's version tells.

use std::time::Duration;

use protocols::etcd::etcdserverpb as pb;
use protocols::etcd::etcdserverpb::maintenance_client::MaintenanceClient;

use super::members::Members;
use super::{failed, timed};
use crate::Error;

/// How long the members are asked before none counts as there.
const TRIES: usize = 10;
const PAUSE: Duration = Duration::from_millis(300);

/// Whether all members that answer do right on a request for progress: from 3.4.31 and 3.5.13 on. Earlier ones tell of a revision
/// before its events (`apiserver/pkg/storage/feature/feature_support_checker.go`, Kubernetes 1.31).
pub(super) async fn progress_works(members: &Members) -> Result<bool, Error> {
    let mut last = None;
    for _ in 0..TRIES {
        let (mut answered, mut works) = (false, true);
        for _ in 0..members.len() {
            let member = members.current();
            let status = timed(async { MaintenanceClient::new(member.channel.clone()).status(pb::StatusRequest {}).await }).await;
            match status {
                Ok(status) => {
                    answered = true;
                    works &= is_right(&status.version);
                    tracing::info!(endpoint = %member.url, version = %status.version, "etcd answers");
                }
                Err(status) => last = Some(failed("reach", &member, status)),
            }
            members.leave(&member);
        }
        if answered {
            return Ok(works);
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(last.unwrap_or(Error::Closed))
}

fn is_right(version: &str) -> bool {
    let mut numbers = version.split(['.', '-', '+']).map(|number| number.parse::<u32>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let version = (next(), next(), next());
    version >= (3, 5, 13) || ((3, 4, 31)..(3, 5, 0)).contains(&version)
}

#[cfg(test)]
mod tests {
    use super::is_right;

    #[test]
    fn versions() {
        for (version, right) in
            [("3.4.23", false), ("3.4.31", true), ("3.5.0", false), ("3.5.13", true), ("3.7.3", true), ("4.0.0-rc.1", true)]
        {
            assert_eq!(is_right(version), right, "{version}");
        }
    }
}
