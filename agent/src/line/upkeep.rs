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
/// How often tables are compared with the kernel and ended flows are swept, in ticks.
const SWEEP_TICKS: u64 = 30;

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
            self.audit_tables();
            self.pass_uplinks();
        }
    }

    /// Puts programs back that somebody took off. What is wrong with a pod's device is that pod's matter.
    fn repair_hooks(&mut self) {
        let pods = self.pods.devices_of_open();
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

    /// Desired against kernel, for all tables that we fill.
    fn audit_tables(&mut self) {
        match self.audit() {
            Ok(0) => self.said.tables.replace([]),
            Ok(rows) => {
                warn!(
                    rows,
                    "the kernel's tables were not as we left them; repairing"
                );
                self.drifted += rows;
                self.said.tables.replace([]);
            }
            Err(error) => {
                let condition = Condition::node(NodeFault::TableUnreadable, error.to_string());
                self.said.tables.replace([condition]);
            }
        }
    }

    fn audit(&mut self) -> Result<usize, TableError> {
        Ok(self.services.tables.audit()?
            + self.nodes.table.audit()?
            + self.policy.tables.audit()?
            + self.pods.devices.audit()?
            + self.nodes.uplinks.audit()?)
    }
}
