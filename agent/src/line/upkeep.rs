//! What the line looks after although nobody says anything: writes that failed, hooks, drift, ended flows.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use tracing::warn;

use super::machine::{Disconnecting, Machine, Swept};
use super::pods::subject;
use super::{Line, Programs, QUIET, TICK};
use crate::apply::TableError;
use crate::beat;
use crate::conditions::{Condition, NodeFault, PodFault};
use crate::kernel::clock::monotonic;
use crate::kernel::{DeviceFault, HookOf};

/// How often hooks are compared with what they should hold, in ticks.
const HOOK_TICKS: u64 = 5;
/// How often ended flows are swept, in ticks.
const SWEEP_TICKS: u64 = 30;
/// How long after a comparison of all tables with the kernel the next one begins, in ticks.
const AUDIT_TICKS: u64 = 120;
/// Rows for which it begins a tick later, so that looking costs the same at any size of cluster: some 1.5 µs for a row on
/// an idle machine, whose caches hold nothing of it.
const ROWS_OF_A_TICK: usize = 1024;
/// Parts in which tables are compared, one a tick: nobody waits for all of them.
pub(super) const AUDITED: [&str; 3] = [
    "tables of services",
    "tables of policy",
    "tables of nodes and pods",
];

/// At which tick what is looked at next.
#[derive(Debug)]
pub(super) struct Due {
    hooks: u64,
    sweep: u64,
    audit: u64,
    /// Which part of the tables is then compared.
    part: usize,
    /// One of the parts before could not be read.
    is_unread: bool,
}

impl Default for Due {
    fn default() -> Self {
        Self {
            hooks: HOOK_TICKS,
            sweep: SWEEP_TICKS,
            audit: AUDIT_TICKS,
            part: 0,
            is_unread: false,
        }
    }
}

/// When the line ticks.
#[derive(Debug)]
pub(super) struct Clock {
    begun: tokio::time::Instant,
    /// How many seconds after that it was at the last tick.
    ticks: u64,
    last_news: tokio::time::Instant,
}

impl Default for Clock {
    fn default() -> Self {
        let now = tokio::time::Instant::now();
        // So that it looks when all others do.
        let passed = beat::LOOK.saturating_sub(beat::until(monotonic(), beat::LOOK));
        let begun = now.checked_sub(passed).unwrap_or(now);
        Self {
            begun,
            ticks: begun.elapsed().as_secs(),
            last_news: now,
        }
    }
}

impl Clock {
    /// Something has come in.
    pub(super) fn is_news(&mut self) {
        self.last_news = tokio::time::Instant::now();
    }

    /// Waits for the next tick, and returns which it is: the next second, or, when nothing happens, the next of those in
    /// which everything is looked at.
    pub(super) async fn tick(&mut self) -> u64 {
        let next = self.next(self.last_news.elapsed() >= QUIET);
        let due = self.begun + TICK * u32::try_from(next).unwrap_or(u32::MAX);
        tokio::time::sleep_until(due).await;
        // Who is late does not hurry to catch up.
        self.ticks = next.max(self.begun.elapsed().as_secs());
        next
    }

    fn next(&self, is_quiet: bool) -> u64 {
        match is_quiet {
            false => self.ticks + 1,
            true => (self.ticks + 1).next_multiple_of(HOOK_TICKS),
        }
    }
}

impl<M: Machine> Line<M> {
    /// To be called every second, or, when nothing happens, at every [`HOOK_TICKS`].
    pub(super) fn tick(&mut self, now: Instant) {
        self.services.tables.tick(now);
        self.nodes.table.tick();
        if self.is_complete {
            self.continue_policy(now);
        }
        // Ticks are left out when the line was busy: nothing waits for a certain one.
        if self.ticks >= self.due.hooks && self.programs == Programs::Ours {
            self.due.hooks = (self.ticks + 1).next_multiple_of(HOOK_TICKS);
            self.repair_hooks();
        }
        let sweeps = self.ticks >= self.due.sweep;
        if sweeps {
            self.due.sweep = (self.ticks + 1).next_multiple_of(SWEEP_TICKS);
        }
        if sweeps || !self.pods.closed.is_empty() {
            let gone = std::mem::take(&mut self.pods.closed);
            match self.machine.sweep(gone) {
                Ok(Some(swept)) => {
                    let Swept { began, led_to } = swept;
                    self.services.tables.end_unled(began, &led_to);
                }
                Ok(None) => {}
                Err(gone) => self.pods.closed = gone,
            }
        }
        let disconnecting = self.machine.disconnecting();
        if disconnecting == Disconnecting::Failed {
            self.services.tables.look_for_departed_later(now);
        }
        if disconnecting != Disconnecting::Busy
            && let Some(departed) = self.services.tables.take_departed(now)
        {
            self.machine.disconnect(departed);
        }
        // All nodes are looked at, so only if something is to be tried again.
        if !self.nodes.problems.is_empty() {
            self.pass_uplinks();
        }
        self.audit_tables();
    }

