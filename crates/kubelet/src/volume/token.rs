//! Service account tokens of projected volumes: asked for by TokenRequest, renewed at 80 % of their life
//! (upstream pkg/kubelet/token, v1.37).

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::Api;
use kube::api::PostParams;

use crate::model;

/// A token is renewed at the latest this long after it was made, in seconds (upstream `maxTTL`: 24 h).
const AGE_SECONDS_MAX: i64 = 24 * 3600;

#[derive(Clone, Debug)]
struct Token {
    text: String,
    made_at: Timestamp,
    renew_at: Timestamp,
    expires_at: Timestamp,
}

impl Token {
    /// When it is to be exchanged: at once if the clock was put back behind its making, for then nobody takes it yet.
    fn due(&self, now: Timestamp) -> Timestamp {
        if now < self.made_at { now } else { self.renew_at }
    }
}

/// The tokens of one pod by (volume, position in its sources).
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    tokens: HashMap<(String, usize), Token>,
    errors: HashMap<(String, usize), String>,
}

impl Tokens {
    /// The token; the error is what the last request met.
    pub fn get(&self, volume: &str, index: usize) -> Result<&str, String> {
        let key = (volume.to_owned(), index);
        match (self.tokens.get(&key), self.errors.get(&key)) {
            (Some(token), _) => Ok(&token.text),
            (None, Some(error)) => Err(format!("failed to fetch token: {error}")),
            (None, None) => Err("failed to fetch token: it was not asked for".to_owned()),
        }
    }

    /// When the next token is due.
    pub fn next_renewal(&self, now: Timestamp) -> Option<Timestamp> {
        self.tokens.values().map(|t| t.due(now)).min()
    }

    /// Asks for the tokens that are missing or due. One that cannot be renewed is kept until it expires.
    pub async fn refresh(&mut self, client: &kube::Client, pod: &Pod, now: Timestamp) {
        let spec = pod.spec.as_ref();
        let account = spec.and_then(|s| s.service_account_name.as_deref()).unwrap_or("default");
        for volume in spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
            let sources = volume.projected.iter().flat_map(|p| p.sources.iter().flatten());
            for (index, source) in sources.enumerate() {
                let Some(wanted) = &source.service_account_token else {
                    continue;
                };
                let key = (volume.name.clone(), index);
                if self.tokens.get(&key).is_some_and(|t| now < t.due(now)) {
                    continue;
                }
                let seconds = wanted.expiration_seconds.unwrap_or(3600);
                match request(client, pod, account, wanted.audience.as_deref(), seconds).await {
                    Ok(token) => {
                        self.errors.remove(&key);
                        self.tokens.insert(key, token);
                    }
                    Err(error) => {
                        if self.tokens.get(&key).is_some_and(|t| t.expires_at <= now) {
                            self.tokens.remove(&key);
                        }
                        self.errors.insert(key, error.to_string());
                    }
                }
            }
        }
    }
}

async fn request(client: &kube::Client, pod: &Pod, account: &str, audience: Option<&str>, seconds: i64) -> Result<Token, kube::Error> {
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), model::namespace(pod));
    let audiences: Vec<String> = audience.filter(|a| !a.is_empty()).map(str::to_owned).into_iter().collect();
    let asked = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: (!audiences.is_empty()).then_some(audiences),
            expiration_seconds: Some(seconds),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: Some(model::name(pod).to_owned()),
                uid: Some(model::uid(pod).to_owned()),
            }),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let now = Timestamp::now();
    let answer = api.create_token_request(account, &PostParams::default(), &asked).await?;
    let status = answer.status.unwrap_or_default();
    let expires_at = status.expiration_timestamp.map_or(now, |t| t.0);
    let life = expires_at.duration_since(now).as_secs().max(0);
    let renew_in = (life * 8 / 10).min(AGE_SECONDS_MAX);
    let renew_at = Timestamp::from_second(now.as_second() + renew_in).unwrap_or(expires_at);
    Ok(Token { text: status.token.unwrap_or_default(), made_at: now, renew_at, expires_at })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_due_late_in_its_life_and_when_the_clock_goes_back() {
        let at = |second| Timestamp::from_second(second).expect("small seconds are valid");
        let token = Token { text: String::new(), made_at: at(1000), renew_at: at(1080), expires_at: at(1100) };
        for (now, due) in [(1000, 1080), (1090, 1080), (999, 999)] {
            assert_eq!(token.due(at(now)), at(due));
        }
    }
}
