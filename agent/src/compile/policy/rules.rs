//! The list of rules that holds for a pod in one direction, with everything in it resolved. What the
//! list answers to a class is in `verdict`.

use std::collections::BTreeSet;
use std::sync::Arc;

use weir_common::Protocol;

use super::book::{Direction, RuleOwner};
use super::encode::{Canonical, Encoder};
use super::ports::PortSpan;
use super::predicate::{PortName, Predicate};
use super::report::{Nothing, Part, Report};
use crate::model::{
    ClusterPolicy, ContainerPort, ObjectName, PeerSelector, Peers, Policy, PortMatch, PortRange,
    Ports, Rule, RuleAction, Tier,
};

/// All that policies say about a pod in a direction; never nothing.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct RuleList {
    pub(super) direction: Direction,
    /// ClusterNetworkPolicies of the tier Admin, in the order in which they are asked.
    pub(super) admin: Vec<Arc<ClusterRules>>,
    /// The NetworkPolicies that isolate it, in the order of their names.
    pub(super) policies: Vec<Arc<PolicyRules>>,
    /// ClusterNetworkPolicies of the tier Baseline. They are asked where no NetworkPolicy isolates.
    pub(super) baseline: Vec<Arc<ClusterRules>>,
}

/// The rules of a ClusterNetworkPolicy in a direction.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct ClusterRules {
    tier: Tier,
    priority: u16,
    name: Arc<str>,
    is_audit: bool,
    rules: Vec<ClusterRule>,
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct ClusterRule {
    name: Option<Arc<str>>,
    action: RuleAction,
    rule: ResolvedRule,
}

/// One rule of a list.
#[derive(Clone, Debug)]
pub(super) struct Asked<'a> {
    pub(super) stage: Stage,
    pub(super) action: RuleAction,
    pub(super) is_audit: bool,
    pub(super) owner: RuleOwner,
    pub(super) rule: &'a ResolvedRule,
}

/// When a rule is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Stage {
    Admin,
    Policies,
    Baseline,
}

/// The rules of a policy in a direction.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct PolicyRules {
    id: ObjectName,
    is_audit: bool,
    rules: Vec<ResolvedRule>,
}

