//! Mutated kubeconfigs: a configuration or an error that names the file.

use testkit::fuzz::Fuzz;

const KUBECONFIG: &str = "apiVersion: v1
kind: Config
current-context: coracle
clusters:
- name: coracle
  cluster: {server: 'https://127.0.0.1:6443', certificate-authority-data: LS0tLS1CRUdJTg==, tls-server-name: x}
users:
- name: admin
  user: {token: abc, client-certificate-data: LS0tLS0=, client-key-data: LS0tLS0=}
contexts:
- name: coracle
  context: {cluster: coracle, user: admin, namespace: default}
preferences: {}
";

const PROXIED: &str = "{\"apiVersion\":\"v1\",\"kind\":\"Config\",\"current-context\":\"a\",\"clusters\":[{\"name\":\"a\",\"cluster\":\
{\"server\":\"http://[::1]:80/prefix\",\"proxy-url\":\"http://p:1\",\"insecure-skip-tls-verify\":true}}],\"users\":[{\"name\":\"a\",\"user\":\
{\"username\":\"u\",\"password\":\"p\",\"as\":\"x\"}}],\"contexts\":[{\"name\":\"a\",\"context\":{\"cluster\":\"a\",\"user\":\"a\"}}]}";

#[test]
fn kubeconfigs() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let words = ["server: ", "https://", "certificate-authority-data: ", "LS0t", "-----BEGIN CERTIFICATE-----", "current-context: "];
    Fuzz::new("kubeconfig").seed(KUBECONFIG).seed(PROXIED).words(&words).runs(1000).run(|input| {
        std::fs::write(file.path(), input).expect("written");
        if let Err(error) = runtime.block_on(client::load_config(file.path(), "fuzz")) {
            assert!(error.to_string().contains(&file.path().display().to_string()), "{error}");
        }
    });
}
