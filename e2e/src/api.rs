//! A client of the cluster's API server: one `curl` per request, so that it needs no kubectl and every answer is known exactly.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How long one request may take, in seconds.
const REQUEST_SECONDS: u32 = 20;
/// The same for a long answer on a machine that has other work as well.
const PATIENT_SECONDS: u32 = 120;
/// How long a state may be waited for.
const EVENTUALLY: Duration = Duration::from_secs(120);
/// The pods of the tests.
const PODS: &str = "/api/v1/namespaces/default/pods";

/// What a client proves its identity by.
#[derive(Clone, Debug)]
pub enum Credential {
    /// Nothing.
    None,
    /// A client certificate and its key, both PEM.
    Certificate(PathBuf, PathBuf),
    /// A bearer token.
    Token(String),
}

/// A client with the admin's identity, of the API server. A copy may be used by another thread.
#[derive(Clone, Debug)]
pub struct Api {
    /// A process in the cluster's network namespace.
    holder: u32,
    pki: PathBuf,
    credential: Credential,
    base: String,
    request_seconds: u32,
}

impl Api {
    /// A client of the server whose keys are in `data`, from the network namespace of `holder`.
    pub(crate) fn new(holder: u32, data: &Path) -> Api {
        let pki = data.join("pki");
        let credential = Credential::Certificate(pki.join("admin.crt"), pki.join("admin.key"));
        Api { holder, pki, credential, base: "https://127.0.0.1:6443".to_owned(), request_seconds: REQUEST_SECONDS }
    }

    /// The same client with another identity.
    pub fn with(&self, credential: Credential) -> Api {
        Api { credential, ..self.clone() }
    }

    /// The same client with the certificate of a component: `kubelet`, `kube-scheduler`, and so on.
    pub fn as_component(&self, name: &str) -> Api {
        self.with(Credential::Certificate(self.pki.join(format!("{name}.crt")), self.pki.join(format!("{name}.key"))))
    }

    /// The same client towards another server of the cluster, e.g. `https://127.0.0.1:10250`.
    pub fn at(&self, base: &str) -> Api {
        Api { base: base.to_owned(), ..self.clone() }
    }

    /// The same client for long answers.
    pub fn patient(&self) -> Api {
        Api { request_seconds: PATIENT_SECONDS, ..self.clone() }
    }

    /// Asks once: the status and the body. An error means that no answer came, so what became of a write is not known.
    pub fn ask(&self, method: &str, path: &str, content_type: &str, body: &str) -> Result<(u16, String)> {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.holder.to_string(), "--", "curl", "--silent", "--show-error"]);
        command.args([
            "--max-time",
            &self.request_seconds.to_string(),
            "--path-as-is",
            "--write-out",
            "\n%{http_code}",
            "--request",
            method,
        ]);
        command.arg("--cacert").arg(self.pki.join("ca.crt"));
        match &self.credential {
            Credential::None => {}
            Credential::Certificate(certificate, key) => drop(command.arg("--cert").arg(certificate).arg("--key").arg(key)),
            Credential::Token(token) => drop(command.args(["--header", &format!("Authorization: Bearer {token}")])),
        }
        if !body.is_empty() {
            command.args(["--header", &format!("Content-Type: {content_type}"), "--data-binary", body]);
        }
        let output =
            command.args(["--globoff", &format!("{}{path}", self.base)]).stdin(Stdio::null()).output().context("failed to run curl")?;
        if !output.status.success() {
            bail!("{method} {path}: curl ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        let text = String::from_utf8(output.stdout).with_context(|| format!("{method} {path}: the answer is not UTF-8"))?;
        let (body, status) = text.rsplit_once('\n').with_context(|| format!("{method} {path}: curl told no status"))?;
        Ok((status.parse().with_context(|| format!("{method} {path}: bad status {status:?}"))?, body.to_owned()))
    }

    /// What a GET gives; another status than 200 is an error.
    pub fn get(&self, path: &str) -> Result<String> {
        match self.ask("GET", path, "", "")? {
            (200, body) => Ok(body),
            (status, body) => bail!("GET {path}: {status}: {body}"),
        }
    }

    /// The object at a path.
    pub fn object(&self, path: &str) -> Result<Value> {
        serde_json::from_str(&self.get(path)?).with_context(|| format!("GET {path}: bad JSON"))
    }

    /// A pod.
    pub fn pod(&self, name: &str) -> Result<Value> {
        self.object(&format!("{PODS}/{name}"))
    }

    /// Creates a pod.
    pub fn create_pod(&self, pod: &Value) -> Result<()> {
        match self.ask("POST", PODS, "application/json", &pod.to_string())? {
            (201, _) => Ok(()),
            (status, body) => bail!("POST {PODS}: {status}: {body}"),
        }
    }

    /// Deletes a pod without grace and waits until it is gone.
    pub fn delete_pod(&self, name: &str) -> Result<()> {
        let path = format!("{PODS}/{name}");
        match self.ask("DELETE", &format!("{path}?gracePeriodSeconds=1"), "", "")? {
            (200 | 202, _) => eventually(&format!("pod {name} is gone"), || Ok(self.ask("GET", &path, "", "")?.0 == 404)),
            (status, body) => bail!("DELETE {path}: {status}: {body}"),
        }
    }

    /// Waits until a pod is Ready.
    pub fn wait_ready(&self, name: &str) -> Result<Value> {
        let mut last = Value::Null;
        let waited = eventually(&format!("pod {name} is Ready"), || {
            last = self.pod(name)?;
            let conditions = last.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
            Ok(conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True"))
        });
        waited.with_context(|| format!("status of pod {name}: {}", last["status"]))?;
        Ok(last)
    }

    /// The log of a pod's only container.
    pub fn log(&self, pod: &str) -> Result<String> {
        let path = format!("{PODS}/{pod}/log");
        match self.ask("GET", &path, "", "")? {
            (200, body) => Ok(body),
            (status, body) => bail!("GET {path}: {status}: {body}"),
        }
    }

    /// Reasons and messages of the events of a pod, a line each.
    pub fn events(&self, pod: &str) -> Result<String> {
        let list = self.object(&format!("/api/v1/namespaces/default/events?fieldSelector=involvedObject.name={pod}"))?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let lines = items.iter().map(|event| {
            let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
            format!("{} {}: {}", text("type"), text("reason"), text("message"))
        });
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }
}

/// Waits until `condition` holds; its errors end the wait.
pub fn eventually(what: &str, condition: impl FnMut() -> Result<bool>) -> Result<()> {
    eventually_within(EVENTUALLY, what, condition)
}

/// As [`eventually`], for a wait of another length.
pub fn eventually_within(time: Duration, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    testkit::poll::until_within(time, what, || condition().with_context(|| format!("while waiting until {what}")))
}