/// A rule without what only its author could resolve: namespaces, names of its subject's ports, unsupported parts.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct ResolvedRule {
    pub(super) peers: ResolvedPeers,
    pub(super) ports: ResolvedPorts,
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum ResolvedPeers {
    /// Everybody, the world included.
    Any,
    /// Those who satisfy one of them. None: nobody.
    Of(BTreeSet<Arc<Predicate>>),
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum ResolvedPorts {
    /// Every port of every protocol, and protocols without ports.
    Any,
    /// Each once. None: no port.
    Of {
        spans: Vec<PortSpan>,
        /// What each destination means by it.
        names: BTreeSet<PortName>,
    },
}

impl RuleList {
    pub(super) fn is_empty(&self) -> bool {
        self.admin.is_empty() && self.policies.is_empty() && self.baseline.is_empty()
    }

    /// Is any of its policies only audited?
    pub(super) fn audits(&self) -> bool {
        let mut tiers = self.admin.iter().chain(&self.baseline);
        tiers.any(|it| it.is_audit) || self.policies.iter().any(|it| it.is_audit)
    }

    /// Every rule, in the order in which they are asked.
    pub(super) fn rules(&self) -> impl Iterator<Item = Asked<'_>> {
        self.tier(Stage::Admin)
            .chain(self.policies.iter().flat_map(|policy| {
                policy
                    .rules
                    .iter()
                    .enumerate()
                    .map(|(rule, resolved)| Asked {
                        stage: Stage::Policies,
                        action: RuleAction::Accept,
                        is_audit: policy.is_audit,
                        owner: RuleOwner::Allowed {
                            policy: policy.id.clone(),
                            direction: self.direction,
                            rule,
                        },
                        rule: resolved,
                    })
            }))
            .chain(self.tier(Stage::Baseline))
    }

    fn tier(&self, stage: Stage) -> impl Iterator<Item = Asked<'_>> {
        let policies = match stage {
            Stage::Admin => &self.admin[..],
            Stage::Policies => &[],
            Stage::Baseline => &self.baseline[..],
        };
        policies.iter().flat_map(move |policy| {
            policy
                .rules
                .iter()
                .enumerate()
                .map(move |(number, rule)| Asked {
                    stage,
                    action: rule.action,
                    is_audit: policy.is_audit,
                    owner: RuleOwner::Tiered {
                        policy: policy.name.clone(),
                        tier: policy.tier,
                        priority: policy.priority,
                        direction: self.direction,
                        rule: number,
                        name: rule.name.clone(),
                        action: rule.action,
                    },
                    rule: &rule.rule,
                })
        })
    }

    fn resolved(&self) -> impl Iterator<Item = &ResolvedRule> {
        let tiers = self.admin.iter().chain(&self.baseline);
        let tiered = tiers.flat_map(|policy| policy.rules.iter().map(|it| &it.rule));
        let policies = self.policies.iter().flat_map(|policy| &policy.rules);
        policies.chain(tiered)
    }

    /// What its rules ask of addresses; some more than once.
    pub(super) fn predicates(&self) -> impl Iterator<Item = &Arc<Predicate>> {
        self.resolved().flat_map(|rule| match &rule.peers {
            ResolvedPeers::Any => None.into_iter().flatten(),
            ResolvedPeers::Of(predicates) => Some(predicates).into_iter().flatten(),
        })
    }

    /// The names of ports whose numbers depend on the destination; some more than once.
    pub(super) fn names(&self) -> impl Iterator<Item = &PortName> {
        self.resolved().flat_map(|rule| match &rule.ports {
            ResolvedPorts::Any => None.into_iter().flatten(),
            ResolvedPorts::Of { names, .. } => Some(names).into_iter().flatten(),
        })
    }

    /// The owner of what no rule decides where NetworkPolicies isolate: those do that are enforced.
    pub(super) fn isolation(&self) -> Option<RuleOwner> {
        self.isolated_by(|policy| !policy.is_audit)
    }

    /// As [`Self::isolation`], were those enforced that are only audited.
    pub(super) fn audited_isolation(&self) -> Option<RuleOwner> {
        self.isolated_by(|_| true)
    }

    fn isolated_by(&self, counts: impl Fn(&PolicyRules) -> bool) -> Option<RuleOwner> {
        let policies = self.policies.iter().filter(|it| counts(it));
        let policies: Vec<_> = policies.map(|it| it.id.clone()).collect();
        (!policies.is_empty()).then_some(RuleOwner::Isolated {
            policies,
            direction: self.direction,
        })
    }
}

impl ClusterRules {
    /// The rules for a pod with these ports; `None` if there are none in this direction.
    pub(super) fn of(
        policy: &ClusterPolicy,
        direction: Direction,
        pod_ports: &[ContainerPort],
    ) -> Option<Self> {
        let rules = match direction {
            Direction::Ingress => &policy.ingress,
            Direction::Egress => &policy.egress,
        };
        let rules: Vec<_> = rules
            .iter()
            .map(|rule| ClusterRule {
                name: rule.name.clone(),
                action: rule.action,
                rule: ResolvedRule::of(&rule.rule, &"".into(), direction, pod_ports),
            })
            .collect();
        (!rules.is_empty()).then(|| Self {
            tier: policy.tier,
            priority: policy.priority,
            name: policy.name.clone(),
            is_audit: policy.is_audit,
            rules,
        })
    }
}

