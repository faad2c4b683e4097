//! `coracle apply` and `coracle get`: our own client for machines without kubectl. Creates or merges the objects of a file and waits for its
//! Deployments.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use kube::api::{Patch, PatchParams, PostParams, ValidationDirective};
use kube::core::{DynamicObject, GroupVersionKind, TypeMeta};
use kube::discovery::{ApiResource, Scope, pinned_kind};
use kube::{Api, Client};
use serde::Deserialize;

use crate::settings::Settings;

/// The name under which objects are written.
const FIELD_MANAGER: &str = "coracle-apply";
/// How often a Deployment is looked at while it is waited for.
const POLL: Duration = Duration::from_millis(50);

/// The flags of `coracle apply`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The file: YAML, one or more documents.
    #[arg(short, long)]
    filename: Utf8PathBuf,
    /// The namespace of objects that name none.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Where the cluster's data are.
    #[arg(long, default_value = "/var/lib/coracle")]
    data_dir: Utf8PathBuf,
    /// How long the Deployments of the file may take to be available, in seconds; 0 does not wait.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
}

/// Applies the file.
pub async fn run(args: Args) -> Result<()> {
    let objects = read(&args.filename)?;
    let client = admin(&args.data_dir).await?;
    let mut applied = Vec::new();
    for object in objects {
        applied.push(apply(&client, &args.namespace, object).await?);
    }
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    for (api, types, name) in &applied {
        if args.timeout > 0 && types.kind == "Deployment" && types.api_version == "apps/v1" {
            wait_available(api, name, deadline).await?;
            println!("deployment.apps/{name} is available");
        }
    }
    Ok(())
}

/// The flags of `coracle get`.
#[derive(clap::Args, Debug)]
pub struct GetArgs {
    /// The path, e.g. /api/v1/nodes.
    path: String,
    /// Where the cluster's data are.
    #[arg(long, default_value = "/var/lib/coracle")]
    data_dir: Utf8PathBuf,
}

/// Prints what the API server answers, as `kubectl get --raw` does.
pub async fn get(args: GetArgs) -> Result<()> {
    let client = admin(&args.data_dir).await?;
    let request = http::Request::get(&args.path).body(Vec::new()).with_context(|| format!("{:?} is no path", args.path))?;
    println!("{}", client.request_text(request).await.with_context(|| format!("failed to get {}", args.path))?);
    Ok(())
}

/// A client with the admin's identity.
pub async fn admin(data_dir: &Utf8Path) -> Result<Client> {
    let settings = Settings::load(data_dir)?.with_context(|| format!("--data-dir: there is no Coracle in {data_dir}"))?;
    client::connect(settings.admin_kubeconfig().as_std_path(), crate::USER_AGENT).await.context("failed to make a client")
}

/// Every document, parsed before anything is sent.
fn read(path: &Utf8PathBuf) -> Result<Vec<DynamicObject>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--filename: failed to read {path}"))?;
    let mut objects = Vec::new();
    for (number, document) in serde_yaml_ng::Deserializer::from_str(&text).enumerate() {
        let value = serde_json::Value::deserialize(document).with_context(|| format!("{path}: document {}", number + 1))?;
        if !value.is_null() {
            objects.push(serde_json::from_value(value).with_context(|| format!("{path}: document {} is no object", number + 1))?);
        }
    }
    Ok(objects)
}

type Applied = (Api<DynamicObject>, TypeMeta, String);

async fn apply(client: &Client, namespace: &str, object: DynamicObject) -> Result<Applied> {
    let types = object.types.clone().context("an object has no apiVersion and kind")?;
    let name = object.metadata.name.clone().with_context(|| format!("a {} has no metadata.name", types.kind))?;
    let kind = GroupVersionKind::try_from(&types).with_context(|| format!("bad apiVersion {:?}", types.api_version))?;
    let (resource, capabilities) =
        pinned_kind(client, &kind).await.with_context(|| format!("the server has no {} in {}", types.kind, types.api_version))?;
    let api = api(client, &resource, capabilities.scope == Scope::Namespaced, object.metadata.namespace.as_deref().unwrap_or(namespace));
    let exists = api.get_opt(&name).await.with_context(|| format!("failed to get {} {name}", resource.plural))?.is_some();
    let verb = if exists {
        let field_validation = Some(ValidationDirective::Strict);
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), field_validation, ..PatchParams::default() };
        api.patch(&name, &params, &Patch::Merge(&object)).await.with_context(|| format!("failed to patch {} {name}", resource.plural))?;
        "configured"
    } else {
        create(client, &api, &object).await.with_context(|| format!("failed to create {} {name}", resource.plural))?;
        "created"
    };
    println!("{}/{name} {verb}", resource.plural);
    Ok((api, types, name))
}

/// Creates an object; the server refuses it if it has fields that are unknown or doubled, as kubectl asks it to.
async fn create(client: &Client, api: &Api<DynamicObject>, object: &DynamicObject) -> Result<()> {
    let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
    let mut request = kube::core::Request::new(api.resource_url()).create(&params, serde_json::to_vec(object)?)?;
    // kube has this parameter for patches only.
    *request.uri_mut() = format!("{}&fieldValidation=Strict", request.uri()).parse().context("failed to extend the request's address")?;
    client.request::<DynamicObject>(request).await?;
    Ok(())
}

fn api(client: &Client, resource: &ApiResource, namespaced: bool, namespace: &str) -> Api<DynamicObject> {
    match namespaced {
        true => Api::namespaced_with(client.clone(), namespace, resource),
        false => Api::all_with(client.clone(), resource),
    }
}

async fn wait_available(api: &Api<DynamicObject>, name: &str, deadline: Instant) -> Result<()> {
    loop {
        let deployment = api.get(name).await.with_context(|| format!("failed to get deployment {name}"))?;
        let number = |path: &str| deployment.data.pointer(path).and_then(serde_json::Value::as_i64).unwrap_or(0);
        let wanted = number("/spec/replicas");
        let current = deployment.metadata.generation.unwrap_or(0) <= number("/status/observedGeneration");
        if current && number("/status/updatedReplicas") == wanted && number("/status/availableReplicas") == wanted {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "deployment {name}: {} of {wanted} replicas are available; `kubectl describe pods` says why",
                number("/status/availableReplicas")
            );
        }
        tokio::time::sleep(POLL).await;
    }
}
