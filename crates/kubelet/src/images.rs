//! Making sure that an image is there: pull policies, credentials, back-off
//! (upstream pkg/kubelet/images/image_manager.go, v1.37).

use std::collections::HashMap;
use std::time::Instant;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use protocols::cri::v1 as cri;

use crate::backoff::BackOff;
use crate::credentials::Credentials;
use crate::cri::security::ImageUser;
use crate::events::{Recorder, Target};
use crate::model;
use crate::runtime::{self, Runtime};
use crate::status::Waiting;

/// An image that is there.
#[derive(Clone, Debug)]
pub struct Ready {
    /// What CreateContainer is given.
    pub image_ref: String,
    /// Who its process runs as.
    pub user: ImageUser,
}

/// Back-off of pulls of one pod, with the error of the last pull by image.
#[derive(Debug, Default)]
pub struct Pulls {
    backoff: BackOff,
    errors: HashMap<String, String>,
}

impl Pulls {
    /// When the next pull may be tried, of those that failed.
    pub fn next_try(&self, now: Timestamp) -> Option<Timestamp> {
        let until = |image: &String| self.backoff.until_since_update(image, now);
        self.errors.keys().filter_map(until).min()
    }
}

/// What a pull needs.
pub struct Context<'a> {
    /// The runtime.
    pub runtime: &'a Runtime,
    /// For Pulling, Pulled, Failed, BackOff.
    pub recorder: &'a Recorder,
    /// The pod.
    pub pod: &'a Pod,
    /// Sent along with the pull.
    pub sandbox_config: &'a cri::PodSandboxConfig,
    /// Registry credentials of the pod.
    pub credentials: &'a Credentials,
}

/// Makes sure that the container's image is there.
///
/// # Errors
/// The waiting state: InvalidImageName, ImageInspectError, ErrImageNeverPull, ErrImagePull, ImagePullBackOff.
pub async fn ensure(context: &Context<'_>, pulls: &mut Pulls, container: &Container) -> Result<Ready, Waiting> {
    let requested = container.image.as_deref().unwrap_or("");
    let target = Target::container(context.pod, container);
    let image = match with_default_tag(requested) {
        Ok(image) => image,
        Err(why) => {
            let message = format!("Failed to apply default image tag \"{requested}\": {why}");
            context.recorder.warning(&target, "InspectFailed", &message);
            return Err(waiting("InvalidImageName", message));
        }
    };
    let policy = container.image_pull_policy.as_deref().unwrap_or(default_policy(&image));
    if policy != "Always"
        && let Some(ready) = inspect(context, &target, requested, &image).await?
    {
        let message = format!("Container image \"{requested}\" already present on machine and can be accessed by the pod");
        context.recorder.normal(&target, "Pulled", message);
        return Ok(ready);
    }
    if policy == "Never" {
        let message = format!("Container image \"{requested}\" is not present with pull policy of Never");
        context.recorder.warning(&target, "ErrImageNeverPull", &message);
        return Err(waiting("ErrImageNeverPull", message));
    }
    pull(context, pulls, &target, requested, &image).await?;
    match inspect(context, &target, requested, &image).await? {
        Some(ready) => Ok(ready),
        None => Err(waiting("ImageInspectError", format!("Failed to inspect image \"{requested}\": it is gone after its pull"))),
    }
}

async fn inspect(context: &Context<'_>, target: &Target, requested: &str, image: &str) -> Result<Option<Ready>, Waiting> {
    match context.runtime.image_status(spec(context.pod, image)).await {
        Ok(Some(found)) => Ok(Some(Ready {
            image_ref: found.id,
            user: ImageUser {
                // An image without user runs as root: CRI says so with neither field set.
                uid: found.uid.map(|u| u.value).or_else(|| found.username.is_empty().then_some(0)),
                username: found.username,
            },
        })),
        Ok(None) => Ok(None),
        Err(error) => {
            let message = format!("Failed to inspect image \"{requested}\": {}", runtime::go_error(&error));
            context.recorder.warning(target, "InspectFailed", &message);
            Err(waiting("ImageInspectError", message))
        }
    }
}

