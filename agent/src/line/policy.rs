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
use super::{Dirty, Line, Published};
use crate::apply::{GRACE, Origin, Outcome, Policies, Status};
use crate::compile::policy::{Compiler, NodeView, Report, RuleBook, Touched};
use crate::conditions::{About, Condition, NodeFault, ObjectFault};
use crate::explain::Matter;
use crate::explain::diff::Told;
use crate::model::{Object, ObjectName, Snapshot};

/// The tables of policy.
pub(super) type PolicyTables<M> = Policies<
    <M as Machine>::Table<Addr, Class>,
    <M as Machine>::Table<Prefix, Class>,
    <M as Machine>::Table<VerdictKey, VerdictRow>,
    <M as Machine>::Table<PortKey, PortRow>,
    <M as Machine>::Table<u32, u32>,
>;

/// Of those whose changes wait, so many are named.
const TOLD: usize = 3;

/// The state of policy.
#[derive(Debug)]
pub(super) struct Policy<M: Machine> {
    pub(super) tables: PolicyTables<M>,
    /// Whether an earlier agent's policy is in them.
    origin: Origin,
    pub(super) compiler: Compiler,
    /// What rule numbers mean, as it was said last.
    words: RuleBook,
    pub(super) reports: Vec<Report>,
    /// Are the tables ours, or still what an earlier agent has left?
    are_ours: bool,
    /// Why the latest policy is not in the kernel, when it had no room.
    refused: Option<String>,
    /// What was touched since the kernel had room for all.
    waiting: Touched,
    /// When numbers were settled.
    settled: Option<Instant>,
}

impl<M: Machine> Policy<M> {
    pub(super) fn resume(tables: PolicyTables<M>, origin: Origin) -> Self {
        Self {
            tables,
            origin,
            compiler: Compiler::default(),
            words: RuleBook::default(),
            reports: Vec::new(),
            are_ours: false,
            refused: None,
            waiting: Touched::default(),
            settled: None,
        }
    }

    /// Notes whether there was room, and whose changes wait if there was none.
    fn told(&mut self, refused: Option<String>) {
        let Some(why) = refused else {
            self.refused = None;
            self.waiting = Touched::default();
            return;
        };
        self.refused = Some(format!("{why}{}", who_waits(self.waiting.names())));
    }

    /// What keeps our programs from serving. One that has no room beside what an earlier agent wrote does not: that
    /// holds, whoever's programs read it.
    pub(super) fn awaits(&self) -> Option<&str> {
        match (&self.refused, self.tables.status()) {
            (Some(_), _) if self.origin == Origin::Kept => None,
            (None, Status::Done) => None,
            (Some(why), _) | (None, Status::Failed(why)) => Some(why),
            (None, Status::Pending) => Some("policy is not written yet"),
        }
    }
}

impl<M: Machine> Line<M> {
    /// Could another compilation have another outcome?
    pub(super) fn is_for_policy(&self, dirty: &Dirty) -> bool {
        dirty.policy || !dirty.touched.is_empty()
    }

    pub(super) fn pass_policy(&mut self, touched: &Touched, now: Instant) {
        let node = self.node_view();
        let policy = &mut self.policy;
        let snapshot = self.inputs.snapshot();
        policy.waiting.extend(touched);
        if policy.are_ours {
            policy.compiler.update(touched, snapshot, &node);
        }
        if policy.tables.is_underway() {
            policy.tables.reconcile(&mut self.pods.devices, now);
            if policy.tables.is_underway() {
                // What the kernel holds is neither the old nor the new: the way there is finished first.
                self.inputs.mark_policy();
                return;
            }
        }
        let since = policy.settled.map(|it| now.saturating_duration_since(it));
        if since.is_none_or(|it| it > 2 * GRACE) {
            policy.compiler.settle();
            policy.settled = Some(now);
        }
        self.pods.desire(&self.inputs);
        let keeps = |pod: &ObjectName| {
            let namespace = snapshot.namespaces.get(&pod.namespace);
            namespace.is_some_and(|it| it.keeps_established)
        };
        let pods = self.pods.open.values().map(|lease| subject(lease));
        let keeping = pods.filter(keeps).collect();
        self.pods.devices.keep_established(keeping);
        // Containers that belong to no pod have no policy.
        let others = self.pods.open.values().filter(|lease| lease.pod.is_none());
        policy
            .tables
            .also_open(others.map(|lease| subject(lease)).collect());
        let refused = match policy.are_ours {
            true => Self::follow(policy, &self.published),
            false => Self::begin(policy, &self.published, snapshot, &node),
        };
        policy.told(refused);
        let pass = policy.tables.reconcile(&mut self.pods.devices, now);
        if pass.outcome == Outcome::Unfinished && policy.tables.is_underway() {
            warn!(status = ?policy.tables.status(), "a change of policy is half way; it goes on");
        }
        let reports = policy.compiler.reports();
        if policy.reports != reports {
            policy.reports = reports;
            self.report_parts();
        }
    }

