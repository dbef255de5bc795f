//! The agent's table of contents: what it is made of, in the order in which things flow.

mod beside;
mod datapath;
mod drops;
mod room;
mod source;
mod tasks;
mod told;

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use weir_cni::durable::private_folder;
use weir_common::nat::PortRange;
use weir_common::node::{Features, NodeConfig};
use weir_dns::feed::Peer;

use self::beside::{
    announce_network, follow, follow_pod_cidrs, keep_ports_reserved, keep_routes, keep_second_lock,
    protect_unexplained, settle, settle_later,
};
use self::datapath::NodeDatapath;
use self::drops::{explain, read_ring};
use self::source::Running;
use self::tasks::Tasks;
use self::told::Told;
use crate::admin;
use crate::beat::LOOK;
use crate::conditions::Board;
use crate::config::{PodCidrs, Settings};
use crate::events::{Names, Recent};
use crate::kernel::netlink::dns_addresses;
use crate::kernel::netlink::routes::KernelRoutes;
use crate::kernel::second_lock::Lock;
use crate::kernel::{Kernel, features, lock, netlink, network, object, second_lock, sysctl};
use crate::line::{Handle, Input, KernelMachine, Line, Parts, Published};
use crate::pods::{self, Leases, Places, Pods, Ranges};
use crate::tell::{Roster, Scribe, Teller, Tells};
use crate::zone_feed::{self, ZoneFeed};

/// Changes that may wait for the line. A source that brings more waits.
const CHANGES: usize = 4096;
/// Records of the ring that may wait to be explained. More are lost, and counted.
const RECORDS: usize = 1024;
/// How often the DNS addresses are looked at although nothing was heard of them.
const DNS_AUDIT: Duration = Duration::from_secs(30);
/// After how long something that ended by an error is begun again.
const RETRY: Duration = Duration::from_secs(1);

/// Runs the agent until somebody ends it (SIGTERM, SIGINT). Nothing is detached then: the kernel goes on by itself.
///
/// # Errors
/// Something that the agent needs is missing, or a task of it has ended; the message says what to do. What ran before
/// still runs.
pub fn run(settings: Settings) -> Result<()> {
    // Here and not in `main`: who polls a future compiles it, and with the library nothing is compiled twice.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let stopping = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stopping.cancel();
        });
        run_until(settings, stop).await
    })
}

