//! The cluster's keys and certificates: one authority, a certificate per component, none in `system:masters`.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use base64::Engine;
use camino::Utf8Path;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::settings::{Settings, write_file};

/// How long certificates are valid, in days; they are renewed at the first start in their last third.
const CERTIFICATE_DAYS: i64 = 365;
/// How long the authority is valid, in days.
const AUTHORITY_DAYS: i64 = 3650;

/// The group of the admin's certificate; the API server binds it to `cluster-admin`.
const ADMIN_GROUP: &str = "coracle:cluster-admins";

/// A certificate that the cluster needs: file name, subject, and what it is for.
struct Wanted {
    file: &'static str,
    common_name: String,
    organization: Option<&'static str>,
    names: Vec<String>,
    addresses: Vec<IpAddr>,
}

/// Makes what is missing, renews what is old or has other names than wanted, and writes the kubeconfigs.
pub fn ensure(settings: &Settings) -> Result<()> {
    let authority = ensure_authority(settings)?;
    ensure_service_account_key(settings)?;
    for wanted in wanted(settings)? {
        ensure_certificate(settings, &authority, &wanted)?;
    }
    let server = format!("https://{}", SocketAddr::new(settings.reachable_address(), settings.secure_port));
    write_kubeconfig(settings, &settings.admin_kubeconfig(), &server, "kubernetes-admin", "admin")?;
    for component in ["kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"] {
        write_kubeconfig(settings, &settings.kubeconfig(component), &server, component, component)?;
    }
    Ok(())
}

fn wanted(settings: &Settings) -> Result<Vec<Wanted>> {
    let node = settings.node()?;
    let address = settings.node_address()?;
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let client = |file, common_name: &str, organization| Wanted {
        file,
        common_name: common_name.to_owned(),
        organization,
        names: Vec::new(),
        addresses: Vec::new(),
    };
    let dns = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];
    let mut api_names: Vec<String> = dns.map(str::to_owned).to_vec();
    api_names.push(node.clone());
    Ok(vec![
        client("admin", "kubernetes-admin", Some(ADMIN_GROUP)),
        client("kube-controller-manager", "system:kube-controller-manager", None),
        client("kube-scheduler", "system:kube-scheduler", None),
        client("kube-proxy", "system:kube-proxy", None),
        client("kubelet", &format!("system:node:{node}"), Some("system:nodes")),
        client("apiserver-kubelet-client", "kube-apiserver-kubelet-client", None),
        Wanted {
            file: "apiserver",
            common_name: "kube-apiserver".to_owned(),
            organization: None,
            names: api_names,
            addresses: vec![loopback, settings.reachable_address(), address, settings.api_service_address()?],
        },
        Wanted {
            file: "kubelet-server",
            common_name: format!("system:node:{node}"),
            organization: Some("system:nodes"),
            names: vec![node],
            addresses: vec![loopback, settings.reachable_address(), address],
        },
    ])
}

fn read(path: &Utf8Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("failed to read {path}")),
    }
}

fn ensure_authority(settings: &Settings) -> Result<Issuer<'static, KeyPair>> {
    let (certificate, key) = (settings.pki("ca.crt"), settings.pki("ca.key"));
    if let (Some(certificate_pem), Some(key_pem)) = (read(&certificate)?, read(&key)?) {
        let key = KeyPair::from_pem(&key_pem).with_context(|| format!("failed to read {key}"))?;
        return Issuer::from_ca_cert_pem(&certificate_pem, key).with_context(|| format!("failed to read {certificate}"));
    }
    let key_pair = KeyPair::generate()?;
    let mut params = params("coracle-ca", None, AUTHORITY_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let pem = params.self_signed(&key_pair)?.pem();
    // The certificate last: where it stands, the key does too.
    write_file(&key, key_pair.serialize_pem().as_bytes(), 0o600)?;
    write_file(&certificate, pem.as_bytes(), 0o644)?;
    Ok(Issuer::new(params, key_pair))
}