    /// This node, as far as policy must know it.
    pub(super) fn node_view(&self) -> NodeView {
        NodeView {
            name: self.settings.node.clone(),
            addresses: self.nodes.addresses.clone(),
            dns: self.settings.dns.addresses.clone(),
        }
    }

    /// Everything that policy goes by.
    pub(super) fn told(&self) -> Vec<Told> {
        let snapshot = self.inputs.snapshot();
        let objects = snapshot.namespaces.values().cloned().map(Object::Namespace);
        let objects = objects
            .chain(snapshot.nodes.values().cloned().map(Object::Node))
            .chain(snapshot.pods.values().cloned().map(Object::Pod))
            .chain(snapshot.policies.values().cloned().map(Object::Policy))
            .chain(
                snapshot
                    .cluster_policies
                    .values()
                    .cloned()
                    .map(Object::ClusterPolicy),
            );
        let dns = self.settings.dns.addresses.iter().copied().map(Told::Dns);
        dns.chain(objects.map(Told::Object)).collect()
    }

    /// What somebody needs to explain a decision of policy.
    pub(super) fn matter(&self, question: &weir_cli::question::Question) -> Result<Matter, String> {
        if !self.policy.are_ours {
            return Err("policy is not compiled yet: ask again when the node is ready".to_owned());
        }
        if let Some(why) = &self.policy.refused {
            return Err(format!(
                "the latest policy is not in the kernel, and what is there is not what the objects say: {why}"
            ));
        }
        let node = self.node_view();
        let snapshot = self.inputs.snapshot();
        let matter = Matter::take(question, &self.policy.compiler, snapshot, &node)?;
        Ok(matter.while_written(self.policy.awaits()))
    }

    /// Moves the tables on, such that on the way every packet is judged as before or as after (`compile::policy::transition`).
    /// Why there is no room, if there is none: the tables stay where they are, and so does what was compiled.
    fn follow(policy: &mut Policy<M>, published: &Published) -> Option<String> {
        let steps = policy.compiler.plan();
        if steps.is_empty() {
            return None;
        }
        // Words first: an event must not carry a number that nobody can explain. Until the kernel is there,
        // and until events that wait are read, numbers of before are seen too.
        let words = policy.compiler.book();
        if words != policy.words {
            let both = words.with_earlier(&policy.words);
            published.rules.store(Arc::new(both));
        }
        match policy.tables.follow(steps) {
            Ok(()) => {
                policy.compiler.commit();
                policy.words = words;
                None
            }
            Err(why) => {
                policy.compiler.abandon();
                Some(why)
            }
        }
    }

    /// The first time. The kernel holds what an earlier agent compiled. Nobody remembers what its numbers stand for, but
    /// they mean what ours mean: rows that are as they should be stay. And while programs of another version serve,
    /// which ask verdicts of their own, no address gets a class that only a way knows.
    fn begin(
        policy: &mut Policy<M>,
        published: &Published,
        snapshot: &Snapshot,
        node: &NodeView,
    ) -> Option<String> {
        let mut compiler = Compiler::default();
        compiler.update(&Touched::all(snapshot), snapshot, node);
        compiler.plan();
        compiler.commit();
        policy.words = compiler.book();
        published.rules.store(Arc::new(policy.words.clone()));
        let begun = policy.tables.desire_exactly(compiler.rows());
        policy.compiler = compiler;
        policy.are_ours = begun.is_ok();
        begun.err()
    }

    /// Goes on with a change of policy, or tries again one that had no room.
    pub(super) fn continue_policy(&mut self, now: Instant) {
        if self.policy.refused.is_some() {
            self.inputs.mark_policy();
        }
        self.policy.tables.reconcile(&mut self.pods.devices, now);
    }

    /// Parts of policies that allow nothing. One that is not understood at all is quarantined, and told as that.
    fn report_parts(&self) {
        let mut found = parts(&self.policy.reports);
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

/// The first of them by name, and how many more there are.
fn who_waits(mut names: impl Iterator<Item = String>) -> String {
    let first: Vec<String> = names.by_ref().take(TOLD).collect();
    match (first.is_empty(), names.count()) {
        (true, _) => String::new(),
        (false, 0) => format!("; what waits: {}", first.join(", ")),
        (false, more) => format!("; what waits: {} and {more} more", first.join(", ")),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_is_named_policies_first_and_not_without_end() {
        let mut touched = Touched::default();
        assert_eq!(who_waits(touched.names()), "");
        touched.pods.insert(ObjectName::new("shop", "web-0"));
        touched.policies.insert(ObjectName::new("shop", "large"));
        let two = "; what waits: NetworkPolicy shop/large, Pod shop/web-0";
        assert_eq!(who_waits(touched.names()), two);
        touched.namespaces.extend(["a".into(), "b".into()]);
        let many = "; what waits: NetworkPolicy shop/large, Namespace a, Namespace b and 1 more";
        assert_eq!(who_waits(touched.names()), many);
    }
}
