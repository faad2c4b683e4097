//! Pulling: manifest, configuration, then all layers at once, each committed as soon as those below it are.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::try_join_all;
use http_body_util::BodyExt;
use tokio::sync::{mpsc, watch};

use crate::disk::{ImageRecord, VERSION};
use crate::error::Error;
use crate::layer::{self, ChannelReader, Expected, Staged};
use crate::media::{self, Descriptor, Manifest};
use crate::reference::{Digest, Reference};
use crate::registry::Repository;
use crate::store::{Shared, join};
use crate::types::{Auth, Progress, Stage};
use crate::unpack::Limits;

const INDEX_DEPTH_MAX: usize = 3;
/// Packets between the network and the thread that unpacks.
const CHANNEL_PACKETS_MAX: usize = 32;

/// One layer of the image being pulled.
struct Layer {
    descriptor: Descriptor,
    diff_id: Digest,
    chain: String,
}

/// Pulls `reference` and returns the id of the image.
pub(crate) async fn pull(shared: &Arc<Shared>, reference: &Reference, auth: Option<Auth>) -> Result<String, Error> {
    let repository = Repository::new(&shared.transport, &shared.options, reference, auth)?;
    let name = reference.to_string();
    let platform = &shared.options.platform;
    let top = repository.manifest(reference.manifest()).await?;
    let top_digest = top.digest.clone();
    let mut document = top;
    let mut documents_bytes = 0;
    let mut found = None;
    for _ in 0..INDEX_DEPTH_MAX {
        documents_bytes += document.bytes.len() as u64;
        match media::parse_manifest(&document.bytes, platform, &name)? {
            Manifest::Index(descriptor) => document = repository.manifest(descriptor.digest.as_str()).await?,
            Manifest::Image { config, layers } => {
                found = Some((config, layers));
                break;
            }
        }
    }
    let (config, descriptors) =
        found.ok_or_else(|| Error::Unusable { object: name.clone(), why: "its indexes are nested too deep".into() })?;
    let config_bytes = repository.small_blob(&config.digest).await?;
    let parsed = media::parse_config(&config_bytes, platform, &name)?;
    if parsed.diff_ids.len() != descriptors.len() {
        let why = format!("it has {} layers and {} diff ids", descriptors.len(), parsed.diff_ids.len());
        return Err(Error::Unusable { object: name, why });
    }
    let chains = media::chain_ids(&parsed.diff_ids);
    let own_bytes = documents_bytes + config_bytes.len() as u64;
    let size_bytes = descriptors.iter().fold(own_bytes, |sum, d| sum.saturating_add(d.size));
    let layers: Vec<Layer> = descriptors
        .into_iter()
        .zip(parsed.diff_ids)
        .zip(&chains)
        .map(|((descriptor, diff_id), chain)| Layer { descriptor, diff_id, chain: chain.to_string() })
        .collect();
    let chains: Vec<String> = layers.iter().map(|l| l.chain.clone()).collect();
    // From here on no garbage collection may take what this pull has found or made.
    let pins = shared.pin(&chains);
    fetch_layers(shared, &repository, &name, &layers).await?;
    let record = ImageRecord {
        version: VERSION,
        id: config.digest.to_string(),
        tags: reference.tagged().into_iter().collect(),
        digests: vec![format!("{}@{top_digest}", reference.name())],
        size_bytes,
        config: String::from_utf8_lossy(&config_bytes).into_owned(),
        layers: chains,
    };
    let id = shared.clone().put_image(record, pins).await?;
    shared.report(|| Progress {
        reference: name,
        layer: String::new(),
        bytes_done: size_bytes,
        bytes_total: size_bytes,
        stage: Stage::Done,
    });
    Ok(id)
}

async fn fetch_layers(shared: &Arc<Shared>, repository: &Repository<'_>, name: &str, layers: &[Layer]) -> Result<(), Error> {
    // Each layer tells the one above when it is committed. They wait in one direction only, so nothing can lock up.
    let mut below = watch::channel(true).1;
    let mut tasks = Vec::new();
    for (n, layer) in layers.iter().enumerate() {
        let (committed, next) = watch::channel(false);
        let wait = std::mem::replace(&mut below, next);
        tasks.push(async move {
            fetch_layer(shared, repository, name, layers, n, wait).await?;
            shared.report(|| progress(name, layer, layer.descriptor.size, Stage::Committed));
            committed.send_replace(true);
            Ok(())
        });
    }
    try_join_all(tasks).await.map(|_: Vec<()>| ())
}

fn progress(name: &str, layer: &Layer, bytes_done: u64, stage: Stage) -> Progress {
    let digest = layer.descriptor.digest.to_string();
    Progress { reference: name.to_owned(), layer: digest, bytes_done, bytes_total: layer.descriptor.size, stage }
}

