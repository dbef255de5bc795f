//! What goes on beside the line for as long as the agent runs: it hears of the node's network, and keeps what
//! is not a table.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use tokio::sync::mpsc;
use tracing::warn;

use super::RETRY;
use crate::apply::routes;
use crate::config::Settings;
use crate::install;
use crate::kernel::netlink;
use crate::kernel::netlink::routes::KernelRoutes;
use crate::kernel::second_lock::{self, Lock};
use crate::line::{Handle, Left, Line, Programs, Published};
use crate::pods::Leases;

/// How often the second lock is looked at.
const LOCK_AUDIT: Duration = Duration::from_secs(5);
/// How often routes are looked at although nothing was heard of them.
const ROUTE_AUDIT: Duration = Duration::from_secs(30);
/// How often what an earlier agent left is looked at while some of it is in use.
const LEFT_AUDIT: Duration = Duration::from_secs(30);

/// Leases from the ranges of this node's Node object, as soon as and whenever they are known.
pub(super) async fn follow_pod_cidrs(leases: Arc<Leases>, published: Arc<Published>, line: Handle) {
    let mut said = published.pod_cidrs.subscribe();
    loop {
        let cidrs = said.borrow_and_update().clone();
        if !cidrs.is_empty() {
            let leases = leases.clone();
            let served = tokio::task::spawn_blocking(move || leases.serve(&cidrs)).await;
            if let Ok(Err(error)) = served {
                warn!(%error, "the pod CIDRs of this node's Node cannot be served; trying again");
                tokio::time::sleep(RETRY).await;
                said.mark_changed();
            }
            // Whether the node is ready is judged again after any work.
            if line.tell(|_| {}).await.is_err() {
                return;
            }
        }
        if said.changed().await.is_err() {
            return;
        }
    }
}

pub(super) async fn keep_second_lock(published: Arc<Published>) {
    second_lock::keep(LOCK_AUDIT, |found| {
        let problem = match found {
            Ok(Lock::Closed { drops }) => {
                published.lock_drops.store(drops, Ordering::Relaxed);
                None
            }
            Ok(Lock::Open) => {
                warn!("the second lock was open or changed; it is closed again");
                None
            }
            Err(error) => Some(format!("{error:#}")),
        };
        let before = published.lock_problem.swap(problem.clone().map(Arc::new));
        if let Some(problem) = problem
            && before.is_none_or(|before| *before != problem)
        {
            warn!(problem, "the second lock cannot be looked after");
        }
    })
    .await;
}

/// Routes to other nodes' pods. When the agent ends they stay.
pub(super) async fn keep_routes(table: KernelRoutes, published: Arc<Published>) {
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
    let keep = routes::keep(table, wanted, news, ROUTE_AUDIT, |report| {
        let report = Arc::new(report);
        let before = published.route_report.swap(report.clone());
        routes::log(&before, &report);
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
    know: fn(&mut Line, T),
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
            if line.tell(move |line| know(line, now)).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = watch => {}
        () = tell => {}
    }
}

/// Removes what earlier agents have left that could not go at the start: tables, once their programs are out of
/// use. The kernel lets go of a program, and so of its tables, a while after it was replaced.
pub(super) async fn settle(line: Handle, published: Arc<Published>) {
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
        let left = match netlink::pod_devices().await {
            Ok(devices) => line.ask(move |line| line.settle(&devices)).await,
            Err(error) => {
                warn!(
                    error = format!("{error:#}"),
                    "what an earlier agent left is not known"
                );
                Ok(Left::Something)
            }
        };
        match left {
            Ok(Left::Something) => tokio::time::sleep(LEFT_AUDIT).await,
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
    line: Handle,
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
            let line = line.clone();
            async move {
                // A node that booted while the API server is away runs the pods that it knows.
                let lacking = line.ask(|line| line.lacking()).await;
                lacking.is_ok_and(|reasons| reasons.is_empty())
            }
        },
    ))
}
