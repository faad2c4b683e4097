//! What all controllers share: informers, and the means to get an identity each.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use client::{EventRecorder, Informer, Token, connect_with_token, run_events};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::rbac::v1::ClusterRole;
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::endpoint_slice::{BY_SERVICE, service_index};
use crate::objects::controller_of;

/// A controller on its way: registered with the informers, to be run.
pub(crate) type Starting = Pin<Box<dyn Future<Output = ()> + Send>>;

/// How long a token is asked for, and when it is exchanged (80 % of it).
const TOKEN_SECONDS: i64 = 3600;
/// Index of pods by their controller's UID; orphans are under `NAMESPACE/`.
pub(crate) const BY_CONTROLLER: &str = "controller";
/// Index of pods by node.
pub(crate) const BY_NODE: &str = "node";

/// One watch each, shared by all controllers.
#[derive(Debug, Default)]
pub(crate) struct Informers {
    pub(crate) pods: Informer<Pod>,
    pub(crate) nodes: Informer<Node>,
    pub(crate) namespaces: Informer<Namespace>,
    pub(crate) service_accounts: Informer<ServiceAccount>,
    pub(crate) root_ca_config_maps: Informer<ConfigMap>,
    pub(crate) deployments: Informer<Deployment>,
    pub(crate) replica_sets: Informer<ReplicaSet>,
    pub(crate) cluster_roles: Informer<ClusterRole>,
    pub(crate) node_leases: Informer<Lease>,
    pub(crate) services: Informer<Service>,
    pub(crate) endpoint_slices: Informer<EndpointSlice>,
}

/// Under which value the index [`BY_CONTROLLER`] has a pod.
pub(crate) fn controller_index(pod: &Pod) -> String {
    match controller_of(&pod.metadata) {
        Some(owner) => owner.uid.clone(),
        None => format!("{}/", pod.metadata.namespace.as_deref().unwrap_or_default()),
    }
}

impl Informers {
    pub(crate) fn new() -> Self {
        let informers = Self::default();
        informers.pods.add_index(BY_CONTROLLER, |pod| vec![controller_index(pod)]);
        informers.pods.add_index(BY_NODE, |pod| pod.spec.iter().filter_map(|spec| spec.node_name.clone()).collect());
        informers.endpoint_slices.add_index(BY_SERVICE, service_index);
        informers
    }

    /// Starts all watches.
    pub(crate) fn run(&self, client: &Client, tasks: &TaskTracker, cancel: &CancellationToken) {
        let config = watcher::Config::default;
        let named = |name: &str| config().fields(&format!("metadata.name={name}"));
        macro_rules! spawn {
            ($informer:ident, $api:expr, $config:expr) => {
                tasks.spawn(self.$informer.clone().run($api, $config, cancel.child_token()))
            };
        }
        spawn!(pods, Api::all(client.clone()), config());
        spawn!(nodes, Api::all(client.clone()), config());
        spawn!(namespaces, Api::all(client.clone()), config());
        spawn!(service_accounts, Api::all(client.clone()), config());
        spawn!(root_ca_config_maps, Api::all(client.clone()), named("kube-root-ca.crt"));
        spawn!(deployments, Api::all(client.clone()), config());
        spawn!(replica_sets, Api::all(client.clone()), config());
        spawn!(cluster_roles, Api::all(client.clone()), config());
        spawn!(services, Api::all(client.clone()), config());
        spawn!(endpoint_slices, Api::all(client.clone()), config());
        spawn!(node_leases, Api::namespaced(client.clone(), "kube-node-lease"), config());
    }

    /// Waits for all first lists; false if `cancel` came first.
    pub(crate) async fn wait_synced(&self, cancel: &CancellationToken) -> bool {
        self.pods.wait_synced(cancel).await
            && self.nodes.wait_synced(cancel).await
            && self.namespaces.wait_synced(cancel).await
            && self.service_accounts.wait_synced(cancel).await
            && self.root_ca_config_maps.wait_synced(cancel).await
            && self.deployments.wait_synced(cancel).await
            && self.replica_sets.wait_synced(cancel).await
            && self.cluster_roles.wait_synced(cancel).await
            && self.node_leases.wait_synced(cancel).await
            && self.services.wait_synced(cancel).await
            && self.endpoint_slices.wait_synced(cancel).await
    }
}

/// What a controller is started with.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) config: Config,
    /// Of the manager's own identity.
    pub(crate) base: kube::Config,
    pub(crate) informers: Informers,
    pub(crate) tasks: TaskTracker,
    pub(crate) cancel: CancellationToken,
}