async fn fetch_layer(
    shared: &Arc<Shared>,
    repository: &Repository<'_>,
    name: &str,
    layers: &[Layer],
    n: usize,
    mut below: watch::Receiver<bool>,
) -> Result<(), Error> {
    let layer = &layers[n];
    // Whoever else pulls this chain now waits here, and then finds it.
    let in_flight = shared.in_flight(&layer.chain);
    let _only = in_flight.lock().await;
    if shared.has_layer(&layer.chain) {
        return Ok(());
    }
    let staged = {
        let _permit = shared.parallel.acquire().await.map_err(|_| Error::Task { what: "layer limit" })?;
        download(shared, repository, name, layer).await?
    };
    below.wait_for(|committed| *committed).await.map_err(|_| Error::Task { what: "layer below" })?;
    let chains: Vec<String> = layers[..n].iter().map(|l| l.chain.clone()).collect();
    shared.clone().commit(staged, chains, layer.chain.clone(), layer.diff_id.to_string()).await
}

/// Fetches and unpacks at the same time. A broken transfer goes on where it stopped.
async fn download(shared: &Arc<Shared>, repository: &Repository<'_>, name: &str, layer: &Layer) -> Result<Staged, Error> {
    let (sender, receiver) = mpsc::channel(CHANNEL_PACKETS_MAX);
    let options = &shared.options;
    let expected = Expected {
        packed: Some(layer.descriptor.digest.clone()),
        diff_id: layer.diff_id.clone(),
        limits: Limits { bytes: options.unpacked_bytes_max, entries: options.entries_max },
    };
    let (disk, number) = (shared.disk.clone(), shared.next_number());
    let unpacking = tokio::task::spawn_blocking(move || layer::stage(&disk, number, ChannelReader::new(receiver), &expected));
    let fed = feed(shared, repository, name, layer, sender).await;
    // If the transfer failed, the unpacker has failed with it; the transfer's error is the cause.
    let staged = join(unpacking, "unpacking").await;
    fed?;
    staged?
}

async fn feed(
    shared: &Arc<Shared>,
    repository: &Repository<'_>,
    name: &str,
    layer: &Layer,
    sender: mpsc::Sender<Bytes>,
) -> Result<(), Error> {
    let size = layer.descriptor.size;
    let object = format!("layer {} of {}", layer.descriptor.digest, name);
    let (mut received, mut tries, mut pause) = (0, 0, shared.options.retry_pause);
    loop {
        let before = received;
        let attempt = transfer(shared, repository, name, layer, &sender, &mut received).await;
        let why = match attempt {
            Ok(Transfer::Refused) => return Ok(()),
            Ok(Transfer::Ended) if received == size => return Ok(()),
            Ok(Transfer::Ended) if received > size => {
                return Err(Error::BadAnswer { object, why: format!("it is longer than {size} bytes") });
            }
            Ok(Transfer::Ended) => format!("it ends after {received} of {size} bytes"),
            Ok(Transfer::Broken(why)) | Err(Error::Unavailable { why, .. }) => why,
            Err(e) => return Err(e),
        };
        if received > before {
            (tries, pause) = (0, shared.options.retry_pause);
        }
        if tries >= shared.options.retries_max {
            return Err(Error::Unavailable { object, why });
        }
        tracing::debug!(%object, %why, received, "transfer broke; it goes on where it stopped");
        tokio::time::sleep(pause).await;
        (tries, pause) = (tries + 1, pause * 2);
    }
}

enum Transfer {
    /// The body ended.
    Ended,
    /// The connection broke or stalled.
    Broken(String),
    /// The unpacker wants no more: it has found an error.
    Refused,
}

async fn transfer(
    shared: &Arc<Shared>,
    repository: &Repository<'_>,
    name: &str,
    layer: &Layer,
    sender: &mpsc::Sender<Bytes>,
    received: &mut u64,
) -> Result<Transfer, Error> {
    let arriving = repository.blob(&layer.descriptor.digest, *received).await?;
    let mut skip = *received - arriving.start;
    let mut body = arriving.body;
    loop {
        let frame = match tokio::time::timeout(repository.stall_timeout(), body.frame()).await {
            Err(_) => return Ok(Transfer::Broken("nothing arrives any more".into())),
            Ok(None) => return Ok(Transfer::Ended),
            Ok(Some(Err(e))) => return Ok(Transfer::Broken(e.to_string())),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(mut data) = frame.into_data() else { continue };
        let known = usize::try_from(skip).unwrap_or(usize::MAX).min(data.len());
        skip -= known as u64;
        let fresh = data.split_off(known);
        if fresh.is_empty() {
            continue;
        }
        *received += fresh.len() as u64;
        if *received > layer.descriptor.size {
            return Ok(Transfer::Ended);
        }
        shared.report(|| progress(name, layer, *received, Stage::Fetching));
        if sender.send(fresh).await.is_err() {
            return Ok(Transfer::Refused);
        }
    }
}
