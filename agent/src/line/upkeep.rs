//! What the line looks after although nobody says anything: writes that failed, hooks, drift, ended flows.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use tracing::warn;

use super::machine::Machine;
use super::pods::subject;
use super::{Line, Programs};
use crate::apply::TableError;
use crate::conditions::{Condition, NodeFault, PodFault};
use crate::kernel::{DeviceFault, HookOf};

/// How often hooks are compared with what they should hold, in ticks.
const HOOK_TICKS: u64 = 5;
/// How often ended flows are swept, in ticks.
const SWEEP_TICKS: u64 = 30;
/// How long after a comparison of all tables with the kernel the next one begins, in ticks.
pub(super) const AUDIT_TICKS: u64 = 30;
/// Rows for which it begins a tick later, so that looking costs the same at any size of cluster: some 0.2 µs for a row.
const ROWS_OF_A_TICK: usize = 4096;
/// Parts in which tables are compared, one a tick: nobody waits for all of them.
pub(super) const AUDITED: [&str; 3] = [
    "tables of services",
    "tables of policy",
    "tables of nodes and pods",
];

impl<M: Machine> Line<M> {
    /// To be called every second.
    pub(super) fn tick(&mut self, now: Instant) {
        self.ticks += 1;
        self.services.tables.tick(now);
        self.nodes.table.tick();
        if self.is_complete {
            self.continue_policy(now);
        }
        if self.ticks.is_multiple_of(HOOK_TICKS) && self.programs == Programs::Ours {
            self.repair_hooks();
        }
        let sweeps = self.ticks.is_multiple_of(SWEEP_TICKS);
        if sweeps || !self.pods.closed.is_empty() {
            let gone = std::mem::take(&mut self.pods.closed);
            if let Err(gone) = self.machine.sweep(gone) {
                self.pods.closed = gone;
            }
        }
        if sweeps {
            self.pass_uplinks();
        }
        self.audit_tables();
    }

    /// Puts programs back that somebody took off. What is wrong with a pod's device is that pod's matter.
    fn repair_hooks(&mut self) {
        let pods = self.pods.devices_of_open();
        self.machine.keep_settings(&pods);
        let hooks = match self.machine.hooks(pods, &self.nodes.devices) {
            Ok(hooks) => hooks,
            Err(error) => {
                let text = format!("the devices cannot be asked for: {error}");
                self.said
                    .hooks
                    .replace([Condition::part(NodeFault::HookLost, "hooks", text)]);
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
        let mut found = match of.is_empty() {
            true => Vec::new(),
            false => self.still_broken(&why),
        };
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
        let Some(part) = self.ticks.checked_sub(self.audit_at) else {
            return;
        };
        let audited = match part {
            0 => self.services.tables.audit(),
            1 => self.policy.tables.audit(),
            _ => self.audit_nodes_and_pods(),
        };
        let part = AUDITED.len().min(part as usize + 1);
        let name = AUDITED[part - 1];
        if part == AUDITED.len() {
            let rows: usize = self.fills().iter().map(|fill| fill.rows).sum();
            let later = rows / ROWS_OF_A_TICK;
            self.audit_at = self.ticks + AUDIT_TICKS.max(later as u64);
        }
        let reporter = &self.said.tables[part - 1];
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
            }
        }
    }

    fn audit_nodes_and_pods(&mut self) -> Result<usize, TableError> {
        Ok(self.nodes.table.audit()? + self.pods.devices.audit()? + self.nodes.uplinks.audit()?)
    }
}
