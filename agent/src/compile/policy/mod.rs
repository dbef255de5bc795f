//! From policies, pods, namespaces and nodes to the rows of the policy tables (docs/architecture.md,
//! "Policy: classes, not identities"). Writing them is not here.
//!
//! Read in this order: `predicate` (what a rule asks of an address), `region` (which blocks an address is in), `rules` (what holds
//! for a pod), `subject` (for which pod), `question` (what is asked at all), `group` and `claim` (about whom), `graph` (all of that, kept up with
//! every change), `verdict` and `ports` (what a list of rules answers to a class), `number` and `tables` (how all of it is numbered),
//! `transition` (how to get from one state to the next). `explain` says why, and what is missing, `compare` what a change opens and closes.

mod book;
mod claim;
mod class;
mod compare;
mod encode;
mod explain;
mod graph;
mod group;
mod number;
mod ports;
mod predicate;
mod question;
mod region;
mod report;
mod retain;
mod rules;
mod subject;
mod tables;
mod transition;
mod verdict;

use std::collections::BTreeSet;
use std::sync::Arc;

use weir_common::policy::{RuleId, RulesId};

pub use book::{Direction, RuleBook, RuleOwner};
pub use claim::NodeView;
pub use compare::{Change, Members, Packets, changes};
pub use explain::{Finding, Hearing, Holder, Missing, MissingPorts, Near, Why};
pub use report::{Claimant, Nothing, Part, Report};
use transition::Passing;
pub use transition::Step;

use super::policy_rows::{PodRules, PolicyRows};
use crate::model::{ClusterPolicy, Kind, ObjectId, ObjectName, Policy, Snapshot};
use graph::{Changed, Graph};
use tables::{Moves, Rows, Tables};

/// Objects that came, changed or went, by name.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Touched {
    pub pods: BTreeSet<ObjectName>,
    pub namespaces: BTreeSet<Arc<str>>,
    pub nodes: BTreeSet<Arc<str>>,
    pub policies: BTreeSet<ObjectName>,
    pub cluster_policies: BTreeSet<Arc<str>>,
}

impl Touched {
    /// Everything that there is.
    pub fn all(snapshot: &Snapshot) -> Self {
        Self {
            pods: snapshot.pods.keys().cloned().collect(),
            namespaces: snapshot.namespaces.keys().cloned().collect(),
            nodes: snapshot.nodes.keys().cloned().collect(),
            policies: snapshot.policies.keys().cloned().collect(),
            cluster_policies: snapshot.cluster_policies.keys().cloned().collect(),
        }
    }

    /// Adds an object, if policy looks at its kind.
    pub fn add(&mut self, id: &ObjectId) {
        let name = || id.name.name.clone();
        match id.kind {
            Kind::Pod => self.pods.insert(id.name.clone()),
            Kind::Namespace => self.namespaces.insert(name()),
            Kind::Node => self.nodes.insert(name()),
            Kind::NetworkPolicy => self.policies.insert(id.name.clone()),
            Kind::ClusterNetworkPolicy => self.cluster_policies.insert(name()),
            Kind::Service | Kind::EndpointSlice => false,
        };
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What `later` has touched, too.
    pub fn extend(&mut self, later: &Self) {
        self.pods.extend(later.pods.iter().cloned());
        self.namespaces.extend(later.namespaces.iter().cloned());
        self.nodes.extend(later.nodes.iter().cloned());
        self.policies.extend(later.policies.iter().cloned());
        let tiers = later.cluster_policies.iter().cloned();
        self.cluster_policies.extend(tiers);
    }

    /// The objects as people call them, policies first.
    pub fn names(&self) -> impl Iterator<Item = String> {
        fn of<'a>(kind: Kind, names: &'a BTreeSet<Arc<str>>) -> impl Iterator<Item = String> + 'a {
            names.iter().map(move |name| format!("{kind} {name}"))
        }
        let policies = self.policies.iter();
        let policies = policies.map(|name| format!("{} {name}", Kind::NetworkPolicy));
        let pods = self.pods.iter().map(|name| format!("{} {name}", Kind::Pod));
        policies
            .chain(of(Kind::ClusterNetworkPolicy, &self.cluster_policies))
            .chain(of(Kind::Namespace, &self.namespaces))
            .chain(pods)
            .chain(of(Kind::Node, &self.nodes))
    }
}

