//! The certificates and keys of a control plane, and the kubeconfigs that use them.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::{Value, json};

/// A certificate authority and the directory that everything it makes is in.
#[derive(Debug)]
pub struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, PEM.
#[derive(Debug, Clone)]
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// What a client of the API server shows.
#[derive(Debug, Clone)]
pub enum Credential {
    Certificate(Identity),
    /// A bearer token.
    Token(String),
}

impl Pki {
    /// Makes the authority (`ca.crt`) and the signing key of service accounts (`sa.key`, `sa.pub`) in `dir`.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "weir-tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        fs::write(dir.join("ca.crt"), params.self_signed(&key)?.pem())?;
        let service_accounts = KeyPair::generate()?;
        fs::write(dir.join("sa.key"), service_accounts.serialize_pem())?;
        fs::write(dir.join("sa.pub"), service_accounts.public_key_pem())?;
        Ok(Self {
            dir: dir.to_owned(),
            issuer: Issuer::new(params, key),
        })
    }

    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// Checks tokens of service accounts.
    #[must_use]
    pub fn service_account_public_key(&self) -> PathBuf {
        self.dir.join("sa.pub")
    }

    /// Signs tokens of service accounts.
    #[must_use]
    pub fn service_account_key(&self) -> PathBuf {
        self.dir.join("sa.key")
    }

    /// An identity for a server that is reached by these names and addresses.
    ///
    /// # Errors
    /// A name is no DNS name, or the files cannot be written.
    pub fn server(&self, name: &str, reached_by: &[String]) -> Result<Identity> {
        let mut params = CertificateParams::new(reached_by)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(name, None, params)
    }

    /// An identity for a user of the API, in a group or none.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn client(&self, user: &str, group: Option<&str>) -> Result<Identity> {
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(user, group, params)
    }

    /// Where the identity of this name is, or would be.
    #[must_use]
    pub fn identity(&self, name: &str) -> Identity {
        let file = self.dir.join(name.replace(':', "-"));
        Identity {
            certificate: file.with_added_extension("crt"),
            key: file.with_added_extension("key"),
        }
    }

    fn sign(
        &self,
        name: &str,
        group: Option<&str>,
        mut params: CertificateParams,
    ) -> Result<Identity> {
        if let Some(group) = group {
            params
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let identity = self.identity(name);
        fs::write(
            &identity.certificate,
            params.signed_by(&key, &self.issuer)?.pem(),
        )?;
        fs::write(&identity.key, key.serialize_pem())?;
        Ok(identity)
    }

    /// Writes a kubeconfig for the API server at `server` as `<name>.kubeconfig`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn kubeconfig(
        &self,
        name: &str,
        server: SocketAddr,
        credential: &Credential,
    ) -> Result<PathBuf> {
        let url = format!("https://{server}");
        let path = self.dir.join(format!("{name}.kubeconfig"));
        // JSON is YAML.
        let config = kubeconfig(&url, &self.ca(), credential);
        fs::write(&path, format!("{config:#}\n"))
            .with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

fn kubeconfig(url: &str, ca: &Path, credential: &Credential) -> Value {
    let user = match credential {
        Credential::Certificate(identity) => json!({
            "client-certificate": identity.certificate,
            "client-key": identity.key,
        }),
        Credential::Token(token) => json!({ "token": token }),
    };
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "weirt",
            "cluster": { "server": url, "certificate-authority": ca },
        }],
        "users": [{ "name": "weirt", "user": user }],
        "contexts": [{ "name": "weirt", "context": { "cluster": "weirt", "user": "weirt" } }],
        "current-context": "weirt",
    })
}
