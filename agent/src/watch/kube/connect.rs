//! How to reach the API server, and as whom. Nothing is sent from here.

use std::path::PathBuf;

use kube::Client;
use kube::config::{Config, InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use thiserror::Error;

use super::Timing;
use super::servers::Servers;

/// A name that every API server's certificate carries (kubeadm and the managed offerings alike).
const SERVER_NAME: &str = "kubernetes.default.svc";

/// Where the API server is, and who asks.
#[derive(Clone, Debug)]
pub struct KubeOptions {
    pub credentials: Credentials,
    /// `--kube-api-server https://host:port`: asks there, whatever the credentials name, and of several the
    /// first that answers. The address of the Service kubernetes is ours to provide, so it cannot be
    /// relied on.
    pub servers: Vec<String>,
}

/// Who asks.
#[derive(Clone, Debug)]
pub enum Credentials {
    Kubeconfig(PathBuf),
    /// The service account of the pod.
    InCluster,
}

/// The configuration cannot be used. Each message says what to change.
#[derive(Debug, Error)]
pub enum ConnectError {
    #[error("the kubeconfig {path} cannot be used: {source}")]
    Kubeconfig {
        path: PathBuf,
        source: KubeconfigError,
    },
    #[error(
        "not in a pod with a service account ({0}): give --kubeconfig FILE, or --manifests DIR to do \
         without an API server"
    )]
    InCluster(#[source] InClusterError),
    #[error("--kube-api-server {0:?} is not of the form https://host:port")]
    Server(String),
    #[error("the connection to the API server cannot be set up: {0}")]
    Client(#[source] kube::Error),
}

/// A client for each server, in the order in which they are to be tried.
///
/// # Errors
/// The credentials or an address cannot be used.
pub async fn connect(options: &KubeOptions, timing: &Timing) -> Result<Servers, ConnectError> {
    let mut targets: Vec<_> = options.servers.iter().map(Some).collect();
    if targets.is_empty() {
        targets.push(None);
    }
    let mut clients = Vec::with_capacity(targets.len());
    for server in targets {
        let config = config(&options.credentials, server, timing).await?;
        let url = config.cluster_url.to_string();
        clients.push((url, Client::try_from(config).map_err(ConnectError::Client)?));
    }
    Ok(Servers::new(clients))
}

async fn config(
    credentials: &Credentials,
    server: Option<&String>,
    timing: &Timing,
) -> Result<Config, ConnectError> {
    let mut config = match (credentials, server) {
        (Credentials::Kubeconfig(path), _) => {
            let refused = |source| ConnectError::Kubeconfig {
                path: path.clone(),
                source,
            };
            let kubeconfig = Kubeconfig::read_from(path).map_err(refused)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .map_err(refused)?
        }
        (Credentials::InCluster, None) => Config::incluster().map_err(ConnectError::InCluster)?,
        (Credentials::InCluster, Some(_)) => {
            let mut config = Config::incluster_dns().map_err(ConnectError::InCluster)?;
            config.tls_server_name = Some(SERVER_NAME.to_owned());
            config
        }
    };
    if let Some(server) = server {
        let wrong = || ConnectError::Server(server.clone());
        config.cluster_url = server.parse().map_err(|_| wrong())?;
        let url = &config.cluster_url;
        if !matches!(url.scheme_str(), Some("https" | "http")) || url.host().is_none() {
            return Err(wrong());
        }
    }
    config.connect_timeout = Some(timing.connect);
    config.write_timeout = Some(timing.connect);
    // How long a call may be silent is the source's to say, and differs from call to call.
    config.read_timeout = None;
    // The source tries again itself, and says so.
    config.default_retry = false;
    Ok(config)
}
