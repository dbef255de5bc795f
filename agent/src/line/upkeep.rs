//! What the line looks after although nobody says anything: writes that failed, hooks, drift, ended flows.

use std::time::Instant;

use tracing::warn;

use super::machine::Machine;
use super::{Line, Programs};
use crate::apply::TableError;
use crate::conditions::{Condition, NodeFault, PodFault};
use crate::kernel::Hook;

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

    /// Puts programs back that somebody took off. A hook of a pod is that pod's matter.
    fn repair_hooks(&mut self) {
        let pods = self.pods.devices_of_open();
        let hooks = self.machine.hooks(pods.clone(), &self.nodes.devices);
        let broken: Vec<(Hook, String)> = hooks
            .into_iter()
            .filter_map(|mut hook| Some((hook.problem.take()?, hook)))
            .map(|(problem, hook)| (hook, problem))
            .collect();
        let mut of_node = Vec::new();
        let mut of_pods = Vec::new();
        if broken
            .iter()
            .any(|(hook, _)| Hook::is_of_uplink(&hook.name))
        {
            self.place_net_hooks();
        }
        let mut are_sockets_placed = false;
        for (hook, problem) in broken {
            let device = pods
                .iter()
                .find(|(device, _)| hook.name.starts_with(device.as_str()));
            let Some((device, ifindex)) = device else {
                if !Hook::is_of_uplink(&hook.name) && !are_sockets_placed {
                    are_sockets_placed = true;
                    if let Err(error) = self.machine.place_socket_hooks() {
                        warn!(error = format!("{error:#}"), "cannot be put back");
                    }
                }
                let part = format!("hook {}", hook.name);
                of_node.push(Condition::part(NodeFault::HookLost, part, problem));
                continue;
            };
            let Some(pod) = self.pods.of_device(device) else {
                continue;
            };
            warn!(%pod, hook = hook.name, problem, "a hook does not hold our program; putting it back");
            if let Err(error) = self.machine.open(device, *ifindex) {
                let text = format!("{}: {problem}: {error:#}", hook.name);
                of_pods.push(Condition::pod(pod, PodFault::HookLost, text));
            }
        }
        self.said.hooks.replace(of_node.into_iter().chain(of_pods));
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
