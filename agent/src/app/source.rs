//! Which source of objects there is: an API server or a folder of manifests.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{mpsc, watch};
use weir_cni::durable::private_folder;

use crate::beat::LOOK;
use crate::config::{Settings, Source};
use crate::model::Change;
use crate::watch::controllers::Surroundings;
use crate::watch::kube::{Credentials, KubeOptions, KubeSource, Servers, Timing, connect};
use crate::watch::manifests::{ManifestsOptions, ManifestsSource, PodAddresses};
use crate::watch::saved::{SAVED_OBJECTS, SavedObjects};
use crate::watch::saving::{Pace, Saving};
use crate::watch::status::Health;

/// How often the manifests are read although nothing was noticed.
const RESCAN: Duration = LOOK;

/// A source of objects, and what it tells beside changes.
pub(super) struct Running {
    pub(super) source: AnySource,
    pub(super) health: watch::Receiver<Health>,
    /// With manifests: who fills in the addresses of this node's pods.
    pub(super) addresses: Option<PodAddresses>,
    /// With an API server: who can be told something.
    pub(super) servers: Option<Arc<Servers>>,
}

pub(super) enum AnySource {
    Manifests(ManifestsSource),
    Kube(KubeSource),
}

impl Running {
    pub(super) async fn prepare(settings: &Settings) -> Result<Self> {
        match &settings.source {
            Source::Manifests {
                folder,
                service_cidrs,
            } => {
                private_folder(&settings.state_dir)
                    .with_context(|| format!("create {}", settings.state_dir.display()))?;
                let source = ManifestsSource::new(ManifestsOptions {
                    folder: folder.clone(),
                    assigned: settings.state_dir.join("cluster-ips.json"),
                    surroundings: Surroundings {
                        node: settings.node.clone(),
                        service_cidrs: service_cidrs.clone(),
                    },
                    rescan: RESCAN,
                });
                let health = source.health();
                let addresses = Some(source.addresses());
                Ok(Self {
                    source: AnySource::Manifests(source),
                    health,
                    addresses,
                    servers: None,
                })
            }
            Source::Kube {
                kubeconfig,
                api_servers,
            } => {
                let credentials = match kubeconfig {
                    Some(path) => Credentials::Kubeconfig(path.clone()),
                    None => Credentials::InCluster,
                };
                let options = KubeOptions {
                    credentials,
                    servers: api_servers.clone(),
                };
                let timing = Timing::default();
                let servers = Arc::new(connect(&options, &timing).await?);
                let saving = Saving {
                    to: SavedObjects::new(
                        settings.state_dir.join(SAVED_OBJECTS),
                        settings.node.clone(),
                    ),
                    pace: Pace::default(),
                };
                let source = KubeSource::new(servers.clone(), timing).saving(saving);
                let health = source.health();
                Ok(Self {
                    source: AnySource::Kube(source),
                    health,
                    addresses: None,
                    servers: Some(servers),
                })
            }
        }
    }
}

impl AnySource {
    /// Says what there is for as long as somebody listens.
    pub(super) async fn run(self, changes: mpsc::Sender<Change>) {
        match self {
            AnySource::Manifests(source) => source.run(changes).await,
            AnySource::Kube(source) => source.run(changes).await,
        }
    }
}
