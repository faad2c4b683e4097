//! The cluster's keys and certificates: one authority, a certificate per component, none in `system:masters`.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use camino::Utf8Path;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData as _, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

use crate::settings::{Settings, write_file};

/// How long certificates are valid, in days; they are renewed at the first start in their last third.
const CERTIFICATE_DAYS: i64 = 365;
/// How long the authority is valid, in days.
const AUTHORITY_DAYS: i64 = 3650;
/// How long before its making a certificate begins to be valid, in hours: a clock that is set back, or another machine's that is
/// behind, must not refuse it.
const BACKDATED_HOURS: i64 = 24;

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

/// The cluster's certificate authority.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate.
    pem: String,
}

/// What is wrong with an authority is said before anything is made with it: every part would only say that TLS fails.
fn check_authority(path: &Utf8Path, pem: &str, key_path: &Utf8Path, key: &KeyPair) -> Result<()> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).with_context(|| format!("failed to read {path}"))?;
    let (_, certificate) = X509Certificate::from_der(&der).with_context(|| format!("failed to read {path}"))?;
    let remedy = "put the right one there, or remove the directory pki for new ones, which end all credentials given out before";
    ensure!(certificate.is_ca(), "{path} is no certificate authority: {remedy}");
    ensure!(certificate.public_key().raw == key.subject_public_key_info(), "{key_path} is not the key of {path}: {remedy}");
    let (validity, now) = (certificate.validity(), ASN1Time::now());
    ensure!(now >= validity.not_before, "{path} is not valid before {}, and it is {now}: is the clock right?", validity.not_before);
    ensure!(now <= validity.not_after, "{path} has expired on {}, and it is {now}: if the clock is right, {remedy}", validity.not_after);
    Ok(())
}

