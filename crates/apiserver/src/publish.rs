//! Publishes this server as the Service `kubernetes`: the Service, and an EndpointSlice with the addresses of all servers on the store.
//!
//! Each server keeps its address under `PREFIX/masterleases/` as long as it lives, as upstream's lease reconciler does
//! (`pkg/controlplane/reconcilers/lease.go`, v1.37), so servers of both kinds on one etcd see each other.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::status::Status;
use serde_json::json;
use store::{Op, PutRequest, RangeRequest, Txn};
use tokio_util::sync::CancellationToken;

use crate::api::{Api, store_error};
use crate::startup::{self, Place};

/// How long an address stays after its server died, and how often all is looked at.
const TTL_SECONDS: i64 = 15;
const PERIOD: Duration = Duration::from_secs(10);
/// How long the last write may take when the server ends.
const LAST: Duration = Duration::from_secs(2);

/// The address of this server in the store.
#[derive(Debug, Default)]
pub struct Publisher {
    lease: Option<i64>,
}

impl Publisher {
    /// Makes or repairs Service and EndpointSlice.
    ///
    /// # Errors
    /// What the store or the server's own rules refuse.
    pub async fn publish(&mut self, api: &Arc<Api>, place: &Place) -> Result<(), Status> {
        startup::ensure(api, &startup::kubernetes_service(place)).await?;
        if place.address.is_loopback() {
            return Ok(());
        }
        self.renew(api, place.address).await?;
        let mut addresses = addresses(api).await?;
        addresses.insert(place.address);
        startup::ensure(api, &startup::kubernetes_slice(place, &addresses)).await
    }

    async fn renew(&mut self, api: &Api, address: Ipv4Addr) -> Result<(), Status> {
        let (store, key) = (api.store.as_ref(), format!("{}{address}", leases(api)));
        let there = store.range(RangeRequest::key(key.clone())).await.map_err(store_error)?;
        let mine = there.kvs.first().is_some_and(|kv| Some(kv.lease) == self.lease);
        if let Some(id) = self.lease.filter(|_| mine)
            && store.lease_keepalive(id).await.is_ok_and(|lease| lease.ttl_seconds > 0)
        {
            return Ok(());
        }
        let lease = store.lease_grant(0, TTL_SECONDS).await.map_err(store_error)?.id;
        // The form that upstream's servers read.
        let value = json!({"kind": "Endpoints", "apiVersion": "v1", "metadata": {}, "subsets": [{"addresses": [{"ip": address}]}]});
        let put = Op::Put(PutRequest { key: key.into(), value: value.to_string().into(), lease, prev_kv: false });
        store.txn(Txn { compare: Vec::new(), success: vec![put], failure: Vec::new() }).await.map_err(store_error)?;
        self.lease = Some(lease);
        Ok(())
    }

    /// Publishes every 10 seconds until `cancel`; then takes this server's address away if there are others.
    pub async fn run(mut self, api: Arc<Api>, place: Place, cancel: CancellationToken) {
        loop {
            tokio::select! {
                () = cancel.cancelled() => break,
                () = tokio::time::sleep(PERIOD) => {}
            }
            if let Err(status) = self.publish(&api, &place).await {
                tracing::warn!(message = status.message, "failed to publish this server as the service kubernetes; trying again");
            }
        }
        if tokio::time::timeout(LAST, self.withdraw(&api, &place)).await.is_err() {
            tracing::warn!("gave up taking this server's address away from the service kubernetes");
        }
    }

    async fn withdraw(&mut self, api: &Arc<Api>, place: &Place) {
        let Some(lease) = self.lease.take() else { return };
        let withdrawn = async {
            api.store.lease_revoke(lease).await.map_err(store_error)?;
            let rest = addresses(api).await?;
            // The last one leaves its address: a server that comes back there is found at once.
            if rest.is_empty() { Ok(()) } else { startup::ensure(api, &startup::kubernetes_slice(place, &rest)).await }
        };
        if let Err(status) = withdrawn.await {
            tracing::warn!(message = status.message, "failed to take this server's address away from the service kubernetes");
        }
    }
}

/// Where the servers' addresses are.
fn leases(api: &Api) -> String {
    format!("{}masterleases/", api.resources.root())
}

/// The addresses of all servers; they are the ends of the keys, whoever wrote the values.
async fn addresses(api: &Api) -> Result<BTreeSet<Ipv4Addr>, Status> {
    let prefix = leases(api);
    let request = RangeRequest { keys_only: true, ..RangeRequest::prefix(prefix.clone()) };
    let found = api.store.range(request).await.map_err(store_error)?;
    let address = |key: &[u8]| std::str::from_utf8(key).ok()?.strip_prefix(&prefix)?.parse().ok();
    Ok(found.kvs.iter().filter_map(|kv| address(&kv.key)).collect())
}
