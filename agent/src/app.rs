//! The agent's table of contents: what it is made of, in the order in which things flow.

mod beside;
mod told;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use weir_common::nat::PortRange;
use weir_common::node::{Features, NodeConfig};
use weir_common::policy::RuleId;
use weir_dns::feed::Peer;

use self::beside::{
    announce_network, follow, follow_pod_cidrs, keep_routes, keep_second_lock, settle,
};
use self::told::Told;
use crate::admin;
use crate::compile::policy::RuleBook;
use crate::config::{PodCidrs, Settings, Source};
use crate::events::{self, Explainer, Names, Recent};
use crate::kernel::netlink::routes::KernelRoutes;
use crate::kernel::second_lock::Lock;
use crate::kernel::{
    Kernel, Ring, clock, features, lock, netlink, network, object, second_lock, sysctl,
};
use crate::line::{Handle, Line, NodeDatapath, Parts, Published};
use crate::model::Change;
use crate::pods::{self, Leases, Places, Pods, Ranges};
use crate::watch::controllers::Surroundings;
use crate::watch::kube::{Credentials, KubeOptions, KubeSource, Timing, connect};
use crate::watch::manifests::{ManifestsOptions, ManifestsSource, PodAddresses};
use crate::watch::saved::{SAVED_OBJECTS, SavedObjects};
use crate::watch::saving::{Pace, Saving};
use crate::watch::status::Health;
use crate::zone_feed::ZoneFeed;

/// Changes that may wait for the line. A source that brings more waits.
const CHANGES: usize = 4096;
/// Records of the ring that may wait to be explained. More are lost, and counted.
const RECORDS: usize = 1024;
/// How often the manifests are read although nothing was noticed.
const RESCAN: Duration = Duration::from_secs(5);
/// After how long something that ended by an error is begun again.
const RETRY: Duration = Duration::from_secs(1);

