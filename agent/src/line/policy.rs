//! Policy's way: a compilation, and the steps by which the tables get there. What is compiled is `compile`'s, and
//! the order of rows `apply`'s.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use tracing::warn;
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::{Addr, Prefix};

use super::machine::Machine;
use super::pods::subject;
use super::{Dirty, Line};
use crate::apply::{Origin, Outcome, Policies, PolicyTarget, Status};
use crate::compile::PodRules;
use crate::compile::policy::{self, Compiled, NodeView, Report, Retained};
use crate::conditions::{About, Condition, NodeFault, ObjectFault};
use crate::model::ObjectName;

/// The tables of policy.
pub(super) type PolicyTables<M> = Policies<
    <M as Machine>::Table<Addr, Class>,
    <M as Machine>::Table<Prefix, Class>,
    <M as Machine>::Table<VerdictKey, VerdictRow>,
    <M as Machine>::Table<PortKey, PortRow>,
    <M as Machine>::Table<u32, u32>,
>;

/// The state of policy.
#[derive(Debug)]
pub(super) struct Policy<M: Machine> {
    pub(super) tables: PolicyTables<M>,
    /// Whether an earlier agent's policy is in them.
    origin: Origin,
    pub(super) compiled: Compiled,
    retained: Retained,
    /// The second half of a change whose first half is not written yet.
    after: Option<PolicyTarget>,
    /// Why the latest policy is not in the kernel, when it had no room.
    refused: Option<String>,
}

impl<M: Machine> Policy<M> {
    pub(super) fn resume(tables: PolicyTables<M>, origin: Origin) -> Self {
        Self {
            tables,
            origin,
            compiled: Compiled::default(),
            retained: Retained::default(),
            after: None,
            refused: None,
        }
    }

    /// Is a change half way? Then no other may start.
    fn is_half_way(&self) -> bool {
        self.after.is_some()
    }

    /// What keeps our programs from serving. One that has no room beside what an earlier agent wrote does not: that
    /// holds, whoever's programs read it.
    pub(super) fn awaits(&self) -> Option<&str> {
        match (&self.refused, self.tables.status()) {
            (Some(_), _) if self.origin == Origin::Kept => None,
            (None, Status::Done) if !self.is_half_way() => None,
            (Some(why), _) | (None, Status::Failed(why)) => Some(why),
            (None, Status::Pending | Status::Done) => Some("policy is not written yet"),
        }
    }
}

impl<M: Machine> Line<M> {
    /// Could another compilation have another outcome?
    pub(super) fn is_for_policy(&self, dirty: &Dirty) -> bool {
        let policy = &self.policy;
        let are_there_any =
            || !(self.inputs.snapshot().policies.is_empty() && policy.retained.is_empty());
        dirty.policy
            || dirty.namespace_labels && policy.compiled.asks_for_namespaces()
            || dirty.namespace_lives && are_there_any()
    }

    pub(super) fn pass_policy(&mut self, now: Instant) {
        if self.policy.is_half_way() {
            self.continue_policy(now);
            if self.policy.is_half_way() {
                // What the kernel holds is neither the old nor the new: the way there is finished first.
                self.inputs.mark_policy();
                return;
            }
        }
        self.pods.desire(&self.inputs);
        let node = NodeView {
            name: self.settings.node.clone(),
            addresses: self.nodes.addresses.clone(),
            dns: self.settings.dns.addresses.clone(),
        };
        let snapshot = self.inputs.snapshot();
        let kept = self.policy.retained.observe(snapshot);
        let compiled = policy::compile(snapshot, &node, &kept, &self.policy.compiled);
        // Words first: an event must not carry a number that nobody can explain. Until the kernel is there,
        // and until events that wait are read, numbers of before are seen too.
        let words = compiled.book().with_earlier(self.policy.compiled.book());
        self.published.rules.store(Arc::new(words));
        let before = std::mem::replace(&mut self.policy.compiled, compiled);
        self.write_policy(&before, now);
        if before.reports() != self.policy.compiled.reports() {
            self.report_parts();
        }
    }