impl ResolvedRule {
    /// A rule of a policy of this namespace. What is not supported becomes nobody or no port.
    fn of(
        rule: &Rule,
        namespace: &Arc<str>,
        direction: Direction,
        pod_ports: &[ContainerPort],
    ) -> Self {
        Self {
            peers: match &rule.peers {
                Peers::Any => ResolvedPeers::Any,
                Peers::Of(peers) => ResolvedPeers::Of(
                    peers
                        .iter()
                        .filter_map(|peer| predicate(peer, namespace).ok())
                        .map(Arc::new)
                        .collect(),
                ),
            },
            ports: match &rule.ports {
                Ports::Any => ResolvedPorts::Any,
                Ports::Of(ports) => {
                    let ports = ports.iter().filter_map(|port| supported_port(port).ok());
                    resolve_ports(ports, direction, pod_ports)
                }
            },
        }
    }
}

/// The rules of a policy for a pod with these ports; `None` when it does not isolate the pod in this
/// direction.
pub(super) fn resolve(
    policy: &Policy,
    direction: Direction,
    pod_ports: &[ContainerPort],
) -> Option<PolicyRules> {
    let rules = section(policy, direction)?
        .iter()
        .map(|rule| ResolvedRule::of(rule, &policy.id.namespace, direction, pod_ports))
        .collect();
    Some(PolicyRules {
        id: policy.id.clone(),
        is_audit: policy.is_audit,
        rules,
    })
}

/// Do the rules depend on the ports of the pod that they are for? They do where it is the destination.
pub(super) fn names_ports(policy: &Policy, direction: Direction) -> bool {
    let mut rules = section(policy, direction).into_iter().flatten();
    direction == Direction::Ingress && rules.any(names_a_port)
}

/// As [`names_ports`].
pub(super) fn names_ports_in_tier(policy: &ClusterPolicy, direction: Direction) -> bool {
    direction == Direction::Ingress && policy.ingress.iter().any(|it| names_a_port(&it.rule))
}

fn names_a_port(rule: &Rule) -> bool {
    match &rule.ports {
        Ports::Any => false,
        Ports::Of(ports) => ports
            .iter()
            .any(|port| matches!(port.port, PortRange::Named(_))),
    }
}

/// The parts of a policy that allow nothing though they say something.
pub(super) fn reports(policy: &Policy) -> impl Iterator<Item = Report> {
    [Direction::Ingress, Direction::Egress]
        .into_iter()
        .flat_map(move |direction| {
            let rules = section(policy, direction).into_iter().flatten();
            rules.enumerate().flat_map(move |(number, rule)| {
                let part = move |(item, why)| Report::AllowsNothing {
                    policy: policy.id.clone(),
                    part: Part {
                        direction,
                        rule: number,
                        item,
                        why,
                    },
                };
                unsupported(rule, &policy.id.namespace).map(part)
            })
        })
}

fn unsupported(rule: &Rule, namespace: &Arc<str>) -> impl Iterator<Item = (usize, Nothing)> {
    let peers: &[PeerSelector] = match &rule.peers {
        Peers::Any => &[],
        Peers::Of(peers) => peers,
    };
    let ports: &[PortMatch] = match &rule.ports {
        Ports::Any => &[],
        Ports::Of(ports) => ports,
    };
    let peers = peers.iter().map(|peer| predicate(peer, namespace).err());
    let ports = ports.iter().map(|port| supported_port(port).err());
    peers
        .enumerate()
        .chain(ports.enumerate())
        .filter_map(|(item, why)| Some((item, why?)))
}

fn section(policy: &Policy, direction: Direction) -> Option<&[Rule]> {
    match direction {
        Direction::Ingress => policy.ingress.as_deref(),
        Direction::Egress => policy.egress.as_deref(),
    }
}

/// What a peer of a policy in this namespace asks.
fn predicate(peer: &PeerSelector, namespace: &Arc<str>) -> Result<Predicate, Nothing> {
    match peer {
        PeerSelector::Pods(pods) => Ok(Predicate::of(pods, namespace)),
        PeerSelector::Block(block) => Ok(Predicate::Block(block.into())),
        PeerSelector::Unsupported(peer) => Err(Nothing::UnknownPeer(peer.clone())),
    }
}