/// Runs the agent until `stop`. Nothing is detached then: the kernel goes on by itself.
///
/// # Errors
/// Something that the agent needs is missing; the message says what to do. What ran before still runs.
pub async fn run(settings: Settings, stop: CancellationToken) -> Result<()> {
    let settings = Arc::new(settings);
    let missing = features::missing(&features::probe(&settings.bpffs, &settings.cgroup));
    if !missing.is_empty() {
        bail!("this node lacks what Weir needs: {}", missing.join("; "));
    }
    let only = Arc::new(lock::lock(&settings.run_dir)?);
    let sockets = Sockets::open(&settings).await?;

    // The kernel's programs and tables: the verifier takes longest of all. Nothing meets them yet: the line puts them
    // in place of an earlier agent's when its tables are filled.
    let loading = tokio::task::spawn_blocking({
        let (settings, config) = (settings.clone(), node_config(&settings)?);
        // A start that fails meanwhile lets nobody else begin before this has ended.
        let only = only.clone();
        move || {
            let _only = only;
            Kernel::load(
                object::OBJECT,
                &settings.bpffs,
                &settings.cgroup,
                config,
                &[],
            )
        }
    });

    // Meanwhile the node's network.
    sysctl::set_node(&settings.run_dir)?;
    netlink::add_loopback_addresses(&settings.dns.addresses).await?;
    if second_lock::close().context("close the second lock")? == Lock::Open {
        info!("the second lock is closed");
    }

    // And what the cluster says, which waits for the line, as that waits for the pods of this node.
    let mut tasks = JoinSet::new();
    let Running {
        source,
        health,
        addresses,
    } = Running::prepare(&settings).await?;
    let (changes, inbox) = mpsc::channel(CHANGES);
    source.spawn(changes, &mut tasks);
    let leases = Arc::new(open_leases(&settings)?);
    let mut kernel = loading.await.context("load the programs")??;
    for (program, (_, visited)) in kernel.programs() {
        info!(program, instructions = visited, "verified");
    }
    let ring = kernel.ring().context("open the ring of events")?;

    // compile → apply → kernel: one task writes.
    let zone = ZoneFeed::new(settings.dns.domain.as_str());
    let published = Arc::new(Published::default());
    let (line, work) = Handle::new();
    let resumed = Line::resume(Parts {
        settings: settings.clone(),
        kernel,
        health,
        node_addresses: netlink::node_addresses().await?,
        ranges: leases.ranges(),
        zone: zone.clone(),
        published: published.clone(),
    })?;
    tasks.spawn(resumed.run(inbox, work, stop.clone()));

    // The pods of this node: those that an earlier agent opened, and only then what the cluster says, which
    // `resume_pods` lets in, and what the plugin asks for.
    if settings.pod_cidrs == PodCidrs::OfNode {
        let (leases, published) = (leases.clone(), published.clone());
        tasks.spawn(follow_pod_cidrs(leases, published, line.clone()));
    }
    let datapath = NodeDatapath::new(line.clone(), published.clone(), addresses.clone());
    let mtu = match settings.mtu {
        0 => netlink::default_mtu().await?,
        mtu => mtu,
    };
    let pods = Arc::new(Pods::new(
        leases.clone(),
        Arc::new(datapath),
        pods::Settings { mtu },
    ));
    pods.reconcile()
        .await
        .context("bring leases and devices together")?;
    for lease in leases.all().values() {
        if let (Some(addresses), Some(pod)) = (&addresses, &lease.pod) {
            let name = crate::model::ObjectName::new(pod.namespace.as_str(), pod.name.as_str());
            addresses.report(name, lease.addresses.clone());
        }
    }
    let devices = netlink::pod_devices().await?;
    line.ask(move |line| {
        let leases = leases.all();
        line.resume_pods(leases.values().cloned());
        let is_leased =
            |device: &pods::Device| leases.values().any(|lease| lease.device() == device.name);
        line.protect_unexplained(devices.iter().filter(|device| !is_leased(device)));
        line.settle(&devices);
    })
    .await?;
    tasks.spawn(settle(line.clone(), published.clone()));
    tasks.spawn(keep_second_lock(published.clone()));
    tasks.spawn(keep_routes(KernelRoutes::open()?, published.clone()));
    let (watch, tell) = (netlink::watch_node_addresses, Line::know_addresses);
    tasks.spawn(follow(line.clone(), watch, tell));
    let (watch, tell) = (netlink::watch_outlets, Line::know_outlets);
    tasks.spawn(follow(line.clone(), watch, tell));
    tasks.spawn(pods.serve(sockets.cni));
    if let Some(folder) = &settings.cni_conf_dir {
        tasks.spawn(announce_network(folder.clone(), &settings, line.clone())?);
    }

    // kernel → events → export
    let recent = Arc::new(Recent::default());
    let (records, incoming) = mpsc::channel(RECORDS);
    tasks.spawn(read_ring(ring, records));
    tasks.spawn(explain(incoming, published.clone(), recent.clone()));

    // What others ask.
    tasks.spawn(serve_zone(zone, settings.clone()));
    let told = Arc::new(Told {
        line,
        published,
        recent,
    });
    tasks.spawn(serve_http(sockets.http, admin::probes(told.clone())));
    tasks.spawn(serve_local(sockets.admin, admin::local(told)));
    info!(node = %settings.node, http = %settings.http, "weir-agent runs");

    stop.cancelled().await;
    info!("going down; programs and tables stay");
    tasks.shutdown().await;
    Ok(())
}

/// What the programs are told.
fn node_config(settings: &Settings) -> Result<NodeConfig> {
    let mut features = 0;
    if settings.masquerade {
        features |= Features::MASQUERADE;
    }
    let ephemeral = sysctl::ephemeral_ports()?;
    let ports = PortRange::beside(ephemeral).unwrap_or_else(|| {
        let ports = PortRange::USUAL;
        warn!(
            ?ephemeral,
            ?ports,
            "net.ipv4.ip_local_port_range leaves no ports for masquerading: a connection of the node itself \
             may be taken for a pod's where both have the same peer"
        );
        ports
    });
    Ok(NodeConfig {
        features,
        network: network::cookie().context("ask which network namespace this is")?,
        first_port: ports.first,
        last_port: ports.last,
        ..NodeConfig::default()
    })
}

/// Everything that others connect to, opened before anything is changed.
struct Sockets {
    cni: UnixListener,
    admin: UnixListener,
    http: TcpListener,
}

impl Sockets {
    async fn open(settings: &Settings) -> Result<Self> {
        let cni = pods::listen(&settings.run_dir.join("cni.sock"))?;
        let admin = pods::listen(&settings.run_dir.join("admin.sock"))?;
        let http = TcpListener::bind(settings.http).await.with_context(|| {
            format!(
                "listen on {}: free the port, or choose another with --http",
                settings.http
            )
        })?;
        Ok(Self { cni, admin, http })
    }
}

