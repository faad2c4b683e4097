//! Garbage collection of images: what no container uses goes, the longest unused first, when their disk fills up
//! (upstream pkg/kubelet/images/image_gc_manager.go, v1.37; images by age are not collected, as upstream's default).

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use client::Informer;
use k8s_openapi::api::core::v1::Pod;
use protocols::cri::v1 as cri;
use tokio_util::sync::CancellationToken;

use crate::apply::blocking;
use crate::events::Target;
use crate::eviction::observe_image_fs;
use crate::kubelet::Kubelet;
use crate::model::{self, labels};
use crate::node::host;
use crate::runtime;

/// How often it is looked (upstream's ImageGCPeriod).
const PERIOD: Duration = Duration::from_secs(300);
/// An image younger than this stays: a container that it was pulled for may be about to be made (upstream's
/// imageMinimumGCAge).
const AGE_MIN: Duration = Duration::from_secs(120);

/// What is remembered of images, by id.
pub type Records = HashMap<String, Record>;

/// What is remembered of an image.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// When it was first listed; `None` for one that was there when the kubelet started.
    first_seen: Option<Instant>,
    /// When a container last used it.
    last_used: Option<Instant>,
}

/// Collects until cancelled.
pub async fn run(kubelet: Arc<Kubelet>, cancel: CancellationToken) {
    let mut began = false;
    loop {
        let result = if began { collect(&kubelet).await } else { look(&kubelet, None).await.map(drop) };
        began |= result.is_ok();
        if let Err(error) = result {
            tracing::warn!(error, "image garbage collection failed");
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
}

/// Lists images and their users, and remembers. Gives those that may go, the longest unused first.
async fn look(kubelet: &Kubelet, now: Option<Instant>) -> Result<Vec<cri::Image>, String> {
    let listed = tokio::try_join!(kubelet.runtime.list_images(), kubelet.runtime.list_containers(None));
    let (images, containers) = listed.map_err(|e| runtime::go_error(&e))?;
    let mut records = kubelet.images.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(plan(&mut records, images, &containers, now))
}

/// Pure: brings the records up to date (`now` is `None` at the start), and gives unused images in the order in which they go.
fn plan(records: &mut Records, images: Vec<cri::Image>, containers: &[cri::Container], now: Option<Instant>) -> Vec<cri::Image> {
    let mut used: HashSet<&str> = HashSet::new();
    for container in containers {
        used.extend([container.image_ref.as_str(), container.image_id.as_str()]);
        used.extend(container.image.as_ref().map(|image| image.image.as_str()));
    }
    let is_used = |image: &cri::Image| {
        let names = image.repo_tags.iter().chain(&image.repo_digests);
        names.map(String::as_str).chain([image.id.as_str()]).any(|name| used.contains(name))
    };
    let present: HashSet<String> = images.iter().map(|image| image.id.clone()).collect();
    records.retain(|id, _| present.contains(id));
    let mut unused = Vec::new();
    for image in images {
        let record = records.entry(image.id.clone()).or_insert(Record { first_seen: now, last_used: None });
        if is_used(&image) {
            record.last_used = now;
        } else if !image.pinned {
            unused.push((*record, image));
        }
    }
    unused.sort_by_key(|(record, _)| (record.last_used, record.first_seen));
    let old = |record: &Record| now.is_some_and(|now| record.first_seen.is_none_or(|first| now.duration_since(first) >= AGE_MIN));
    unused.into_iter().filter(|(record, _)| old(record)).map(|(_, image)| image).collect()
}

/// Removes unused images until so many bytes are won; gives how many were.
///
/// # Errors
/// The runtime's, as text; what was removed stays removed.
pub async fn remove_unused(kubelet: &Kubelet, bytes: i64) -> Result<i64, String> {
    let mut won: i64 = 0;
    let mut failed = Vec::new();
    for image in look(kubelet, Some(Instant::now())).await? {
        if won >= bytes {
            break;
        }
        let spec = cri::ImageSpec { image: image.id.clone(), ..Default::default() };
        match kubelet.runtime.remove_image(spec).await {
            Ok(()) => won = won.saturating_add(i64::try_from(image.size).unwrap_or(i64::MAX)),
            Err(error) => failed.push(runtime::go_error(&error)),
        }
    }
    if failed.is_empty() { Ok(won) } else { Err(format!("wanted to free {bytes} bytes, but freed {won}: {}", failed.join("; "))) }
}

/// Bytes to be won, given the thresholds in percent; `None` when the disk is not full enough.
fn excess(disk: host::Disk, high: u8, low: u8) -> Option<(i64, i64)> {
    let capacity = i64::try_from(disk.capacity_bytes).ok().filter(|c| *c > 0)?;
    let available = i64::try_from(disk.available_bytes).unwrap_or(i64::MAX).min(capacity);
    let percent = 100 - i64::try_from(i128::from(available) * 100 / i128::from(capacity)).ok()?;
    let wanted = i64::try_from(i128::from(capacity) * i128::from(100 - low) / 100).ok()? - available;
    (percent >= i64::from(high)).then_some((percent, wanted))
}

async fn collect(kubelet: &Kubelet) -> Result<(), String> {
    look(kubelet, Some(Instant::now())).await?;
    let high = kubelet.config.image_gc_high_threshold;
    let Some(root) = observe_image_fs(kubelet).await.filter(|_| high < 100) else { return Ok(()) };
    let disk = blocking(move || Ok(host::disk(&root))).await?;
    let Some((percent, wanted)) = excess(disk, high, kubelet.config.image_gc_low_threshold) else { return Ok(()) };
    let won = remove_unused(kubelet, wanted).await?;
    if won < wanted {
        let text = format!(
            "Insufficient free disk space on the node's image filesystem ({percent}% of {} used). Failed to free sufficient space by deleting \
             unused images (freed {won} bytes). Investigate disk usage, as it could be used by active images, logs, volumes, or other data.",
            size(disk.capacity_bytes)
        );
        kubelet.recorder.warning(&Target::node(&kubelet.node_name), "FreeDiskSpaceFailed", text);
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss)]
fn size(bytes: u64) -> String {
    const KIB: f64 = 1024.0;
    let mut amount = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if amount < KIB {
            return if unit == "B" { format!("{bytes} B") } else { format!("{amount:.1} {unit}") };
        }
        amount /= KIB;
    }
    format!("{amount:.1} TiB")
}

/// Removes ended containers of pods that are over: their writable layers cost the same disk.
pub async fn remove_ended_containers(kubelet: &Kubelet, pods: &Informer<Pod>) {
    let over: HashSet<String> = pods
        .list()
        .iter()
        .filter(|pod| model::is_terminal_phase(pod.status.as_ref().and_then(|s| s.phase.as_deref())))
        .map(|pod| model::uid(pod).to_owned())
        .collect();
    for container in kubelet.runtime.list_containers(None).await.unwrap_or_default() {
        let of_ended = container.labels.get(labels::POD_UID).is_some_and(|uid| over.contains(uid));
        if of_ended
            && container.state == cri::ContainerState::ContainerExited as i32
            && let Err(error) = kubelet.runtime.remove_container(&container.id).await
        {
            tracing::warn!(container_id = container.id, %error, "failed to remove an ended container");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: &str) -> cri::Image {
        cri::Image { id: id.to_owned(), repo_tags: vec![format!("{id}:v1")], size: 10, ..Default::default() }
    }

    fn container(image: &str) -> cri::Container {
        cri::Container { image_ref: image.to_owned(), ..Default::default() }
    }

    #[test]
    fn the_longest_unused_goes_first_and_the_young_stay() {
        let mut records = Records::new();
        let begin = Instant::now();
        let at = |seconds| Some(begin + Duration::from_secs(seconds));
        let go = |records: &mut Records, names: &[&str], used: &[&str], now| {
            let images = names.iter().map(|name| image(name)).chain([cri::Image { pinned: true, ..image("pinned") }]).collect();
            let containers: Vec<cri::Container> = used.iter().map(|name| container(name)).collect();
            plan(records, images, &containers, now).into_iter().map(|image| image.id).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(go(&mut records, &["old", "used", "tagged"], &["used"], None), "", "nothing goes at the start");
        assert_eq!(go(&mut records, &["old", "used", "tagged"], &["used", "tagged:v1"], at(0)), "old");
        assert_eq!(go(&mut records, &["old", "used", "tagged", "new"], &["used"], at(10)), "old tagged");
        assert_eq!(go(&mut records, &["old", "used", "tagged", "new"], &[], at(130)), "old new tagged used");
        assert_eq!(go(&mut records, &["used"], &[], at(140)), "used");
        assert_eq!(records.len(), 2);
    }

    #[test]
    fn thresholds_in_percent() {
        let disk = |available_bytes| host::Disk { capacity_bytes: 1000, available_bytes, ..host::Disk::default() };
        assert_eq!(excess(disk(151), 85, 80), Some((85, 49)));
        assert_eq!(excess(disk(160), 85, 80), None);
        assert_eq!(excess(disk(0), 85, 80), Some((100, 200)));
        assert_eq!(excess(host::Disk::default(), 85, 80), None);
        assert_eq!(size(3 << 29), "1.5 GiB");
    }
}
