//! A server of its own for tests: keys, certificates and kubeconfigs in a directory, a free port on loopback.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use apiserver::Config;
use clap::Parser;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    config: Config,
}

/// Certificate authority and files of a test server.
pub struct Pki {
    pub dir: PathBuf,
    pub port: u16,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    /// Makes all keys and certificates in `dir`.
    pub fn new(dir: &Path) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("authority");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let pki = Self { dir: dir.to_owned(), port, authority };
        pki.write("ca.crt", &pki.authority.pem());
        pki.issue("server", "kube-apiserver", &[], &["localhost", "127.0.0.1"]);
        let key = KeyPair::generate().expect("key");
        pki.write("sa.key", &key.serialize_pem());
        pki.write("sa.pub", &key.public_key_pem());
        pki
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.join(name), text).expect("a writable directory");
    }

    /// Issues `NAME.crt` and `NAME.key`.
    pub fn issue(&self, file: &str, user: &str, groups: &[&str], names: &[&str]) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, user);
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().expect("key");
        let certificate = params.signed_by(&key, &self.authority).expect("signed");
        self.write(&format!("{file}.crt"), &certificate.pem());
        self.write(&format!("{file}.key"), &key.serialize_pem());
    }

    /// Issues a client certificate that is changed before it is signed, by this authority or by another one of the same name.
    pub fn issue_changed(&self, file: &str, user: &str, ours: bool, change: impl FnOnce(&mut CertificateParams)) {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, user);
        params.distinguished_name.push(DnType::OrganizationName, "coracle:cluster-admins");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().expect("key");
        let certificate = if ours {
            params.signed_by(&key, &self.authority)
        } else {
            let mut other = CertificateParams::default();
            other.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            other.distinguished_name.push(DnType::CommonName, "test");
            params.signed_by(&key, &CertifiedIssuer::self_signed(other, KeyPair::generate().expect("key")).expect("authority"))
        };
        self.write(&format!("{file}.crt"), &certificate.expect("signed").pem());
        self.write(&format!("{file}.key"), &key.serialize_pem());
    }

    /// A kubeconfig `NAME.kubeconfig` with a client certificate of its own.
    pub fn kubeconfig(&self, file: &str, user: &str, groups: &[&str]) -> PathBuf {
        self.issue(file, user, groups, &[]);
        let dir = self.dir.display();
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             clusters: [{{name: c, cluster: {{server: \"https://127.0.0.1:{port}\", certificate-authority: {dir}/ca.crt}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             users: [{{name: u, user: {{client-certificate: {dir}/{file}.crt, client-key: {dir}/{file}.key}}}}]\n",
            port = self.port
        );
        self.write(&format!("{file}.kubeconfig"), &text);
        self.dir.join(format!("{file}.kubeconfig"))
    }

    /// The server's configuration, as its command line would give it.
    pub fn config(&self) -> Config {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let arguments = [
            "apiserver".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", self.port),
            format!("--tls-cert-file={}", file("server.crt")),
            format!("--tls-private-key-file={}", file("server.key")),
            format!("--client-ca-file={}", file("ca.crt")),
            format!("--service-account-key-file={}", file("sa.pub")),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            format!("--data-dir={}", file("store")),
        ];
        Flags::try_parse_from(arguments).map(|flags| flags.config).expect("flags of this crate")
    }
}