async fn run_until(settings: Settings, stop: CancellationToken) -> Result<()> {
    let settings = Arc::new(settings);
    let missing = features::missing(&features::probe(&settings.bpffs, &settings.cgroup));
    if !missing.is_empty() {
        bail!("this node lacks what Weir needs: {}", missing.join("; "));
    }
    let only = Arc::new(lock::lock(&settings.run_dir)?);
    let sockets = Sockets::open(&settings).await?;

    // The kernel's programs and tables: the verifier takes longest of all. Nothing meets them yet: the line puts them
    // in place of an earlier agent's when its tables are filled.
    let config = node_config(&settings)?;
    let loading = tokio::task::spawn_blocking({
        let settings = settings.clone();
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
    dns_addresses::put_dns_addresses(&settings.dns.addresses).await?;
    if second_lock::close().context("close the second lock")? == Lock::Open {
        info!("the second lock is closed");
    }

    // What is wrong, said by whoever finds it.
    let board = Arc::new(Board::default());

    // And what the cluster says, which waits for the line, as that waits for the pods of this node.
    let mut tasks = Tasks::default();
    let Running {
        source,
        health,
        addresses,
        servers,
    } = Running::prepare(&settings).await?;
    let (changes, inbox) = mpsc::channel(CHANGES);
    tasks.spawn("source of objects", source.run(changes));
    let leases = Arc::new(open_leases(&settings)?);
    let mut kernel = loading.await.context("load the programs")??;
    for (program, (_, visited)) in kernel.programs() {
        info!(program, instructions = visited, "verified");
    }
    let ring = kernel.ring().context("open the ring of events")?;
    let kernel = Arc::new(kernel);
    let flows = Arc::new(kernel.flows().context("open the tables of flows")?);

    // compile → apply → kernel: one thread writes.
    let zone = ZoneFeed::new(settings.dns.domain.as_str());
    let names = Names::default();
    let roster = Roster::new(settings.agents_in.clone());
    let published = Arc::new(Published::default());
    let (line, inputs) = Handle::new();
    let heard = health.clone();
    let ranges = leases.ranges();
    let resumed = Line::resume(Parts {
        settings: settings.clone(),
        machine: KernelMachine::new(kernel.clone(), flows.clone()),
        health,
        node_addresses: netlink::node_addresses().await?,
        ranges: ranges.borrow().clone(),
        zone: zone.clone(),
        names: names.clone(),
        roster: roster.clone(),
        board: board.clone(),
        published: published.clone(),
    })?;
    let stopping = stop.clone();
    tasks.spawn(
        "line",
        beside::run_on_thread("line", move || resumed.run(inbox, inputs, stopping))?,
    );

    // The pods of this node: those that an earlier agent opened, and only then what the cluster says, which
    // `Input::Resumed` lets in, and what the plugin asks for.
    if settings.pod_cidrs == PodCidrs::OfNode {
        let (leases, published) = (leases.clone(), published.clone());
        tasks.spawn(
            "ranges of the node",
            follow_pod_cidrs(leases, published, line.clone()),
        );
    }
    let mtu = match settings.mtu {
        0 => netlink::default_mtu().await?,
        mtu => mtu,
    };
    let datapath = NodeDatapath {
        kernel: kernel.clone(),
        line: line.clone(),
        board: board.clone(),
        addresses: addresses.clone(),
    };
    let pods = Arc::new(Pods::new(
        leases.clone(),
        Arc::new(datapath),
        pods::Settings { mtu },
    ));
    pods.reconcile()
        .await
        .context("bring leases and devices together")?;
    let leased = leases.all();
    for lease in leased.values() {
        datapath::report(addresses.as_ref(), lease);
    }
    let devices = netlink::pod_devices().await?;
    line.bring(Input::Resumed(leased.values().cloned().collect()))
        .await?;
    protect_unexplained(&kernel, &devices, &leased);
    settle(&kernel, &devices);
    tasks.spawn_until_done(settle_later(kernel.clone(), published.clone()));
    tasks.spawn(
        "DNS addresses",
        dns_addresses::keep_dns_addresses(
            settings.dns.addresses.clone(),
            DNS_AUDIT,
            board.reporter("DNS addresses"),
        ),
    );
    let ports = PortRange {
        first: config.first_port,
        last: config.last_port,
    };
    tasks.spawn(
        "ports of the node's own",
        keep_ports_reserved(
            settings.run_dir.clone(),
            ports,
            board.reporter("ports of the node's own"),
        ),
    );
    tasks.spawn(
        "second lock",
        keep_second_lock(board.reporter("second lock")),
    );
    let routes = keep_routes(
        KernelRoutes::open()?,
        published.clone(),
        board.reporter("routes"),
    );
    tasks.spawn("routes", routes);
    let addresses = follow(
        line.clone(),
        netlink::watch_node_addresses,
        Input::NodeAddresses,
    );
    tasks.spawn("addresses of the node", addresses);
    let outlets = follow(line.clone(), netlink::watch_outlets, Input::Outlets);
    tasks.spawn("devices of the node", outlets);
    tasks.spawn("audit of leases", pods.clone().keep_audited());
    tasks.spawn("CNI", pods.serve(sockets.cni));
    if let Some(folder) = &settings.cni_conf_dir {
        let announced = announce_network(folder.clone(), &settings, board.clone())?;
        tasks.spawn("network configuration", announced);
    }

    // kernel → events → export
    let recent = Arc::new(Recent::default());
    let (records, incoming) = mpsc::channel(RECORDS);
    tasks.spawn(
        "ring of events",
        read_ring(ring, records, board.reporter("events")),
    );
    let explained = explain(incoming, names.clone(), published.clone(), recent.clone());
    tasks.spawn("events", explained);

    // What others are told.
    if settings.tells != Tells::default()
        && let Some(servers) = servers
    {
        let teller = Teller {
            node: settings.node.clone(),
            tells: settings.tells,
            scribe: Scribe::new(servers),
            roster,
            board: board.clone(),
            health: heard,
        };
        tasks.spawn("telling the cluster", teller.run());
    }

    // What others ask.
    let at = zone_feed::Place {
        socket: settings.dns.zone_socket.clone(),
        peer: Peer {
            uid: settings.dns.uid,
            gid: settings.dns.uid,
        },
        retry: RETRY,
        look: LOOK,
    };
    let served = zone_feed::keep_served(zone, at, board.reporter("zone"));
    tasks.spawn("zone", served);
    let told = Arc::new(Told {
        counters: kernel.counters().context("open the counters")?,
        flows,
        nat_ports: usize::from(ports.last.saturating_sub(ports.first)) + 1,
        line,
        board,
        names,
        published,
        recent,
        lock_drops: Default::default(),
    });
    tasks.spawn(
        "probes and metrics",
        serve(sockets.http, admin::probes(told.clone())),
    );
    tasks.spawn("local API", serve(sockets.admin, admin::local(told)));
    if cfg!(feature = "ends-a-task") {
        let file = settings.run_dir.join("end-a-task");
        tasks.spawn("of a test", async move {
            while !file.exists() {
                tokio::time::sleep(RETRY / 20).await;
            }
        });
    }
    info!(node = %settings.node, http = %settings.http, "weir-agent runs");

    let ended = tokio::select! {
        () = stop.cancelled() => Ok(()),
        // The line ends when it is told to stop, too.
        error = tasks.ended() => if stop.is_cancelled() { Ok(()) } else { Err(error) },
    };
    info!("going down; programs and tables stay");
    tasks.shutdown().await;
    ended
}

/// What the programs are told.
fn node_config(settings: &Settings) -> Result<NodeConfig> {
    let mut features = 0;
    if settings.masquerade {
        features |= Features::MASQUERADE;
    }
    if features::refusals_say_why() {
        features |= Features::SAYS_WHY;
    }
    // Where there is no room beside those that the node gives to its own connections, ours are kept from these.
    let ports = PortRange::beside(sysctl::ephemeral_ports()?).unwrap_or(PortRange::USUAL);
    Ok(NodeConfig {
        features,
        network: network::cookie().context("ask which network namespace this is")?,
        first_port: ports.first,
        last_port: ports.last,
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

fn open_leases(settings: &Settings) -> Result<Leases> {
    private_folder(&settings.state_dir)
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

async fn serve<L: axum::serve::Listener>(listener: L, routes: axum::Router)
where
    L::Addr: std::fmt::Debug,
{
    if let Err(error) = axum::serve(listener, routes).await {
        warn!(%error, "nobody is answered any more");
    }
}
