//! What may pass? Answered slowly, from the text of the Kubernetes API (networking.k8s.io/v1 types.go, the page "Network Policies", and
//! policy.networking.k8s.io/v1alpha2 clusternetworkpolicy_types.go), one pair of ends at a time. It knows no table, no class and no
//! code of the compiler, not even how the compiler matches labels.

mod passing;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use weir_agent::model::{
    ClusterPolicy, ClusterRule, Labels, Namespace, Operator, PeerSelector, Peers, Pod, PodPeers,
    Policy, PortMatch, PortRange, Ports, Rule, RuleAction, Selector, Tier,
};
use weir_common::Protocol;

pub use passing::{Passing, WITH_PORTS};

/// The objects that matter.
#[derive(Clone, Debug)]
pub struct Cluster {
    pub namespaces: Vec<Namespace>,
    pub pods: Vec<Pod>,
    pub policies: Vec<Policy>,
    pub cluster_policies: Vec<ClusterPolicy>,
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

/// The cluster, were its policies enforced that are only audited.
pub fn enforced(cluster: &Cluster) -> Cluster {
    let mut all = cluster.clone();
    for policy in &mut all.policies {
        policy.is_audit = false;
    }
    for policy in &mut all.cluster_policies {
        policy.is_audit = false;
    }
    all
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

/// All that egress policy lets through.
pub fn sent(cluster: &Cluster, from: &Party, to: &Party) -> Passing {
    match &from.is {
        Who::Pod(sender) if !is_itself_or_its_node(sender, to) => {
            let rules = |policy: &'_ ClusterPolicy| policy.egress.clone();
            let policies = selecting(cluster, sender).map(|it| (it, &it.egress));
            let named = isolating(cluster, policies, to, to);
            judged(cluster, sender, rules, named, to, to)
        }
        _ => Passing::everything(),
    }
}

/// All that ingress policy lets through.
pub fn received(cluster: &Cluster, from: &Party, to: &Party) -> Passing {
    match &to.is {
        Who::Pod(receiver) if !is_itself_or_its_node(receiver, from) => {
            let rules = |policy: &'_ ClusterPolicy| policy.ingress.clone();
            let policies = selecting(cluster, receiver).map(|it| (it, &it.ingress));
            let named = isolating(cluster, policies, from, to);
            judged(cluster, receiver, rules, named, from, to)
        }
        _ => Passing::everything(),
    }
}

/// "Policy tiers are evaluated in the following order: Admin tier, NetworkPolicy tier, Baseline tier … If a given connection wasn't
/// allowed or denied by any of the tiers, the default kubernetes policy is applied, which says that all pods can communicate with each
/// other." `named` is what NetworkPolicies let through, if one selects the pod: "v1.NetworkPolicy always makes a final decision for
/// selected pods. Further evaluation only happens for Pods not selected by a v1.NetworkPolicy."
fn judged(
    cluster: &Cluster,
    subject: &Pod,
    rules: impl Fn(&ClusterPolicy) -> Vec<ClusterRule>,
    named: Option<Passing>,
    peer: &Party,
    destination: &Party,
) -> Passing {
    let of = |tier| tier_rules(cluster, tier, subject, &rules);
    let mut allowed = Passing::nothing();
    let admin = of(Tier::Admin);
    let mut undecided = asked(
        cluster,
        &admin,
        peer,
        destination,
        Passing::everything(),
        &mut allowed,
    );
    match named {
        Some(passing) => allowed.add(&passing.and(&undecided)),
        None => {
            let baseline = of(Tier::Baseline);
            undecided = asked(
                cluster,
                &baseline,
                peer,
                destination,
                undecided,
                &mut allowed,
            );
            allowed.add(&undecided);
        }
    }
    allowed
}

/// "Policies with lower priority values have higher precedence, and are checked before policies with higher priority values in the same
/// tier"; of equal ones "the implementation can apply any", and ours takes the order of names. "A rule that appears at the top of the
/// ingress rules would take the highest precedence."
fn tier_rules(
    cluster: &Cluster,
    tier: Tier,
    subject: &Pod,
    rules: impl Fn(&ClusterPolicy) -> Vec<ClusterRule>,
) -> Vec<ClusterRule> {
    let policies = cluster.cluster_policies.iter();
    let mut policies: Vec<_> = policies
        .filter(|it| it.tier == tier && !it.is_audit)
        .filter(|it| has_pod(cluster, &it.subject, None, subject))
        .collect();
    policies.sort_by(|a, b| (a.priority, &a.name).cmp(&(b.priority, &b.name)));
    policies.into_iter().flat_map(rules).collect()
}

/// What of `undecided` a tier leaves undecided. "Pass: Skips all further ClusterNetworkPolicy rules in the current tier for the selected
/// traffic, and passes evaluation to the next tier."
fn asked(
    cluster: &Cluster,
    rules: &[ClusterRule],
    peer: &Party,
    destination: &Party,
    mut undecided: Passing,
    allowed: &mut Passing,
) -> Passing {
    let mut passed_on = Passing::nothing();
    for ClusterRule { action, rule, .. } in rules {
        if !has_peer(cluster, None, rule, peer) {
            continue;
        }
        let matching = matching(rule, destination).and(&undecided);
        undecided.remove(&matching);
        match action {
            RuleAction::Accept => allowed.add(&matching),
            RuleAction::Deny => {}
            RuleAction::Pass => passed_on.add(&matching),
        }
    }
    undecided.add(&passed_on);
    undecided
}

/// "By default, a pod is non-isolated for egress; all outbound connections are allowed", and so for ingress; "network policies do not
/// conflict; they are additive". `None`: it is not isolated.
fn isolating<'a>(
    cluster: &Cluster,
    policies: impl Iterator<Item = (&'a Policy, &'a Option<Vec<Rule>>)>,
    peer: &Party,
    destination: &Party,
) -> Option<Passing> {
    let mut all: Option<Passing> = None;
    for (policy, rules) in policies {
        let Some(rules) = rules else { continue };
        let all = all.get_or_insert_with(Passing::nothing);
        for rule in rules
            .iter()
            .filter(|it| has_peer(cluster, Some(&policy.id.namespace), it, peer))
        {
            all.add(&matching(rule, destination));
        }
    }
    all
}

/// The packets that a rule is about, from or to its peers. "If this field is empty or missing, this rule matches all ports", and
/// "If unspecified, protocol-specific attributes will not be used to match traffic"; otherwise what one of the items matches.
fn matching(rule: &Rule, destination: &Party) -> Passing {
    let Ports::Of(items) = &rule.ports else {
        return Passing::everything();
    };
    let mut all = Passing::nothing();
    for item in items {
        if let Some(numbers) = numbers(item, destination) {
            all.set(item.protocol, numbers, true);
        }
    }
    all
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

/// The policies of the pod's namespace whose `podSelector` matches it. One that is only audited counts as absent: its annotation is
/// ours, not the API's.
fn selecting<'a>(cluster: &'a Cluster, pod: &'a Pod) -> impl Iterator<Item = &'a Policy> {
    cluster.policies.iter().filter(|policy| {
        !policy.is_audit
            && policy.id.namespace == pod.id.namespace
            && selects(&policy.subject, &pod.labels)
    })
}

/// "If this field is empty or missing, this rule matches all sources"; otherwise one item must match. `home` is the namespace of the
/// policy, if it has one.
fn has_peer(cluster: &Cluster, home: Option<&str>, rule: &Rule, peer: &Party) -> bool {
    let Peers::Of(items) = &rule.peers else {
        return true;
    };
    items.iter().any(|item| match item {
        // "cluster-internal traffic will be checked against the rule as well".
        PeerSelector::Block(block) => {
            block.cidr.contains(&peer.address)
                && !block.except.iter().any(|net| net.contains(&peer.address))
        }
        PeerSelector::Unsupported(_) => false,
        PeerSelector::Pods(pods) => match &peer.is {
            Who::Pod(pod) => has_pod(cluster, pods, home, pod),
            // "Note that host-networked pods are not included in this type of peer."
            Who::Node(_) | Who::Outside => false,
        },
    })
}

/// "If namespaceSelector is also set, then the NetworkPolicyPeer as a whole selects the pods matching podSelector in the namespaces
/// selected by namespaceSelector. Otherwise it selects the pods matching podSelector in the policy's own namespace."
fn has_pod(cluster: &Cluster, pods: &PodPeers, home: Option<&str>, pod: &Pod) -> bool {
    let namespace_matches = match &pods.namespaces {
        None => home == Some(&*pod.id.namespace),
        Some(selector) => cluster
            .namespaces
            .iter()
            .any(|ns| ns.name == pod.id.namespace && selects(selector, &labels_of(ns))),
    };
    namespace_matches && selects(&pods.pods, &pod.labels)
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