    /// Puts programs back that somebody took off. What is wrong with a pod's device is that pod's matter.
    fn repair_hooks(&mut self) {
        let pods = self.pods.devices_of_open();
        let left = self.machine.keep_settings(&pods);
        let mut found: Vec<Condition> = left
            .into_iter()
            .filter_map(|(device, why)| {
                let lease = self.pods.of_device(device)?;
                let text = format!("{device}: {why}");
                Some(Condition::pod(
                    subject(&lease),
                    PodFault::DeviceSettings,
                    text,
                ))
            })
            .collect();
        let hooks = match self.machine.hooks(pods, &self.nodes.devices) {
            Ok(hooks) => hooks,
            Err(error) => {
                let text = format!("the devices cannot be asked for: {error}");
                found.push(Condition::part(NodeFault::HookLost, "hooks", text));
                self.said.hooks.replace(found);
                return;
            }
        };
        let broken = hooks
            .node
            .into_iter()
            .filter_map(|hook| Some((hook.of, format!("hook {}", hook.name), hook.problem?)));
        let of: BTreeSet<HookOf> = broken.map(|(of, ..)| of).collect();
        let mut why = BTreeMap::new();
        for of in of.iter().copied() {
            let placed = match of {
                HookOf::Sockets => self.machine.place_socket_hooks(),
                HookOf::Pods => self.machine.place_pod_hooks(),
                HookOf::Uplink => self.machine.place_net_hooks(&self.nodes.devices),
            };
            if let Err(error) = placed {
                why.insert(of, format!("{error:#}"));
            }
            warn!(?of, "hooks did not hold our programs; they were put back");
        }
        if !of.is_empty() {
            found.extend(self.still_broken(&why));
        }
        let mut gone = BTreeSet::new();
        for it in hooks.devices {
            let Some(lease) = self.pods.of_device(&it.device) else {
                continue;
            };
            if it.problem == DeviceFault::Gone {
                // Nothing can be put back; it is that pod's until its DEL comes.
                gone.insert(lease.attachment.clone());
                continue;
            }
            match self.machine.adopt(&it.device, it.ifindex) {
                Ok(()) => warn!(device = it.device, problem = %it.problem, "put back"),
                Err(error) => {
                    let text = format!("{}: {}: {error:#}", it.device, it.problem);
                    found.push(Condition::pod(subject(&lease), PodFault::HookLost, text));
                }
            }
        }
        self.pods.lost(gone);
        self.said.hooks.replace(found);
    }

    /// The hooks of the node that do not hold our programs although somebody has just put them there.
    fn still_broken(&self, why: &BTreeMap<HookOf, String>) -> Vec<Condition> {
        let pods = self.pods.devices_of_open();
        let hooks = self.machine.hooks(pods, &self.nodes.devices);
        let hooks = hooks.map(|hooks| hooks.node).unwrap_or_default();
        let broken = hooks.into_iter().filter_map(|hook| {
            let fault = match hook.of {
                HookOf::Sockets | HookOf::Pods => NodeFault::HookLost,
                HookOf::Uplink => NodeFault::UplinkHookLost,
            };
            let problem = hook.problem?;
            let text = match why.get(&hook.of) {
                Some(why) => format!("{problem}: {why}"),
                None => problem,
            };
            Some(Condition::part(fault, format!("hook {}", hook.name), text))
        });
        broken.collect()
    }

    /// Desired against kernel: the part that is due, if one is.
    fn audit_tables(&mut self) {
        if self.ticks < self.due.audit {
            return;
        }
        let part = self.due.part;
        let audited = match part {
            0 => self.services.tables.audit(),
            1 => self.policy.tables.audit(),
            _ => self.audit_nodes_and_pods(),
        };
        let name = AUDITED[part];
        let reporter = &self.said.tables[part];
        match audited {
            Ok(0) => reporter.replace([]),
            Ok(rows) => {
                warn!(
                    rows,
                    part = name,
                    "the kernel's tables were not as we left them; repairing"
                );
                self.drifted += rows;
                reporter.replace([]);
            }
            Err(error) => {
                let fault = NodeFault::TableUnreadable;
                reporter.replace([Condition::part(fault, name, error.to_string())]);
                self.due.is_unread = true;
            }
        }
        self.due.part = (part + 1) % AUDITED.len();
        if self.due.part == 0 {
            let rows: usize = self.fills().iter().map(|fill| fill.rows).sum();
            let later = AUDIT_TICKS.max((rows / ROWS_OF_A_TICK) as u64);
            // Whoever waits for a node that is not ready waits for this.
            let is_unread = std::mem::take(&mut self.due.is_unread);
            self.due.audit = self.ticks + if is_unread { HOOK_TICKS } else { later };
        }
    }

    fn audit_nodes_and_pods(&mut self) -> Result<usize, TableError> {
        let uplinks = self.nodes.uplinks.audit();
        // Also when one of its two tables cannot be read: what was found in the other is written.
        if !matches!(uplinks, Ok(0)) {
            self.pass_uplinks();
        }
        Ok(self.nodes.table.audit()? + self.pods.devices.audit()? + uplinks?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_nothing_happens_only_the_ticks_are_left_in_which_everything_is_looked_at() {
        let clock = |ticks| Clock {
            ticks,
            ..Clock::default()
        };
        assert_eq!(clock(7).next(false), 8);
        for (now, next) in [(7, 10), (10, 15), (29, 30)] {
            assert_eq!(clock(now).next(true), next);
            assert!(clock(now).next(true).is_multiple_of(HOOK_TICKS));
        }
        const { assert!(SWEEP_TICKS.is_multiple_of(HOOK_TICKS)) };
    }
}
