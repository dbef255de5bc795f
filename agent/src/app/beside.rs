//! What goes on beside the line for as long as the agent runs: it hears of the node's network, and keeps what
//! is not a table.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};
use weir_common::nat::PortRange;

use super::RETRY;
use crate::apply::routes;
use crate::beat::{LOOK, beat};
use crate::conditions::{Board, Condition, NodeFault, PeerFault, Reporter};
use crate::config::Settings;
use crate::install;
use crate::kernel::census::State;
use crate::kernel::netlink::routes::KernelRoutes;
use crate::kernel::second_lock::{self, Lock};
use crate::kernel::{Kernel, netlink, sysctl};
use crate::line::{Handle, Input, Programs, Published};
use crate::pods::{Device, LeaseTable, Leases};

/// How often the second lock is looked at.
const LOCK_AUDIT: Duration = LOOK;
/// How often the ports that the node gives to its own connections are looked at.
const PORTS_AUDIT: Duration = Duration::from_secs(30);
/// How often routes are looked at although nothing was heard of them: all of them are read, and there are some for each
/// node.
const ROUTE_AUDIT: Duration = Duration::from_secs(300);
/// How often what an earlier agent left is looked at while some of it is in use.
const LEFT_AUDIT: Duration = Duration::from_secs(30);

/// Runs a future on a thread of its own: nothing that blocks others keeps it from going on, nor the reverse.
///
/// # Errors
/// The system gives no thread.
pub(super) fn run_on_thread<F, T>(
    name: &str,
    task: T,
) -> Result<impl Future<Output = ()> + use<F, T>>
where
    F: Future<Output = ()>,
    T: FnOnce() -> F + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start another runtime")?;
    let (alive, ended) = oneshot::channel::<()>();
    thread::Builder::new()
        .name(format!("weir-{name}"))
        .spawn(move || {
            runtime.block_on(task());
            drop(alive);
        })
        .with_context(|| format!("start the thread of the {name}"))?;
    Ok(async move {
        // Nothing is ever sent: it ends when the thread does.
        ended.await.unwrap_or_default();
    })
}

/// Leases from the ranges of this node's Node object, as soon as and whenever they are known.
pub(super) async fn follow_pod_cidrs(leases: Arc<Leases>, published: Arc<Published>, line: Handle) {
    let mut said = published.pod_cidrs.subscribe();
    loop {
        let cidrs = said.borrow_and_update().clone();
        if !cidrs.is_empty() {
            let serving = leases.clone();
            let served = tokio::task::spawn_blocking(move || serving.serve(&cidrs)).await;
            if let Ok(Err(error)) = served {
                warn!(%error, "the pod CIDRs of this node's Node cannot be served; trying again");
                tokio::time::sleep(RETRY).await;
                said.mark_changed();
            }
            let ranges = leases.ranges().borrow().clone();
            if line.bring(Input::PodRanges(ranges)).await.is_err() {
                return;
            }
        }
        if said.changed().await.is_err() {
            return;
        }
    }
}

pub(super) async fn keep_second_lock(said: Reporter) {
    second_lock::keep(LOCK_AUDIT, |found| {
        let problem = match found {
            Ok(Lock::Closed { .. }) => None,
            Ok(Lock::Open) => {
                warn!("the second lock was open or changed; it is closed again");
                None
            }
            Err(error) => Some(format!("{error:#}")),
        };
        let condition =
            problem.map(|problem| Condition::part(NodeFault::SecondLock, "second lock", problem));
        said.replace(condition);
    })
    .await;
}

/// Ports that stand for pods, kept from the node's own connections: whoever manages the node may change either setting.
pub(super) async fn keep_ports_reserved(run_dir: PathBuf, ports: PortRange, said: Reporter) {
    loop {
        let run_dir = run_dir.clone();
        let reserve = move || sysctl::reserve_ports(&run_dir, ports);
        let reserved = tokio::task::spawn_blocking(reserve).await;
        let problem = match reserved.context("reserve ports").flatten() {
            Ok(is_changed) => {
                if is_changed {
                    info!(
                        ?ports,
                        "net.ipv4.ip_local_reserved_ports is as pods need it"
                    );
                }
                None
            }
            Err(error) => Some(format!("{error:#}")),
        };
        said.replace(problem.map(|it| Condition::node(NodeFault::PortsNotReserved, it)));
        beat(PORTS_AUDIT).await;
    }
}

/// Routes to other nodes' pods. When the agent ends they stay.
pub(super) async fn keep_routes(table: KernelRoutes, published: Arc<Published>, said: Reporter) {
    let (to, news) = mpsc::channel(1);
    let watch = async {
        while let Err(error) = netlink::routes::watch(to.clone()).await {
            warn!(
                error = format!("{error:#}"),
                "changes of routes are followed again"
            );
            tokio::time::sleep(RETRY).await;
        }
    };
    let wanted = published.routes.subscribe();
    let planned = published.routes.subscribe();
    let keep = routes::keep(table, wanted, news, ROUTE_AUDIT, |report| {
        let mut unreachable = report.unreachable.clone();
        for problem in &planned.borrow().plan.problems {
            unreachable
                .entry(problem.node.clone())
                .or_insert_with(|| problem.reason.clone());
        }
        let peers = unreachable
            .into_iter()
            .map(|(node, reason)| Condition::peer(node, PeerFault::Unreachable, reason));
        let own = report.problems.first();
        let own = own.map(|problem| Condition::node(NodeFault::RoutesUnknown, problem.as_str()));
        said.replace(peers.chain(own));
    });
    tokio::select! {
        () = watch => {}
        () = keep => {}
    }
}

