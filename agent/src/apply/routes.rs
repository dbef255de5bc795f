//! The routes of a plan against those of the kernel. Ours are known by their protocol number; those of
//! others are never touched. How to ask the kernel is behind [`RouteTable`].

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use super::Deletes;
use crate::beat::{LOOK, beat};
use crate::compile::route::{Route, RoutePlan};

/// The metric of a route to another node.
const METRIC: u32 = 1024;
/// The metric of a range of this node's own: whatever else there is goes before it.
const LAST_METRIC: u32 = 65_536;
/// The loopback device has this index in every network namespace.
const LOOPBACK: u32 = 1;

/// A route as the kernel's main table has it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Installed {
    pub to: IpNet,
    pub hop: Hop,
    pub owner: Owner,
    pub metric: u32,
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Hop {
    Via {
        gateway: IpAddr,
        ifindex: u32,
    },
    /// Whoever has the address answers on this device's link.
    Link {
        ifindex: u32,
    },
    Unreachable,
    /// Anything else, which is never ours.
    Other,
}

/// Who has put a route there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Owner {
    Us,
    /// By protocol number (`/etc/iproute2/rt_protos`).
    Protocol(u8),
}

/// The main routing tables of the node, of both families.
pub trait RouteTable {
    /// Every route, of whomever.
    fn all(&self) -> impl Future<Output = io::Result<Vec<Installed>>> + Send;
    /// Adds a route where there is none of its prefix and metric.
    fn add(&self, route: &Installed) -> impl Future<Output = io::Result<()>> + Send;
    /// Puts a route in the place of ours of its prefix and metric, in one step.
    fn replace(&self, route: &Installed) -> impl Future<Output = io::Result<()>> + Send;
    /// Removes one of ours. One that is gone is no error.
    fn remove(&self, route: &Installed) -> impl Future<Output = io::Result<()>> + Send;
}

/// What is wanted of the kernel.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Wanted {
    pub plan: RoutePlan,
    pub deletes: Deletes,
}

/// What a pass has found and done.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RouteReport {
    /// Why the pods of these nodes are not reached, or might not be; the first reason of each.
    pub unreachable: BTreeMap<Arc<str>, String>,
    /// What is wrong beside.
    pub problems: Vec<String>,
    /// Routes written.
    pub written: usize,
    /// Routes removed.
    pub removed: usize,
}

impl RouteReport {
    /// Everything that is wrong, each in one line.
    pub fn lines(&self) -> impl Iterator<Item = &String> {
        self.problems.iter().chain(self.unreachable.values())
    }
}

/// Keeps the kernel's routes as wanted: at every change of the plan, whenever `news` says that the kernel's
/// may have changed, and at every `audit`, sooner after a failure. Ends when nobody can want anything any more.
pub async fn keep<T: RouteTable>(
    table: T,
    mut wanted: watch::Receiver<Wanted>,
    mut news: mpsc::Receiver<()>,
    audit: Duration,
    mut say: impl FnMut(RouteReport),
) {
    loop {
        let now = wanted.borrow_and_update().clone();
        let report = reconcile(&table, &now).await;
        // What failed is tried again soon, and who is not reached is looked for now and then.
        let audit = match (report.problems.is_empty(), report.unreachable.is_empty()) {
            (false, _) => audit.min(LOOK),
            (true, false) => audit.min(6 * LOOK),
            (true, true) => audit,
        };
        say(report);
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() {
                return;
            },
            Some(()) = news.recv() => {}
            () = beat(audit) => {}
        }
    }
}

/// Makes the kernel hold what is wanted. Goes on after a failure; what failed is in the report, and the
/// next pass tries again.
pub async fn reconcile<T: RouteTable>(table: &T, wanted: &Wanted) -> RouteReport {
    let mut report = RouteReport::default();
    let actual = match table.all().await {
        Ok(actual) => actual,
        Err(error) => {
            let problem = format!("the routes of this node cannot be read: {error}");
            report.problems.push(problem);
            return report;
        }
    };
    let found = Found::of(&actual);
    let mut held: BTreeSet<(IpNet, u32)> = BTreeSet::new();
    for (to, route) in &wanted.plan.routes {
        let outcome = match found.desired(*to, route) {
            Err(problem) => Err(problem),
            Ok(desired) => {
                held.insert((*to, desired.metric));
                match found.write(table, &desired).await {
                    Ok(Written::Now) => {
                        report.written += 1;
                        info!(%to, hop = ?desired.hop, "route");
                        Ok(())
                    }
                    Ok(Written::Before) => Ok(()),
                    Err(problem) => Err(problem),
                }
            }
        };
        match (outcome, route) {
            (Ok(()), _) => {}
            (Err(problem), Route::ToNode { node, .. }) => {
                report.unreachable.entry(node.clone()).or_insert(problem);
            }
            (Err(problem), Route::Nowhere) => report.problems.push(problem),
        }
    }
    if wanted.deletes == Deletes::Held {
        return report;
    }
    let is_stray = |it: &&Installed| !held.contains(&(it.to, it.metric));
    for stray in found.ours.into_values().flatten().filter(is_stray) {
        let to = stray.to;
        match table.remove(stray).await {
            Ok(()) => {
                report.removed += 1;
                info!(%to, hop = ?stray.hop, "route removed");
            }
            Err(error) => report.problems.push(format!(
                "our route to {to} is of no use and cannot be removed: {error}"
            )),
        }
    }
    report
}