/// A source of objects, and what it tells beside changes.
struct Running {
    source: AnySource,
    health: watch::Receiver<Health>,
    /// With manifests: who fills in the addresses of this node's pods.
    addresses: Option<PodAddresses>,
}

enum AnySource {
    Manifests(ManifestsSource),
    Kube(KubeSource),
}

impl Running {
    async fn prepare(settings: &Settings) -> Result<Self> {
        match &settings.source {
            Source::Manifests {
                folder,
                service_cidrs,
            } => {
                fs::create_dir_all(&settings.state_dir)
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
                })
            }
            Source::Kube {
                kubeconfig,
                api_server,
            } => {
                let credentials = match kubeconfig {
                    Some(path) => Credentials::Kubeconfig(path.clone()),
                    None => Credentials::InCluster,
                };
                let options = KubeOptions {
                    credentials,
                    server: api_server.clone(),
                };
                let timing = Timing::default();
                let client = connect(&options, &timing).await?;
                let saving = Saving {
                    to: SavedObjects::new(
                        settings.state_dir.join(SAVED_OBJECTS),
                        settings.node.clone(),
                    ),
                    pace: Pace::default(),
                };
                let source = KubeSource::new(client, timing).saving(saving);
                let health = source.health();
                Ok(Self {
                    source: AnySource::Kube(source),
                    health,
                    addresses: None,
                })
            }
        }
    }
}

impl AnySource {
    fn spawn(self, changes: mpsc::Sender<Change>, tasks: &mut JoinSet<()>) {
        match self {
            AnySource::Manifests(source) => tasks.spawn(source.run(changes)),
            AnySource::Kube(source) => tasks.spawn(source.run(changes)),
        };
    }
}

fn open_leases(settings: &Settings) -> Result<Leases> {
    fs::create_dir_all(&settings.state_dir)
        .with_context(|| format!("create {}", settings.state_dir.display()))?;
    let boot_id =
        fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the boot id")?;
    let places = Places {
        store: settings.state_dir.join("leases.redb"),
        released: settings.state_dir.join("released"),
    };
    let ranges = match &settings.pod_cidrs {
        PodCidrs::Given(cidrs) => Ranges::Given(cidrs),
        PodCidrs::OfNode => Ranges::LastServed,
    };
    Ok(Leases::open(places, ranges, boot_id.trim().to_owned())?)
}

async fn read_ring(ring: Ring, records: mpsc::Sender<Vec<u8>>) {
    let mut lost = 0u64;
    let ended = ring
        .run(records, || {
            lost += 1;
            if lost.is_power_of_two() {
                warn!(
                    lost,
                    "drop events come faster than they are explained; counters stay exact"
                );
            }
        })
        .await;
    if let Err(error) = ended {
        warn!(%error, "the ring of events cannot be read any more");
    }
}

async fn explain(
    mut incoming: mpsc::Receiver<Vec<u8>>,
    published: Arc<Published>,
    recent: Arc<Recent>,
) {
    let mut unknown = false;
    while let Some(record) = incoming.recv().await {
        match events::decode(&record) {
            Ok(event) => {
                let words = Words {
                    names: published.names.load_full(),
                    rules: published.rules.load_full(),
                };
                recent.push(events::explain(&event, clock::monotonic_start(), &words));
            }
            Err(error) if !unknown => {
                unknown = true;
                warn!(%error, "events of another version are left out");
            }
            Err(_) => {}
        }
    }
}

struct Words {
    names: Arc<Names>,
    rules: Arc<RuleBook>,
}

impl Explainer for Words {
    fn rule(&self, rule: RuleId) -> Option<String> {
        self.rules.owner(rule).map(ToString::to_string)
    }

    fn names(&self) -> &Names {
        &self.names
    }
}

async fn serve_zone(zone: ZoneFeed, settings: Arc<Settings>) {
    let path = &settings.dns.zone_socket;
    let peer = Peer {
        uid: settings.dns.uid,
        gid: settings.dns.uid,
    };
    let served = async {
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        zone.serve(path, peer).await.context("serve the zone")
    };
    if let Err(error) = served.await {
        warn!(error = format!("{error:#}"), "weir-dns gets no zone");
    }
}

async fn serve_http(listener: TcpListener, routes: axum::Router) {
    if let Err(error) = axum::serve(listener, routes).await {
        warn!(%error, "metrics and probes are not served any more");
    }
}

async fn serve_local(listener: UnixListener, routes: axum::Router) {
    if let Err(error) = axum::serve(listener, routes).await {
        warn!(%error, "the local API is not served any more");
    }
}