/// Tells the line what netlink says of the node's network.
pub(super) async fn follow<T, F>(
    line: Handle,
    watch: fn(mpsc::Sender<T>) -> F,
    input: fn(T) -> Input,
) where
    T: Send + 'static,
    F: Future<Output = Result<()>>,
{
    let (to, mut news) = mpsc::channel(1);
    let watch = async {
        loop {
            match watch(to.clone()).await {
                Ok(()) => return,
                Err(error) => warn!(error = format!("{error:#}"), "the network is watched again"),
            }
            tokio::time::sleep(RETRY).await;
        }
    };
    let tell = async {
        while let Some(now) = news.recv().await {
            if line.bring(input(now)).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = watch => {}
        () = tell => {}
    }
}

/// Is there anything of an earlier agent that may go later?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Left {
    Nothing,
    Something,
}

/// Lets nothing pass the devices that no lease explains: whoever is behind them has no policy.
pub(super) fn protect_unexplained(kernel: &Kernel, devices: &[Device], leases: &LeaseTable) {
    let is_leased = |device: &Device| leases.values().any(|lease| lease.device() == device.name);
    for Device { name, ifindex, .. } in devices.iter().filter(|device| !is_leased(device)) {
        match kernel.join(name, *ifindex) {
            Ok(()) => warn!(device = name, "a device of ours without a lease is closed"),
            Err(error) => warn!(
                device = name,
                error = format!("{error:#}"),
                "a device of ours without a lease cannot be closed"
            ),
        }
    }
}

/// Removes what an earlier agent left and no longer serves, and says what it found.
pub(super) fn settle(kernel: &Kernel, devices: &[Device]) -> Left {
    let known: Vec<_> = devices
        .iter()
        .map(|device| (device.name.clone(), device.ifindex))
        .collect();
    let found = match kernel.census(&known) {
        Ok(found) => found,
        Err(error) => {
            warn!(
                error = format!("{error:#}"),
                "what an earlier agent left is not known"
            );
            return Left::Something;
        }
    };
    let (current, others): (Vec<_>, Vec<_>) =
        found.iter().partition(|it| it.state == State::Current);
    info!(found = current.len(), "links and tables are in place");
    let mut left = Left::Nothing;
    for it in others {
        let what = &it.what;
        match it.state {
            State::Stale | State::Stray | State::Unused => match it.remove() {
                Ok(()) => info!(what, state = ?it.state, "removed"),
                Err(error) => {
                    let error = format!("{error:#}");
                    warn!(what, state = ?it.state, error, "cannot be removed");
                }
            },
            State::InUse => {
                info!(what, "of another version and still in use, left alone");
                left = Left::Something;
            }
            State::Unknown => warn!(what, "not ours, left alone"),
            State::Current => {}
        }
    }
    left
}

/// Removes what earlier agents have left that could not go at the start: tables, once their programs are out of
/// use. The kernel lets go of a program, and so of its tables, a while after it was replaced.
pub(super) async fn settle_later(kernel: Arc<Kernel>, published: Arc<Published>) {
    let mut programs = published.programs.subscribe();
    if programs
        .wait_for(|now| *now == Programs::Ours)
        .await
        .is_err()
    {
        return;
    }
    loop {
        tokio::time::sleep(RETRY).await;
        let kernel = kernel.clone();
        let left = match netlink::pod_devices().await {
            Ok(devices) => tokio::task::spawn_blocking(move || settle(&kernel, &devices)).await,
            Err(error) => {
                warn!(
                    error = format!("{error:#}"),
                    "what an earlier agent left is not known"
                );
                Ok(Left::Something)
            }
        };
        match left {
            Ok(Left::Something) => beat(LEFT_AUDIT).await,
            Ok(Left::Nothing) | Err(_) => return,
        }
    }
}

/// Tells the container runtime of the network, once pods can have it.
///
/// # Errors
/// The plugin that must be there first is not known.
pub(super) fn announce_network(
    folder: PathBuf,
    settings: &Settings,
    board: Arc<Board>,
) -> Result<impl Future<Output = ()> + use<>> {
    let network = install::Network {
        agent_socket: settings.run_dir.join("cni.sock"),
        released_dir: settings.state_dir.join("released"),
    };
    let expected = match settings.cni_bin_dir.clone() {
        None => None,
        Some(folder) => Some(install::Expected {
            plugin: install::own_plugin()?,
            folder,
        }),
    };
    Ok(install::keep_announced(
        folder,
        network,
        expected,
        install::Pace::default(),
        move || {
            // A node that booted while the API server is away runs the pods that it knows, and pods that some
            // other node does not reach are better than none.
            let state = board.node();
            std::future::ready(state.stops_pods.first().map(ToString::to_string))
        },
    ))
}
