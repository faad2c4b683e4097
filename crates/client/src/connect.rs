//! From a kubeconfig to a [`kube::Client`].

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};

use http::header::{AUTHORIZATION, USER_AGENT};
use http::{HeaderValue, Request};
use kube::client::ClientBuilder;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tower::{Layer, Service};

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be read or does not make sense.
    #[error("failed to load kubeconfig {path}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<KubeconfigError>,
    },
    /// The user agent or token is no HTTP header value.
    #[error("{what} cannot be sent as an HTTP header")]
    Header {
        /// Which.
        what: &'static str,
    },
    /// The TLS stack refuses the configuration.
    #[error("failed to make a client for {server}")]
    Client {
        /// The server's URL.
        server: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
}

/// Reads the current context of a kubeconfig; `user_agent` is what the server's logs will say.
///
/// # Errors
/// [`ConnectError::Kubeconfig`] and [`ConnectError::Header`].
pub async fn load_config(path: &Path, user_agent: &str) -> Result<Config, ConnectError> {
    let failed = |source| ConnectError::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
    let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)?;
    let agent = HeaderValue::from_str(user_agent).map_err(|_| ConnectError::Header { what: "the user agent" })?;
    config.headers.push((USER_AGENT, agent));
    Ok(config)
}

/// A client of a configuration, with the identity that it names.
///
/// # Errors
/// [`ConnectError::Client`].
pub fn connect_with_config(config: Config) -> Result<Client, ConnectError> {
    let server = config.cluster_url.to_string();
    Client::try_from(config).map_err(|source| ConnectError::Client { server, source: Box::new(source) })
}

/// A client of a kubeconfig's current context.
///
/// # Errors
/// As [`load_config`] and [`connect_with_config`].
pub async fn connect(path: &Path, user_agent: &str) -> Result<Client, ConnectError> {
    connect_with_config(load_config(path, user_agent).await?)
}

/// A bearer token that may be exchanged while clients use it.
#[derive(Debug, Clone, Default)]
pub struct Token(Arc<RwLock<Option<HeaderValue>>>);

impl Token {
    /// Sets the token for all later requests.
    ///
    /// # Errors
    /// [`ConnectError::Header`] when it is no header value.
    pub fn set(&self, token: &str) -> Result<(), ConnectError> {
        let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| ConnectError::Header { what: "the token" })?;
        value.set_sensitive(true);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(value);
        Ok(())
    }
}

/// A client that names itself by `token` alone: whatever identity `config` has is left out.
///
/// # Errors
/// [`ConnectError::Client`].
pub fn connect_with_token(mut config: Config, token: Token) -> Result<Client, ConnectError> {
    let server = config.cluster_url.to_string();
    config.auth_info = AuthInfo::default();
    let builder = ClientBuilder::try_from(config).map_err(|source| ConnectError::Client { server, source: Box::new(source) })?;
    Ok(builder.with_layer(&TokenLayer(token)).build())
}

struct TokenLayer(Token);

struct TokenService<S> {
    inner: S,
    token: Token,
}

impl<S> Layer<S> for TokenLayer {
    type Service = TokenService<S>;

    fn layer(&self, inner: S) -> TokenService<S> {
        TokenService { inner, token: self.0.clone() }
    }
}

impl<S: Service<Request<B>>, B> Service<Request<B>> for TokenService<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> S::Future {
        if let Some(value) = self.token.0.read().unwrap_or_else(PoisonError::into_inner).clone() {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        self.inner.call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_kubeconfig_that_is_not_there_is_named() {
        let error = connect(Path::new("/nowhere/kubeconfig"), "test").await.err().expect("an error");
        assert!(error.to_string().contains("/nowhere/kubeconfig"), "{error}");
    }

    #[test]
    fn a_token_with_a_line_break_is_refused() {
        assert!(matches!(Token::default().set("a\nb"), Err(ConnectError::Header { .. })));
    }
}