async fn pull(context: &Context<'_>, pulls: &mut Pulls, target: &Target, requested: &str, image: &str) -> Result<(), Waiting> {
    if pulls.backoff.until_since_update(image, Timestamp::now()).is_some() {
        let mut message = format!("Back-off pulling image \"{requested}\"");
        context.recorder.normal(target, "BackOff", &message);
        if let Some(error) = pulls.errors.get(image) {
            message = format!("{message}: {error}");
        }
        return Err(waiting("ImagePullBackOff", message));
    }
    pulls.errors.remove(image);
    context.recorder.normal(target, "Pulling", format!("Pulling image \"{requested}\""));
    let began = Instant::now();
    let mut result = Ok(String::new());
    for auth in context.credentials.for_image(image) {
        let request =
            cri::PullImageRequest { image: Some(spec(context.pod, image)), auth, sandbox_config: Some(context.sandbox_config.clone()) };
        result = context.runtime.pull_image(model::uid(context.pod), request).await;
        if result.is_ok() {
            break;
        }
    }
    match result {
        Ok(_) => {
            pulls.backoff.reset(image);
            let took = go_milliseconds(began.elapsed());
            let size = match context.runtime.image_status(spec(context.pod, image)).await {
                Ok(Some(found)) => found.size,
                _ => 0,
            };
            let message =
                format!("Successfully pulled image \"{requested}\" in {took} ({took} including waiting). Image size: {size} bytes.");
            context.recorder.normal(target, "Pulled", message);
            Ok(())
        }
        Err(error) => {
            let text = runtime::go_error(&error);
            let message = format!("Failed to pull image \"{requested}\": {text}");
            context.recorder.warning(target, "Failed", message);
            pulls.backoff.next(image, Timestamp::now(), Timestamp::now());
            let (reason, text) = pull_reason(requested, &error, text);
            pulls.errors.insert(image.to_owned(), format!("{reason}: {text}"));
            Err(waiting(reason, text))
        }
    }
}

/// Some texts of the runtime become the reason (reference/seams/kubelet-cri.md, section 7).
fn pull_reason(requested: &str, error: &runtime::Error, text: String) -> (&'static str, String) {
    let own = runtime::message(error);
    if own.starts_with("RegistryUnavailable") {
        let message = format!("image pull failed for {requested} because the registry is unavailable");
        return ("RegistryUnavailable", with_detail(message, &own, "RegistryUnavailable"));
    }
    if own.starts_with("SignatureValidationFailed") {
        let message = format!("image pull failed for {requested} because the signature validation failed");
        return ("SignatureValidationFailed", with_detail(message, &own, "SignatureValidationFailed"));
    }
    ("ErrImagePull", text)
}

fn with_detail(message: String, own: &str, prefix: &str) -> String {
    match own.strip_prefix(prefix).map(|d| d.trim_start_matches(": ")) {
        Some(detail) if !detail.is_empty() => format!("{message}: {detail}"),
        _ => message,
    }
}

fn spec(pod: &Pod, image: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.to_owned(),
        annotations: pod.metadata.annotations.clone().unwrap_or_default().into_iter().collect(),
        ..Default::default()
    }
}

fn waiting(reason: &str, message: String) -> Waiting {
    Waiting { reason: reason.to_owned(), message }
}

/// The image's name with `:latest` when it has neither tag nor digest; an error when it cannot be a name.
pub fn with_default_tag(image: &str) -> Result<String, String> {
    let invalid = |why: &str| Err(format!("couldn't parse image name \"{image}\": {why}"));
    let (rest, digest) = match image.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (image, None),
    };
    let (name, tag) = match rest.rfind(':').filter(|at| !rest[*at..].contains('/')) {
        Some(at) => (&rest[..at], Some(&rest[at + 1..])),
        None => (rest, None),
    };
    let path = match name.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => path,
        _ => name,
    };
    if path.chars().any(|c| c.is_ascii_uppercase()) {
        return invalid("invalid reference format: repository name must be lowercase");
    }
    let part_ok = |part: &str| {
        !part.is_empty()
            && part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.ends_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    let tag_ok = |t: &str| {
        (1..=128).contains(&t.len())
            && !t.starts_with(['.', '-'])
            && t.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    let digest_ok = |d: &str| {
        d.split_once(':')
            .is_some_and(|(algorithm, hex)| !algorithm.is_empty() && hex.len() >= 32 && hex.chars().all(|c| c.is_ascii_hexdigit()))
    };
    if !path.split('/').all(part_ok) || !tag.is_none_or(tag_ok) || !digest.is_none_or(digest_ok) {
        return invalid("invalid reference format");
    }
    if tag.is_none() && digest.is_none() {
        return Ok(format!("{image}:latest"));
    }
    Ok(image.to_owned())
}

fn default_policy(image: &str) -> &'static str {
    if image.ends_with(":latest") { "Always" } else { "IfNotPresent" }
}

/// A duration in whole milliseconds as Go prints it.
fn go_milliseconds(duration: std::time::Duration) -> String {
    let ms = duration.as_millis();
    if ms < 1000 {
        return format!("{ms}ms");
    }
    let fraction = format!("{:03}", ms % 1000);
    let fraction = fraction.trim_end_matches('0');
    let dot = if fraction.is_empty() { "" } else { "." };
    let (minutes, seconds) = (ms / 60_000, ms / 1000 % 60);
    if minutes == 0 { format!("{seconds}{dot}{fraction}s") } else { format!("{minutes}m{seconds}{dot}{fraction}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_or_refused() {
        for (name, expected) in [
            ("busybox", Some("busybox:latest")),
            ("localhost:5000/a/b", Some("localhost:5000/a/b:latest")),
            ("localhost:5000/a:1.2", Some("localhost:5000/a:1.2")),
            ("FOO", None),
            ("", None),
            ("a b", None),
            ("a:", None),
            ("a@sha256:00", None),
        ] {
            assert_eq!(with_default_tag(name).ok().as_deref(), expected, "{name}");
        }
    }
}