    /// Moves the tables from one compilation to the next, such that every packet on the way is judged as
    /// before or as after (`compile::policy::Transition`).
    fn write_policy(&mut self, before: &Compiled, now: Instant) {
        let policy = &mut self.policy;
        let rows = policy.compiled.rows();
        // The first is compiled after nothing, but the kernel holds what an earlier agent compiled.
        let way = match self.is_complete {
            true => policy.compiled.transition_from(before),
            false => policy.compiled.without_transition(),
        };
        // Containers that belong to no pod have no policy.
        let mut pods = rows.rules.clone();
        let others = self.pods.open.values().filter(|lease| lease.pod.is_none());
        let open: BTreeMap<ObjectName, PodRules> = others
            .map(|lease| (subject(lease), PodRules::default()))
            .collect();
        pods.extend(open);
        let is_direct = way.classes == rows.classes && way.cidrs == rows.cidrs;
        let last = PolicyTarget {
            classes: rows.classes.clone(),
            cidrs: rows.cidrs.clone(),
            transitional: way
                .verdicts
                .iter()
                .filter(|(key, _)| !rows.verdicts.contains_key(key))
                .map(|(key, row)| (*key, *row))
                .collect(),
            verdicts: rows.verdicts.clone(),
            ports: rows.ports.clone(),
            pods: pods.clone(),
        };
        if !is_direct {
            policy.tables.desire(PolicyTarget {
                classes: way.classes,
                cidrs: way.cidrs,
                verdicts: way.verdicts,
                transitional: BTreeMap::new(),
                ports: way.ports,
                pods,
            });
            if !self.reach(before, now) {
                let policy = &mut self.policy;
                if policy.refused.is_none() {
                    warn!(status = ?policy.tables.status(), "a change of policy is half way; it goes on");
                    policy.after = Some(last);
                }
                return;
            }
        }
        self.policy.after = None;
        self.policy.tables.desire(last);
        self.reach(before, now);
    }

    /// Writes what policy desires. If it has no room the compilation before stays the one that holds, so
    /// that the next change starts from what the kernel has.
    fn reach(&mut self, before: &Compiled, now: Instant) -> bool {
        let policy = &mut self.policy;
        let pass = policy.tables.reconcile(&mut self.pods.devices, now);
        policy.refused = policy.tables.abandon_refused();
        if policy.refused.is_some() {
            policy.compiled = before.clone();
        }
        pass.outcome == Outcome::Complete
    }

    /// Goes on with a change of policy, or tries again one that had no room.
    pub(super) fn continue_policy(&mut self, now: Instant) {
        let policy = &mut self.policy;
        if policy.refused.is_some() {
            self.inputs.mark_policy();
        }
        let pass = policy.tables.reconcile(&mut self.pods.devices, now);
        if pass.outcome == Outcome::Complete
            && let Some(last) = policy.after.take()
        {
            policy.tables.desire(last);
            policy.tables.reconcile(&mut self.pods.devices, now);
        }
    }

    /// Parts of policies that allow nothing. One that is not understood at all is quarantined, and told as that.
    fn report_parts(&self) {
        let mut found = parts(self.policy.compiled.reports());
        let quarantined = self.inputs.quarantined();
        found.retain(|condition| {
            let object = condition.about.to_string();
            !quarantined.keys().any(|it| it.contains(&object))
        });
        self.said.parts.replace(found);
    }

    /// Is the latest policy in the kernel?
    pub(super) fn report_policy(&self) {
        let policy = &self.policy;
        let why = match (&policy.refused, policy.tables.status()) {
            (Some(why), _) | (None, Status::Failed(why)) => why,
            (None, Status::Pending | Status::Done) => return self.said.policy.replace([]),
        };
        let condition = Condition::node(NodeFault::PolicyNotWritten, why.as_str());
        self.said.policy.replace([condition]);
    }
}

/// Parts of policies and claims of addresses that were compiled otherwise than their author may expect.
fn parts(reports: &[Report]) -> Vec<Condition> {
    let mut found: BTreeMap<About, Condition> = BTreeMap::new();
    for report in reports {
        let (object, fault) = match report {
            Report::AllowsNothing { policy, .. } => (
                format!("NetworkPolicy {policy}"),
                ObjectFault::AllowsNothing,
            ),
            Report::AddressTaken { pod, .. } => (format!("Pod {pod}"), ObjectFault::AddressTaken),
        };
        let text = report.to_string();
        let text = text.strip_prefix(&format!("{object}: ")).unwrap_or(&text);
        let condition = Condition::object(object, fault, text);
        found
            .entry(condition.about.clone())
            .and_modify(|first| first.text = format!("{}; {text}", first.text))
            .or_insert(condition);
    }
    found.into_values().collect()
}