/// The policy of a node: kept up with every change in time that goes with what changes, not with what there is.
///
/// Only policies that select a pod of this node take part, so the size of the tables does not depend
/// on what policies the rest of the cluster has. When a first pod of a policy arrives, the classes of
/// exactly the addresses that the policy's selectors match change.
#[derive(Debug)]
pub struct Compiler {
    graph: Graph,
    /// Since the tables were last where the graph was.
    changed: Changed,
    tables: Tables,
    /// A way that is neither committed nor abandoned.
    planned: Option<(Moves, Rows, Passing)>,
}

impl Default for Compiler {
    fn default() -> Self {
        Self::with_hash_bits(u32::BITS)
    }
}

impl Compiler {
    /// No policy at all. Only so many bits of every hash are used: for tests of what happens when contents collide.
    pub fn with_hash_bits(bits: u32) -> Self {
        let mask = u32::MAX.checked_shr(u32::BITS.saturating_sub(bits));
        Self {
            graph: Graph::default(),
            changed: Changed::default(),
            tables: Tables::with_mask(mask.unwrap_or(0)),
            planned: None,
        }
    }

    /// Takes in what was touched since the last time, as it is now. The order does not matter, nor in how many parts it comes;
    /// what was touched and is as it was changes nothing.
    pub fn update(&mut self, touched: &Touched, snapshot: &Snapshot, node: &NodeView) {
        self.graph
            .update(touched, snapshot, node, &mut self.changed);
    }

    /// What has to be written, step by step, for the tables to be where everything is that was taken in; nothing if they are.
    /// It is to be committed or abandoned before the next is asked for.
    pub fn plan(&mut self) -> Vec<Step> {
        self.abandon();
        let Some(mut moves) = self.tables.moves(&self.graph, &self.changed) else {
            self.changed = Changed::default();
            return Vec::new();
        };
        let rows = self.tables.rows_of(&mut moves);
        let (steps, passing) = transition::steps(&mut self.tables, &self.graph, &moves, &rows);
        self.planned = Some((moves, rows, passing));
        steps
    }

    /// The steps are being written, and nothing else will be before they are.
    pub fn commit(&mut self) {
        if let Some((moves, rows, passing)) = self.planned.take() {
            self.tables.commit(moves, rows, &passing);
            self.changed = Changed::default();
        }
    }

    /// The steps will not be written. What was taken in waits for the next plan.
    pub fn abandon(&mut self) {
        if let Some((moves, ..)) = self.planned.take() {
            self.tables.abandon(moves);
        }
    }

    /// To be called now and then, not more often than rows stay that nothing points to any more: numbers of what is gone since the time
    /// before may stand for something else from now on.
    pub fn settle(&mut self) {
        self.abandon();
        self.tables.settle();
    }

    /// What the tables should hold when all committed steps are written.
    pub fn rows(&self) -> PolicyRows {
        self.tables.rows()
    }

    /// The rules of a pod of this node.
    pub fn rules_of(&self, pod: &ObjectName) -> Option<PodRules> {
        self.tables.rules_of(pod)
    }

    /// What the rule numbers in the rows mean.
    pub fn book(&self) -> RuleBook {
        self.tables.book()
    }

    /// The number under which a list of rules denies what none of its rules decides: its owner names the policies that
    /// isolate. `None` for one that does not isolate.
    pub fn denying_rule(&self, rules: RulesId) -> Option<RuleId> {
        self.tables.judge(rules)?.denial
    }

    /// Policies that hold, whether they still exist or do so for as long as a namespace that is being deleted has pods.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.graph.subjects().policies()
    }

    /// The pods of this node that a policy selects, in order.
    pub fn selected_by(&self, policy: &Policy) -> Vec<&ObjectName> {
        self.graph.subjects().selected_by(policy)
    }

    /// As [`Self::selected_by`], with the namespaces of the snapshot.
    pub fn selected_by_cluster_policy(
        &self,
        policy: &ClusterPolicy,
        snapshot: &Snapshot,
    ) -> Vec<&ObjectName> {
        let subjects = self.graph.subjects();
        subjects.selected_by_cluster_policy(policy, snapshot)
    }

    /// What a person should know, in order, each once.
    pub fn reports(&self) -> Vec<Report> {
        self.graph.reports()
    }
}