fn ensure_authority(settings: &Settings) -> Result<Authority> {
    let (certificate, key) = (settings.pki("ca.crt"), settings.pki("ca.key"));
    if let (Some(certificate_pem), Some(key_pem)) = (read(&certificate)?, read(&key)?) {
        let pair = KeyPair::from_pem(&key_pem).with_context(|| format!("failed to read {key}"))?;
        check_authority(&certificate, &certificate_pem, &key, &pair)?;
        return Ok(Authority {
            issuer: Issuer::from_ca_cert_pem(&certificate_pem, pair).with_context(|| format!("failed to read {certificate}"))?,
            pem: certificate_pem,
        });
    }
    let key_pair = KeyPair::generate()?;
    let mut params = params("coracle-ca", None, AUTHORITY_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let pem = params.self_signed(&key_pair)?.pem();
    // The certificate last: where it stands, the key does too.
    write_file(&key, key_pair.serialize_pem().as_bytes(), 0o600)?;
    write_file(&certificate, pem.as_bytes(), 0o644)?;
    Ok(Authority { issuer: Issuer::new(params, key_pair), pem })
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
    params.not_before = now - time::Duration::hours(BACKDATED_HOURS);
    params.not_after = now + time::Duration::days(days);
    params
}

fn ensure_certificate(settings: &Settings, authority: &Authority, wanted: &Wanted) -> Result<()> {
    let certificate = settings.pki(&format!("{}.crt", wanted.file));
    let key = settings.pki(&format!("{}.key", wanted.file));
    if let (Some(pem), Some(key_pem)) = (read(&certificate)?, read(&key)?)
        && still_good(&pem, &key_pem, &authority.pem, wanted)
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
    let pem = params.signed_by(&key_pair, &authority.issuer)?.pem();
    write_file(&key, key_pair.serialize_pem().as_bytes(), 0o600)?;
    write_file(&certificate, pem.as_bytes(), 0o644)
}

/// Whether a certificate belongs to its key and to the present authority, names what is wanted, is valid already and is not in the
/// last third of its life.
fn still_good(pem: &str, key_pem: &str, authority_pem: &str, wanted: &Wanted) -> bool {
    let parsed = (CertificateDer::from_pem_slice(pem.as_bytes()), CertificateDer::from_pem_slice(authority_pem.as_bytes()));
    let (Ok(der), Ok(authority)) = parsed else { return false };
    let parsed = (X509Certificate::from_der(&der), X509Certificate::from_der(&authority));
    let (Ok((_, certificate)), Ok((_, authority))) = parsed else { return false };
    let own_key = KeyPair::from_pem(key_pem).is_ok_and(|key| certificate.public_key().raw == key.subject_public_key_info());
    if !own_key || certificate.verify_signature(Some(authority.public_key())).is_err() || !certificate.validity().is_valid() {
        return false;
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }

    fn settings(dir: &tempfile::TempDir) -> Settings {
        let data = format!("--data-dir={}", dir.path().display());
        Line::parse_from(["up", &data, "--node-name=n", "--node-ip=192.0.2.1"]).settings
    }

    fn text(settings: &Settings, name: &str) -> String {
        fs::read_to_string(settings.pki(name)).unwrap()
    }

    /// A self-signed authority with this key, valid from and to so many hours from now.
    fn write_authority(settings: &Settings, key: &KeyPair, from_hours: i64, to_hours: i64) {
        let mut params = params("coracle-ca", None, 1);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let now = time::OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now + time::Duration::hours(from_hours), now + time::Duration::hours(to_hours));
        fs::write(settings.pki("ca.crt"), params.self_signed(key).unwrap().pem()).unwrap();
        fs::write(settings.pki("ca.key"), key.serialize_pem()).unwrap();
    }

    #[test]
    fn what_is_good_is_kept_and_what_is_not_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(&dir);
        ensure(&settings).unwrap();
        let first = text(&settings, "kubelet.crt");
        ensure(&settings).unwrap();
        assert_eq!(text(&settings, "kubelet.crt"), first);
        // Another one's key.
        fs::copy(settings.pki("admin.key"), settings.pki("kubelet.key")).unwrap();
        ensure(&settings).unwrap();
        let second = text(&settings, "kubelet.crt");
        assert_ne!(second, first);
        // Another authority: all are made anew, and the kubeconfigs with them.
        let before = fs::read_to_string(settings.admin_kubeconfig()).unwrap();
        write_authority(&settings, &KeyPair::generate().unwrap(), -1, 9999);
        ensure(&settings).unwrap();
        assert_ne!(text(&settings, "kubelet.crt"), second);
        assert_ne!(fs::read_to_string(settings.admin_kubeconfig()).unwrap(), before);
        // Cut off by a full disk of long ago.
        fs::write(settings.pki("kubelet.crt"), &second[..40]).unwrap();
        ensure(&settings).unwrap();
        assert!(text(&settings, "kubelet.crt").ends_with("-----END CERTIFICATE-----\n"));
    }

    #[test]
    fn an_authority_that_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(&dir);
        ensure(&settings).unwrap();
        let before = text(&settings, "kubelet.crt");
        let key = KeyPair::generate().unwrap();
        for (from, to, why) in [(-20, -1, "has expired on"), (1, 20, "is the clock right?")] {
            write_authority(&settings, &key, from, to);
            let error = ensure(&settings).unwrap_err().to_string();
            assert!(error.contains("ca.crt") && error.contains(why), "{error}");
        }
        write_authority(&settings, &key, -1, 9999);
        fs::write(settings.pki("ca.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let error = ensure(&settings).unwrap_err().to_string();
        assert!(error.contains("ca.key is not the key of"), "{error}");
        fs::copy(settings.pki("admin.crt"), settings.pki("ca.crt")).unwrap();
        fs::copy(settings.pki("admin.key"), settings.pki("ca.key")).unwrap();
        let error = ensure(&settings).unwrap_err().to_string();
        assert!(error.contains("is no certificate authority"), "{error}");
        assert_eq!(text(&settings, "kubelet.crt"), before, "nothing was made with it");
    }
}
