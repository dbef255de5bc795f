//! Why a packet passes one of its ends or does not, and what is missing. The judge decides, from the compiled list and class; the words
//! stand beside its decision. Who is at the ends of a packet is not here.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weir_common::{Addr, Protocol};

use super::claim::{Claimant, Said};
use super::class::{Class, Fact, Facts};
use super::group::GroupKey;
use super::predicate::{NamespaceView, Predicate, Scope};
use super::rules::{ResolvedPeers, ResolvedPorts, ResolvedRule, Stage};
use super::verdict::Judge;
use super::{Compiler, Direction, RuleOwner};
use crate::model::{Labels, ObjectName, Requirement, Selector};

/// Rules that come as near as the nearest: so many are named.
const NEAREST: usize = 3;

/// Whose an address is, as policy on this node sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Holder {
    OwnNode,
    /// Where this node answers DNS.
    Dns,
    Node(Arc<str>),
    /// A pod in the network of a node.
    HostPod(ObjectName),
    Pod(ObjectName),
    Nobody,
}

/// All that decides at one end: what holds for a pod in a direction, and what its peer is to it. It can be taken elsewhere and heard there.
#[derive(Clone, Debug)]
pub struct Hearing {
    judge: Option<Arc<Judge>>,
    class: Class,
    is_itself: bool,
    peer: Option<(Arc<GroupKey>, NamespaceView)>,
    address: IpAddr,
}

/// What becomes of a packet at one end.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    pub allows: bool,
    pub why: Why,
    /// NetworkPolicies that isolate the pod in this direction, whether they were asked or not.
    pub isolated_by: Vec<ObjectName>,
    /// Rules `Pass` that brought the packet to the tier that decides.
    pub passed_by: Vec<RuleOwner>,
    /// Of a denial because no rule allows: the rules that lack the least, each with what it lacks.
    pub nearest: Vec<Near>,
    /// Of a yes: who would say no, were policies enforced that are only audited.
    pub audit: Option<RuleOwner>,
}

/// Who decided.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Why {
    /// A pod and itself.
    Itself,
    /// A pod and its own node.
    OwnNode,
    /// No rule of a ClusterNetworkPolicy decides, and no NetworkPolicy isolates.
    Open,
    Rule(RuleOwner),
}

/// A rule that would allow the packet, but for something.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Near {
    pub rule: RuleOwner,
    /// Never nothing.
    pub missing: Vec<Missing>,
}

/// What a rule asks, and is not so.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Missing {
    /// A requirement of the peer's labels, and what the label is.
    PodLabel(Requirement, Option<Arc<str>>),
    /// Of the labels of the peer's namespace.
    NamespaceLabel(Requirement, Option<Arc<str>>),
    /// The peer's namespace is not there, so its labels are not known.
    NamespaceUnknown(Arc<str>),
    /// The peer is in another namespace than the policy, which is in this one.
    Namespace(Arc<str>),
    /// The rule asks for pods, and the peer is none.
    APod,
    /// The address is not in the block.
    Block(IpNet),
    /// It is in the block, and excepted.
    Excepted { cidr: IpNet, by: IpNet },
    /// Nobody is meant: no part of its peers is understood.
    Anybody,
    /// The port is none of these.
    Port(MissingPorts),
}

/// The ports of a rule. Host order, both ends included.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct MissingPorts {
    pub numbers: Vec<(Protocol, u16, u16)>,
    /// Names that the destination has not, or that mean another number there.
    pub names: Vec<(Protocol, Arc<str>)>,
}

impl Compiler {
    /// Whose an address is.
    pub fn holder(&self, address: IpAddr) -> Holder {
        match self.graph.holder(&Addr::from(address)) {
            None => Holder::Nobody,
            Some(Claimant::OwnNode(_)) => Holder::OwnNode,
            Some(Claimant::Dns(_)) => Holder::Dns,
            Some(Claimant::Node(Said::Node(node))) => Holder::Node(node.clone()),
            Some(Claimant::Node(Said::Pod(pod))) => Holder::HostPod(pod.clone()),
            // No other node's devices are known.
            Some(Claimant::Node(Said::Devices)) => Holder::Nobody,
            Some(Claimant::Pod { age, .. }) => Holder::Pod(age.0.1.clone()),
        }
    }

    /// What decides about a pod of this node and a peer, as the tables are; `None` for a pod whose policy this node does not enforce.
    pub fn hearing(&self, pod: &ObjectName, direction: Direction, peer: IpAddr) -> Option<Hearing> {
        let [ingress, egress] = self.tables.judges_of(pod)?;
        let judge = match direction {
            Direction::Ingress => ingress,
            Direction::Egress => egress,
        };
        let holder = self.graph.holder(&Addr::from(peer));
        let group = match holder {
            Some(Claimant::Pod { group, .. } | Claimant::Dns(group)) => Some(*group),
            _ => None,
        };
        let known = group.and_then(|group| self.graph.groups().known(group));
        Some(Hearing {
            judge: judge.clone(),
            class: self.tables.class_at(peer),
            is_itself: matches!(holder, Some(Claimant::Pod { age, .. }) if age.0.1 == *pod),
            peer: known.map(|(key, namespace)| (key.clone(), namespace.clone())),
            address: peer,
        })
    }
}