/// The key that signs service account tokens (ES256), and its public half.
fn ensure_service_account_key(settings: &Settings) -> Result<()> {
    let (key, public) = (settings.pki("sa.key"), settings.pki("sa.pub"));
    let pair = match read(&key)? {
        Some(pem) => KeyPair::from_pem(&pem).with_context(|| format!("failed to read {key}"))?,
        None => {
            let pair = KeyPair::generate()?;
            write_file(&key, pair.serialize_pem().as_bytes(), 0o600)?;
            pair
        }
    };
    write_file(&public, pair.public_key_pem().as_bytes(), 0o644)
}

fn params(common_name: &str, organization: Option<&str>, days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, common_name);
    if let Some(organization) = organization {
        subject.push(DnType::OrganizationName, organization);
    }
    params.distinguished_name = subject;
    let now = time::OffsetDateTime::now_utc();
    // A clock that is a few minutes behind must not refuse a new certificate.
    params.not_before = now - time::Duration::minutes(5);
    params.not_after = now + time::Duration::days(days);
    params
}

fn ensure_certificate(settings: &Settings, authority: &Issuer<'static, KeyPair>, wanted: &Wanted) -> Result<()> {
    let certificate = settings.pki(&format!("{}.crt", wanted.file));
    let key = settings.pki(&format!("{}.key", wanted.file));
    if let (Some(pem), Some(_)) = (read(&certificate)?, read(&key)?)
        && still_good(&pem, wanted)
    {
        return Ok(());
    }
    let key_pair = KeyPair::generate()?;
    let mut params = params(&wanted.common_name, wanted.organization, CERTIFICATE_DAYS);
    for name in &wanted.names {
        params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into().with_context(|| format!("{name:?} is no DNS name"))?));
    }
    params.subject_alt_names.extend(wanted.addresses.iter().map(|address| SanType::IpAddress(*address)));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let server = !wanted.addresses.is_empty();
    params.extended_key_usages = vec![if server { ExtendedKeyUsagePurpose::ServerAuth } else { ExtendedKeyUsagePurpose::ClientAuth }];
    let pem = params.signed_by(&key_pair, authority)?.pem();
    write_file(&key, key_pair.serialize_pem().as_bytes(), 0o600)?;
    write_file(&certificate, pem.as_bytes(), 0o644)
}

/// Whether a certificate names what is wanted and is not in the last third of its life.
fn still_good(pem: &str, wanted: &Wanted) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(pem.as_bytes()) else { return false };
    let Ok((_, certificate)) = X509Certificate::from_der(&der) else { return false };
    let common_name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    if common_name != Some(wanted.common_name.as_str()) {
        return false;
    }
    let left = certificate.validity().time_to_expiration().map_or(0, |left| left.whole_seconds());
    if left < CERTIFICATE_DAYS * 86_400 / 3 {
        return false;
    }
    let names = certificate.subject_alternative_name().ok().flatten();
    let has_address = |address: &IpAddr| {
        let octets = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        names.as_ref().is_some_and(|names| {
            names.value.general_names.iter().any(|name| matches!(name, x509_parser::prelude::GeneralName::IPAddress(ip) if *ip == octets))
        })
    };
    let has_name = |wanted: &String| {
        names.as_ref().is_some_and(|names| {
            names.value.general_names.iter().any(|name| matches!(name, x509_parser::prelude::GeneralName::DNSName(dns) if dns == wanted))
        })
    };
    wanted.addresses.iter().all(has_address) && wanted.names.iter().all(has_name)
}

/// A kubeconfig with everything inside it, so that it can be copied elsewhere.
fn write_kubeconfig(settings: &Settings, path: &Utf8Path, server: &str, user: &str, certificate: &str) -> Result<()> {
    let encode = |name: String| -> Result<String> {
        let path = settings.pki(&name);
        let bytes = fs::read(&path).with_context(|| format!("failed to read {path}"))?;
        Ok(base64::engine::general_purpose::STANDARD.encode(bytes))
    };
    let config = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "coracle", "cluster": { "server": server, "certificate-authority-data": encode("ca.crt".into())? } }],
        "users": [{ "name": user, "user": {
            "client-certificate-data": encode(format!("{certificate}.crt"))?,
            "client-key-data": encode(format!("{certificate}.key"))?,
        } }],
        "contexts": [{ "name": "coracle", "context": { "cluster": "coracle", "user": user } }],
        "current-context": "coracle",
    });
    write_file(path, serde_yaml_ng::to_string(&config)?.as_bytes(), 0o600)
}
