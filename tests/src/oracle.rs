//! What may pass? Answered slowly, from the text of the Kubernetes API (networking.k8s.io/v1
//! types.go and the page "Network Policies"), one pair of ends at a time. It knows no table, no class and no
//! code of the compiler, not even how the compiler matches labels.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use rangemap::RangeInclusiveSet;
use weir_agent::model::{
    Labels, Namespace, Operator, PeerSelector, Peers, Pod, Policy, PortMatch, PortRange, Ports,
    Rule, Selector,
};
use weir_common::Protocol;

/// The objects that matter.
#[derive(Clone, Debug)]
pub struct Cluster {
    pub namespaces: Vec<Namespace>,
    pub pods: Vec<Pod>,
    pub policies: Vec<Policy>,
}

/// One end of a packet.
#[derive(Clone, Debug)]
pub struct Party {
    pub address: IpAddr,
    pub is: Who,
}

/// What is behind an address.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Who {
    /// A pod with a network of its own.
    Pod(Pod),
    /// A node by name, or a pod in its network.
    Node(Arc<str>),
    Outside,
}

/// May `from` send this to `to`? "For a connection from a source pod to a destination pod to be
/// allowed, both the egress policy on the source pod and the ingress policy on the destination pod
/// need to allow the connection."
pub fn allowed(cluster: &Cluster, from: &Party, to: &Party, protocol: Protocol, port: u16) -> bool {
    may_send(cluster, from, to, protocol, port) && may_receive(cluster, from, to, protocol, port)
}

/// The egress half, the sender's.
pub fn may_send(
    cluster: &Cluster,
    from: &Party,
    to: &Party,
    protocol: Protocol,
    port: u16,
) -> bool {
    sent(cluster, from, to).includes(protocol, port)
}

/// The ingress half, the receiver's.
pub fn may_receive(
    cluster: &Cluster,
    from: &Party,
    to: &Party,
    protocol: Protocol,
    port: u16,
) -> bool {
    received(cluster, from, to).includes(protocol, port)
}

/// All that may pass between two ends.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Passing {
    /// Every packet, also of protocols without ports.
    Everything,
    /// These ports of these protocols. Nothing, if there are none.
    Only(BTreeMap<Protocol, RangeInclusiveSet<u16>>),
}

impl Passing {
    pub fn includes(&self, protocol: Protocol, port: u16) -> bool {
        match self {
            Self::Everything => true,
            Self::Only(ports) => ports.get(&protocol).is_some_and(|it| it.contains(&port)),
        }
    }
}

/// All that egress policy lets through.
pub fn sent(cluster: &Cluster, from: &Party, to: &Party) -> Passing {
    match &from.is {
        Who::Pod(sender) if !is_itself_or_its_node(sender, to) => {
            let policies = selecting(cluster, sender);
            union(cluster, policies.map(|it| (it, &it.egress)), to, to)
        }
        _ => Passing::Everything,
    }
}

/// All that ingress policy lets through.
pub fn received(cluster: &Cluster, from: &Party, to: &Party) -> Passing {
    match &to.is {
        Who::Pod(receiver) if !is_itself_or_its_node(receiver, from) => {
            let policies = selecting(cluster, receiver);
            union(cluster, policies.map(|it| (it, &it.ingress)), from, to)
        }
        _ => Passing::Everything,
    }
}

/// "By default, a pod is non-isolated for egress; all outbound connections are allowed", and so for ingress; "network policies do not
/// conflict; they are additive".
fn union<'a>(
    cluster: &Cluster,
    policies: impl Iterator<Item = (&'a Policy, &'a Option<Vec<Rule>>)>,
    peer: &Party,
    destination: &Party,
) -> Passing {
    let mut is_isolated = false;
    let mut all: BTreeMap<Protocol, RangeInclusiveSet<u16>> = BTreeMap::new();
    for (policy, rules) in policies {
        let Some(rules) = rules else { continue };
        is_isolated = true;
        for rule in rules
            .iter()
            .filter(|it| has_peer(cluster, policy, it, peer))
        {
            // "If this field is empty or missing, this rule matches all ports"; otherwise what one of the items matches.
            let Ports::Of(items) = &rule.ports else {
                return Passing::Everything;
            };
            for item in items {
                if let Some(numbers) = numbers(item, destination) {
                    all.entry(item.protocol).or_default().insert(numbers);
                }
            }
        }
    }
    if is_isolated {
        Passing::Only(all)
    } else {
        Passing::Everything
    }
}