impl Hearing {
    /// What becomes of a packet: its protocol, and its destination's port in host order, which is not looked at where the protocol has
    /// none.
    pub fn finding(&self, packet: (Protocol, u16)) -> Finding {
        let isolated_by = match self.judge.as_ref().and_then(|it| it.list.isolation()) {
            Some(RuleOwner::Isolated { policies, .. }) => policies,
            _ => Vec::new(),
        };
        let always = |why| Finding {
            allows: true,
            why,
            isolated_by: isolated_by.clone(),
            passed_by: Vec::new(),
            nearest: Vec::new(),
            audit: None,
        };
        if self.is_itself {
            return always(Why::Itself);
        }
        let Class::Of(facts) = &self.class else {
            return always(Why::OwnNode);
        };
        let Some(judge) = &self.judge else {
            return always(Why::Open);
        };
        let decision = judge.answer(&self.class).at(packet);
        let why = judge.owner(decision.rule).map_or(Why::Open, Why::Rule);
        let nearest = match &why {
            Why::Rule(RuleOwner::Isolated { .. }) => self.nearest(judge, facts, packet),
            _ => Vec::new(),
        };
        Finding {
            allows: decision.allows,
            why,
            isolated_by,
            passed_by: judge.passes(facts, packet),
            nearest,
            audit: judge.owner(decision.audit),
        }
    }

    /// The rules of NetworkPolicies that lack the least.
    fn nearest(&self, judge: &Judge, facts: &Facts, packet: (Protocol, u16)) -> Vec<Near> {
        let policies = judge.list.rules();
        let policies = policies.filter(|asked| asked.stage == Stage::Policies && !asked.is_audit);
        let mut all: Vec<(usize, Near)> = policies
            .map(|asked| {
                let missing = self.missing(asked.rule, facts, packet);
                let lacks = missing.iter().map(weight).sum();
                let rule = asked.owner;
                (lacks, Near { rule, missing })
            })
            .collect();
        let least = all.iter().map(|(lacks, _)| *lacks).min();
        all.retain(|(lacks, _)| Some(*lacks) == least);
        all.truncate(NEAREST);
        all.into_iter().map(|(_, near)| near).collect()
    }

    fn missing(&self, rule: &ResolvedRule, facts: &Facts, packet: (Protocol, u16)) -> Vec<Missing> {
        let mut missing = match &rule.peers {
            ResolvedPeers::Any => Vec::new(),
            ResolvedPeers::Of(predicates) => self.missing_peer(predicates, facts),
        };
        if let ResolvedPorts::Of { spans, names } = &rule.ports
            && !rule.ports.contain(facts, packet)
        {
            let numbers = spans.iter().map(|it| (it.protocol, it.first, it.last));
            let names = names.iter().map(|it| (it.protocol, it.name.clone()));
            missing.push(Missing::Port(MissingPorts {
                numbers: numbers.collect(),
                names: names.collect(),
            }));
        }
        missing
    }

    /// What the peer lacks of the item that it is nearest to.
    fn missing_peer(&self, predicates: &BTreeSet<Arc<Predicate>>, facts: &Facts) -> Vec<Missing> {
        let each = predicates.iter().map(|predicate| {
            if facts.contains(&Fact::new(predicate.clone())) {
                return Vec::new();
            }
            self.missing_of(predicate)
        });
        let least = each.min_by_key(|missing| missing.iter().map(weight).sum::<usize>());
        least.unwrap_or_else(|| vec![Missing::Anybody])
    }

    fn missing_of(&self, predicate: &Predicate) -> Vec<Missing> {
        match predicate {
            Predicate::Block(block) => {
                let excepts = |net: &&IpNet| net.contains(&self.address);
                let by = block.except.iter().find(excepts);
                vec![match (block.cidr.contains(&self.address), by) {
                    (true, Some(by)) => Missing::Excepted {
                        cidr: block.cidr,
                        by: *by,
                    },
                    _ => Missing::Block(block.cidr),
                }]
            }
            Predicate::Port(..) => Vec::new(),
            Predicate::Pods { scope, pods } => {
                let Some((key, namespace)) = &self.peer else {
                    return vec![Missing::APod];
                };
                let mut missing = match scope {
                    Scope::Own(own) if *own == key.namespace => Vec::new(),
                    Scope::Own(own) => vec![Missing::Namespace(own.clone())],
                    Scope::Matching(selector) => lacking(namespace, selector, &key.namespace),
                };
                missing.extend(unmet(&pods.requirements, &key.labels).map(|requirement| {
                    let is = key.labels.get(&requirement.key).cloned();
                    Missing::PodLabel(requirement, is)
                }));
                missing
            }
        }
    }
}

fn lacking(namespace: &NamespaceView, selector: &Selector, name: &Arc<str>) -> Vec<Missing> {
    let lacks = namespace.lacks(selector);
    match namespace.labels() {
        None if !lacks.is_empty() => vec![Missing::NamespaceUnknown(name.clone())],
        labels => lacks
            .into_iter()
            .map(|requirement| {
                let is = labels.and_then(|it| it.get(&requirement.key)).cloned();
                Missing::NamespaceLabel(requirement, is)
            })
            .collect(),
    }
}

fn unmet(requirements: &[Requirement], labels: &Labels) -> impl Iterator<Item = Requirement> {
    let is_unmet = |requirement: &&Requirement| {
        let alone = Selector {
            requirements: vec![(*requirement).clone()],
        };
        !alone.matches(labels)
    };
    let unmet: Vec<_> = requirements.iter().filter(is_unmet).cloned().collect();
    unmet.into_iter()
}

/// How far away something is: a label is soon given, and an address is no pod at all.
fn weight(missing: &Missing) -> usize {
    match missing {
        Missing::PodLabel(..)
        | Missing::NamespaceLabel(..)
        | Missing::NamespaceUnknown(_)
        | Missing::Namespace(_)
        | Missing::Port(_) => 2,
        Missing::Block(_) | Missing::Excepted { .. } => 3,
        Missing::APod => 6,
        Missing::Anybody => 8,
    }
}