/// A port that this version can answer for.
enum SupportedPort {
    Span(PortSpan),
    /// On the destination.
    Named(PortName),
}

fn supported_port(port: &PortMatch) -> Result<SupportedPort, Nothing> {
    let protocol = port.protocol;
    if ![Protocol::TCP, Protocol::UDP, Protocol::SCTP].contains(&protocol) {
        return Err(Nothing::Protocol(protocol.0));
    }
    let span = |first, last| {
        SupportedPort::Span(PortSpan {
            protocol,
            first,
            last,
        })
    };
    match &port.port {
        PortRange::Any => Ok(span(0, u16::MAX)),
        &PortRange::Numbers { first, last } if first > last => {
            Err(Nothing::EmptyRange { first, last })
        }
        &PortRange::Numbers { first, last } => Ok(span(first, last)),
        PortRange::Named(name) => Ok(SupportedPort::Named(PortName {
            protocol,
            name: name.clone(),
        })),
    }
}

/// Resolves names of ports where the pod that the rules are for is the destination.
fn resolve_ports(
    ports: impl Iterator<Item = SupportedPort>,
    direction: Direction,
    pod_ports: &[ContainerPort],
) -> ResolvedPorts {
    let (mut spans, mut names) = (BTreeSet::new(), BTreeSet::new());
    for port in ports {
        match port {
            SupportedPort::Span(span) => {
                spans.insert(span);
            }
            SupportedPort::Named(name) if direction == Direction::Egress => {
                names.insert(name);
            }
            SupportedPort::Named(name) => {
                let number = name.on(pod_ports);
                spans.extend(number.map(|number| PortSpan::one(name.protocol, number)));
            }
        }
    }
    ResolvedPorts::Of {
        spans: spans.into_iter().collect(),
        names,
    }
}

impl Canonical for RuleList {
    fn encode(&self, to: &mut Encoder) {
        self.direction.encode(to);
        to.list(self.policies.iter());
        // Without them it has the bytes that it had before there were any.
        if !(self.admin.is_empty() && self.baseline.is_empty()) {
            to.list(self.admin.iter());
            to.list(self.baseline.iter());
        }
    }
}

impl Canonical for ClusterRules {
    fn encode(&self, to: &mut Encoder) {
        self.tier.encode(to);
        to.integer(self.priority.into());
        to.text(&self.name);
        to.list(self.rules.iter());
        audited(self.is_audit, to);
    }
}

impl Canonical for ClusterRule {
    fn encode(&self, to: &mut Encoder) {
        to.optional(self.name.as_ref());
        self.action.encode(to);
        self.rule.encode(to);
    }
}

impl Canonical for PolicyRules {
    fn encode(&self, to: &mut Encoder) {
        self.id.encode(to);
        to.list(self.rules.iter());
        audited(self.is_audit, to);
    }
}

/// What is enforced has the bytes that it had when there was nothing else.
fn audited(is_audit: bool, to: &mut Encoder) {
    if is_audit {
        to.tag(u8::MAX);
    }
}

impl Canonical for ResolvedRule {
    fn encode(&self, to: &mut Encoder) {
        match &self.peers {
            ResolvedPeers::Any => to.tag(0),
            ResolvedPeers::Of(predicates) => {
                to.tag(1);
                to.list(predicates.iter());
            }
        }
        match &self.ports {
            ResolvedPorts::Any => to.tag(0),
            ResolvedPorts::Of { spans, names } if names.is_empty() => {
                to.tag(1);
                to.list(spans.iter());
            }
            ResolvedPorts::Of { spans, names } => {
                to.tag(2);
                to.list(spans.iter());
                to.list(names.iter());
            }
        }
    }
}

impl Canonical for PortSpan {
    fn encode(&self, to: &mut Encoder) {
        self.protocol.encode(to);
        to.integer(self.first.into());
        to.integer(self.last.into());
    }
}
