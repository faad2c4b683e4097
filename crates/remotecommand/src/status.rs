//! The one message of the error channel: how the command ended.

use serde::{Deserialize, Serialize};

/// A `metav1.Status` as the v4 and v5 protocols carry it (kubernetes `k8s.io/streaming/pkg/remotecommand`, v0.37).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    #[serde(default)]
    metadata: Empty,
    status: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    message: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Empty {}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Cause {
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
}

impl Status {
    /// The status of a command that ended with `code` (0 to 255).
    pub fn exited(code: i32) -> Self {
        if code == 0 {
            return Status {
                metadata: Empty {},
                status: "Success".into(),
                message: String::new(),
                reason: String::new(),
                details: None,
                code: None,
            };
        }
        Status {
            metadata: Empty {},
            status: "Failure".into(),
            message: format!("command terminated with non-zero exit code: exit status {code}"),
            reason: "NonZeroExitCode".into(),
            details: Some(Details { causes: vec![Cause { reason: "ExitCode".into(), message: code.to_string() }] }),
            code: None,
        }
    }

    /// The status of a command that could not be run or whose end is not known; `message` is shown to the user.
    pub fn failed(message: impl Into<String>) -> Self {
        Status {
            metadata: Empty {},
            status: "Failure".into(),
            message: message.into(),
            reason: "InternalError".into(),
            details: None,
            code: Some(500),
        }
    }

    /// The exit code, where the status tells one.
    pub fn exit_code(&self) -> Option<i32> {
        if self.status == "Success" {
            return Some(0);
        }
        let causes = &self.details.as_ref()?.causes;
        causes.iter().find(|cause| cause.reason == "ExitCode")?.message.parse().ok()
    }

    /// The text for the user; empty on success.
    pub fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_else(|_| br#"{"metadata":{},"status":"Failure"}"#.to_vec())
    }

    /// Reads the error channel's bytes. What is no `Status` (an older peer's plain text) becomes a failure with that text.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).unwrap_or_else(|_| Status::failed(String::from_utf8_lossy(bytes).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_survive_the_wire() {
        for code in [0, 1, 3, 137, 255] {
            assert_eq!(Status::from_bytes(&Status::exited(code).to_json()).exit_code(), Some(code));
        }
        let status = Status::from_bytes(b"boom");
        assert_eq!((status.exit_code(), status.message()), (None, "boom"));
    }
}