/// What the kernel holds.
struct Found<'a> {
    ours: BTreeMap<IpNet, Vec<&'a Installed>>,
    others: Vec<&'a Installed>,
    /// The protocol of some route that is not ours, by prefix.
    taken: BTreeMap<IpNet, u8>,
}

enum Written {
    Before,
    Now,
}

impl<'a> Found<'a> {
    fn of(actual: &'a [Installed]) -> Self {
        let mut found = Self {
            ours: BTreeMap::new(),
            others: Vec::new(),
            taken: BTreeMap::new(),
        };
        for route in actual {
            match route.owner {
                Owner::Us => found.ours.entry(route.to).or_default().push(route),
                Owner::Protocol(protocol) => {
                    found.others.push(route);
                    found.taken.entry(route.to).or_insert(protocol);
                }
            }
        }
        found
    }

    /// The route as it should be; why not, if it cannot be.
    fn desired(&self, to: IpNet, route: &Route) -> Result<Installed, String> {
        let (hop, metric) = match route {
            Route::Nowhere => (Hop::Unreachable, LAST_METRIC),
            Route::ToNode { node, via } => {
                let ifindex = self.device_of(via).ok_or_else(|| {
                    format!(
                        "node {node} at {via} is not on this node's link: native routes need one layer 2"
                    )
                })?;
                let gateway = *via;
                (Hop::Via { gateway, ifindex }, METRIC)
            }
        };
        Ok(Installed {
            to,
            hop,
            owner: Owner::Us,
            metric,
        })
    }

    /// Writes a route unless it is there. The route of somebody else to a node's range stays, and ours is
    /// not put beside it: who would win is not ours to say.
    async fn write<T: RouteTable>(
        &self,
        table: &T,
        desired: &Installed,
    ) -> Result<Written, String> {
        let to = desired.to;
        let ours = self.ours.get(&to).map(Vec::as_slice).unwrap_or_default();
        let taken = self
            .taken
            .get(&to)
            .filter(|_| desired.hop != Hop::Unreachable);
        let written = if ours.contains(&desired) {
            Ok(Written::Before)
        } else if ours.iter().any(|it| it.metric == desired.metric) {
            table.replace(desired).await.map(|()| Written::Now)
        } else if taken.is_none() {
            table.add(desired).await.map(|()| Written::Now)
        } else {
            Ok(Written::Before)
        };
        let written =
            written.map_err(|error| format!("the route to {to} cannot be written: {error}"))?;
        match taken {
            None => Ok(written),
            Some(protocol) => Err(format!(
                "a route to {to} that is not ours is in the way (protocol {protocol}); it stays until \
                 somebody removes it"
            )),
        }
    }

    /// The device on whose link an address is, by the longest prefix. Our routes lead to pods, and no node
    /// is among them.
    fn device_of(&self, address: &IpAddr) -> Option<u32> {
        let to_it = self.others.iter().filter(|it| it.to.contains(address));
        let best = to_it.max_by_key(|it| (it.to.prefix_len(), std::cmp::Reverse(it.metric)))?;
        match best.hop {
            Hop::Link { ifindex } if ifindex != LOOPBACK => Some(ifindex),
            _ => None,
        }
    }
}

/// Says once what changed about the routes' problems.
pub fn log(before: &RouteReport, now: &RouteReport) {
    let known: BTreeSet<&String> = before.lines().collect();
    for problem in now.lines().filter(|line| !known.contains(line)) {
        warn!(problem, "routes");
    }
    if !known.is_empty() && now.lines().next().is_none() {
        info!("every route is in place again");
    }
}

#[cfg(test)]
mod tests;