/// "Traffic to and from the node where a Pod is running is always allowed", and "a Pod cannot block
/// access to itself".
fn is_itself_or_its_node(pod: &Pod, other: &Party) -> bool {
    match &other.is {
        Who::Pod(other) => other.id == pod.id,
        Who::Node(node) => pod.node.as_ref() == Some(node),
        Who::Outside => false,
    }
}

/// The policies of the pod's namespace whose `podSelector` matches it.
fn selecting<'a>(cluster: &'a Cluster, pod: &'a Pod) -> impl Iterator<Item = &'a Policy> {
    cluster.policies.iter().filter(|policy| {
        policy.id.namespace == pod.id.namespace && selects(&policy.subject, &pod.labels)
    })
}

/// "If this field is empty or missing, this rule matches all sources"; otherwise one item must match.
fn has_peer(cluster: &Cluster, policy: &Policy, rule: &Rule, peer: &Party) -> bool {
    let Peers::Of(items) = &rule.peers else {
        return true;
    };
    items.iter().any(|item| match item {
        PeerSelector::Block(block) => {
            block.cidr.contains(&peer.address)
                && !block.except.iter().any(|net| net.contains(&peer.address))
        }
        PeerSelector::Unsupported(_) => false,
        PeerSelector::Pods(pods) => {
            let Who::Pod(pod) = &peer.is else {
                return false;
            };
            // "If namespaceSelector is also set, then the NetworkPolicyPeer as a whole selects the
            // pods matching podSelector in the namespaces selected by namespaceSelector. Otherwise it
            // selects the pods matching podSelector in the policy's own namespace."
            let namespace_matches = match &pods.namespaces {
                None => pod.id.namespace == policy.id.namespace,
                Some(selector) => cluster
                    .namespaces
                    .iter()
                    .any(|ns| ns.name == pod.id.namespace && selects(selector, &labels_of(ns))),
            };
            namespace_matches && selects(&pods.pods, &pod.labels)
        }
    })
}

fn numbers(item: &PortMatch, destination: &Party) -> Option<RangeInclusive<u16>> {
    match &item.port {
        PortRange::Any => Some(0..=u16::MAX),
        PortRange::Numbers { first, last } => (first <= last).then_some(*first..=*last),
        // "A named port on a pod": of the destination.
        PortRange::Named(name) => {
            let Who::Pod(pod) = &destination.is else {
                return None;
            };
            let named = |declared: &&weir_agent::model::ContainerPort| {
                declared.name.as_ref() == Some(name) && declared.protocol == item.protocol
            };
            let declared = pod.ports.iter().find(named)?;
            Some(declared.port..=declared.port)
        }
    }
}

/// "The Kubernetes control plane sets an immutable label kubernetes.io/metadata.name on all
/// namespaces, the value of the label is the namespace name."
fn labels_of(namespace: &Namespace) -> Labels {
    let mut labels = namespace.labels.clone();
    labels.insert("kubernetes.io/metadata.name".into(), namespace.name.clone());
    labels
}

/// "The result of matchLabels and matchExpressions are ANDed. An empty label selector matches all
/// objects."
fn selects(selector: &Selector, labels: &Labels) -> bool {
    for requirement in &selector.requirements {
        let value = labels
            .iter()
            .find(|(key, _)| **key == requirement.key)
            .map(|(_, v)| v);
        let holds = match (&requirement.operator, value) {
            (Operator::In(values), Some(value)) => values.iter().any(|v| v == value),
            (Operator::In(_), None) => false,
            (Operator::NotIn(values), Some(value)) => values.iter().all(|v| v != value),
            (Operator::NotIn(_), None) => true,
            (Operator::Exists, value) => value.is_some(),
            (Operator::DoesNotExist, value) => value.is_none(),
        };
        if !holds {
            return false;
        }
    }
    true
}