impl std::fmt::Debug for IdentityError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Why a controller has no identity yet.
#[derive(thiserror::Error)]
pub(crate) enum IdentityError {
    #[error("failed to make the service account kube-system/{name}")]
    Account { name: String, source: Box<kube::Error> },
    #[error("failed to get a token of the service account kube-system/{name}")]
    Token { name: String, source: Box<kube::Error> },
    #[error("the token request of kube-system/{name} was answered without a token")]
    NoToken { name: String },
    #[error(transparent)]
    Connect(#[from] client::ConnectError),
}

impl Context {
    /// A controller's client and event recorder, once the server gives them and the informers are full; `None` if the
    /// manager ends first.
    pub(crate) async fn identity(&self, name: &'static str) -> Option<(Client, EventRecorder)> {
        if !self.informers.wait_synced(&self.cancel).await {
            return None;
        }
        let mut wait = Duration::from_millis(100);
        let client = loop {
            match self.client(name).await {
                Ok(client) => break client,
                Err(error) => {
                    tracing::warn!(controller = name, error = &error as &dyn std::error::Error, "no identity yet; trying again");
                }
            }
            tokio::select! {
                () = self.cancel.cancelled() => return None,
                () = tokio::time::sleep(wait) => wait = (wait * 2).min(Duration::from_secs(10)),
            }
        };
        let recorder = EventRecorder::new(name, "");
        self.tasks.spawn(run_events(client.clone(), recorder.clone(), self.cancel.child_token()));
        Some((client, recorder))
    }

    async fn client(&self, name: &'static str) -> Result<Client, IdentityError> {
        let own = client::connect_with_config(self.base.clone())?;
        if !self.config.use_service_account_credentials {
            return Ok(own);
        }
        let accounts: Api<ServiceAccount> = Api::namespaced(own, "kube-system");
        ensure_account(&accounts, name).await?;
        let token = Token::default();
        let lives = request_token(&accounts, name, &token).await?;
        let client = connect_with_token(self.base.clone(), token.clone())?;
        let cancel = self.cancel.child_token();
        self.tasks.spawn(keep_token(accounts, name, token, lives, cancel));
        Ok(client)
    }
}

async fn ensure_account(accounts: &Api<ServiceAccount>, name: &str) -> Result<(), IdentityError> {
    let failed = |source| IdentityError::Account { name: name.to_owned(), source: Box::new(source) };
    if accounts.get_opt(name).await.map_err(failed)?.is_some() {
        return Ok(());
    }
    let account = ServiceAccount {
        metadata: ObjectMeta { name: Some(name.to_owned()), namespace: Some("kube-system".to_owned()), ..ObjectMeta::default() },
        ..ServiceAccount::default()
    };
    match accounts.create(&PostParams::default(), &account).await {
        Err(kube::Error::Api(answer)) if answer.code == 409 => Ok(()),
        answer => answer.map(drop).map_err(failed),
    }
}

/// Gets a token; answers how long it lives.
async fn request_token(accounts: &Api<ServiceAccount>, name: &str, token: &Token) -> Result<Duration, IdentityError> {
    let request = TokenRequest {
        spec: Some(TokenRequestSpec { expiration_seconds: Some(TOKEN_SECONDS), ..TokenRequestSpec::default() }),
        ..TokenRequest::default()
    };
    let answer = accounts
        .create_token_request(name, &PostParams::default(), &request)
        .await
        .map_err(|source| IdentityError::Token { name: name.to_owned(), source: Box::new(source) })?;
    let status = answer.status.ok_or_else(|| IdentityError::NoToken { name: name.to_owned() })?;
    let (Some(text), Some(expires)) = (status.token, status.expiration_timestamp) else {
        return Err(IdentityError::NoToken { name: name.to_owned() });
    };
    token.set(&text)?;
    Ok(Duration::try_from(expires.0.duration_since(Timestamp::now())).unwrap_or_default())
}

/// How often it is looked whether the wall's clock was stepped.
const CLOCK_LOOK: Duration = Duration::from_secs(10);
/// What is a step: less is within the leeway that servers give tokens.
const CLOCK_STEP: Duration = Duration::from_secs(30);

/// Waits for so long, or until the wall's clock was stepped: then a token may have ended already, or not have begun.
async fn wait_or_step(wait: Duration) {
    let (began, wall) = (tokio::time::Instant::now(), Timestamp::now());
    while let Some(left) = wait.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
        tokio::time::sleep(left.min(CLOCK_LOOK)).await;
        if is_step(Timestamp::now().duration_since(wall), began.elapsed()) {
            return;
        }
    }
}

/// Whether the wall's clock went another way than time did.
fn is_step(wall: SignedDuration, passed: Duration) -> bool {
    let apart = SignedDuration::try_from(passed).map(|passed| (wall - passed).unsigned_abs());
    apart.is_ok_and(|apart| apart > CLOCK_STEP)
}

/// Exchanges the token after 80 % of its life or when the clock was stepped, and keeps trying when that fails.
async fn keep_token(accounts: Api<ServiceAccount>, name: &'static str, token: Token, mut lives: Duration, cancel: CancellationToken) {
    loop {
        let wait = (lives * 4 / 5).max(Duration::from_secs(10));
        tokio::select! {
            () = cancel.cancelled() => return,
            () = wait_or_step(wait) => {}
        }
        lives = match request_token(&accounts, name, &token).await {
            Ok(lives) => lives,
            Err(error) => {
                tracing::warn!(controller = name, error = &error as &dyn std::error::Error, "failed to renew a token");
                Duration::ZERO
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_the_clock_is_seen_either_way() {
        let minute = Duration::from_secs(60);
        for (wall_seconds, step) in [(60, false), (80, false), (3660, true), (-3540, true)] {
            assert_eq!(is_step(SignedDuration::from_secs(wall_seconds), minute), step, "{wall_seconds}");
        }
    }
}
