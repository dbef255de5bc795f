//! Random clusters: few names and values, so that things meet.

use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::{select as one_of, subsequence};
use weir_agent::model::{
    Block, ContainerPort, Labels, Namespace, NamespacePhase, Operator, PeerSelector, Peers, Pod,
    PodNetwork, PodPeers, PodPhase, Policy, PortMatch, PortRange, Ports, Requirement, Rule,
    Selector,
};
use weir_common::Protocol;
use weir_tests::oracle::Cluster;

use super::nouns::{name, pod};
use super::tiers;

/// What rules may contain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Parts {
    Supported,
    /// Also peers of the future.
    All,
    /// What is supported, and ClusterNetworkPolicies with everything.
    Tiers,
}

/// What packets are tried: (protocol, port).
pub(super) const PROBES: [(Protocol, u16); 9] = [
    (Protocol::TCP, 79),
    (Protocol::TCP, 80),
    (Protocol::TCP, 81),
    (Protocol::TCP, 8080),
    (Protocol::UDP, 80),
    (Protocol::UDP, 53),
    (Protocol::SCTP, 80),
    (Protocol::TCP, 65535),
    (Protocol::ICMP, 80),
];

/// Blocks, each within some that come before it. Pods, nodes and addresses outside are in them, at their edges and between.
pub(super) const CIDRS: [&str; 15] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.0/29",
    "10.0.0.2/31",
    "10.0.0.4/32",
    "192.0.2.0/24",
    "192.0.2.1/32",
    "198.51.100.0/23",
    "::/0",
    "fd00::/8",
    "fd00::/125",
    "fd00::2/127",
    "2001:db8::/32",
    "2001:db8:0:1::/64",
    "2001:db8::1/128",
];

const NAMESPACES: [&str; 3] = ["a", "b", "kube-system"];
pub(super) const POD_LABELS: [(&str, &[&str]); 3] = [
    ("app", &["web", "db"]),
    ("tier", &["front", "back"]),
    ("k8s-app", &["kube-dns"]),
];
pub(super) const NAMESPACE_LABELS: [(&str, &[&str]); 3] = [
    ("team", &["x", "y"]),
    ("kubernetes.io/metadata.name", &NAMESPACES),
    ("app", &["web"]),
];

pub(super) fn cluster(parts: Parts) -> impl Strategy<Value = Cluster> {
    let namespaces: Vec<_> = NAMESPACES.into_iter().map(namespace).collect();
    let pods: Vec<_> = (1..=5).map(a_pod).collect();
    let policies: Vec<_> = (1..=4).map(|number| a_policy(number, parts)).collect();
    let tiers: Vec<_> = match parts {
        Parts::Tiers => (1..=3).map(tiers::policy).collect(),
        Parts::Supported | Parts::All => Vec::new(),
    };
    (namespaces, pods, policies, tiers).prop_map(|(namespaces, pods, policies, tiers)| Cluster {
        namespaces,
        pods: pods.into_iter().flatten().collect(),
        policies: policies.into_iter().flatten().collect(),
        cluster_policies: tiers.into_iter().flatten().collect(),
    })
}

fn namespace(name: &'static str) -> impl Strategy<Value = Namespace> {
    let phase = one_of(vec![NamespacePhase::Active, NamespacePhase::Terminating]);
    // A namespace may claim another's name in its labels; the name is what counts.
    (some_labels(&NAMESPACE_LABELS), phase).prop_map(move |(labels, phase)| Namespace {
        name: name.into(),
        labels,
        phase,
        keeps_established: false,
    })
}

fn a_pod(number: u8) -> impl Strategy<Value = Option<Pod>> {
    let phase = prop_oneof![
        6 => Just(PodPhase::Running),
        1 => Just(PodPhase::Pending),
        1 => Just(PodPhase::Terminating),
        1 => Just(PodPhase::Finished),
    ];
    let network = prop_oneof![8 => Just(PodNetwork::Own), 1 => Just(PodNetwork::Host)];
    let ports = prop::collection::vec(container_port(), 0..3);
    let node = one_of(vec![Some("n1"), Some("n1"), Some("n2"), None]);
    let rest = (
        one_of(&NAMESPACES[..]),
        some_labels(&POD_LABELS),
        phase,
        network,
        ports,
        node,
    );
    prop::option::weighted(
        0.9,
        rest.prop_map(move |(namespace, labels, phase, network, ports, node)| {
            let mut pod = pod(&format!("{namespace}/p{number}"), "", number);
            if network == PodNetwork::Host {
                pod.addresses.clear();
            }
            Pod {
                labels,
                phase,
                network,
                ports,
                node: node.map(Arc::from),
                ..pod
            }
        }),
    )
}

fn container_port() -> impl Strategy<Value = ContainerPort> {
    let name = one_of(vec![Some("http"), Some("dns"), None]);
    (name, protocol(), one_of(vec![80_u16, 81, 8080, 53])).prop_map(|(name, protocol, port)| {
        ContainerPort {
            name: name.map(Arc::from),
            protocol,
            port,
            host: None,
        }
    })
}

fn a_policy(number: u8, parts: Parts) -> impl Strategy<Value = Option<Policy>> {
    let rules = || prop::option::of(prop::collection::vec(rule(parts), 0..3));
    let rest = (
        one_of(&NAMESPACES[..]),
        selector(&POD_LABELS, 2),
        rules(),
        rules(),
        prop::bool::weighted(0.2),
    );
    prop::option::weighted(
        0.8,
        rest.prop_map(
            move |(namespace, subject, ingress, egress, is_audit)| Policy {
                id: name(&format!("{namespace}/np{number}")),
                subject,
                ingress,
                egress,
                is_audit,
            },
        ),
    )
}

fn rule(parts: Parts) -> impl Strategy<Value = Rule> {
    let peers = prop_oneof![
        1 => Just(Peers::Any),
        3 => prop::collection::vec(peer(parts), 0..3).prop_map(Peers::Of),
    ];
    let ports = prop_oneof![
        1 => Just(Ports::Any),
        2 => prop::collection::vec(port(), 0..3).prop_map(Ports::Of),
    ];
    (peers, ports).prop_map(|(peers, ports)| Rule { peers, ports })
}

fn peer(parts: Parts) -> BoxedStrategy<PeerSelector> {
    let namespaces = prop::option::of(selector(&NAMESPACE_LABELS, 1));
    let pods = (namespaces, selector(&POD_LABELS, 2))
        .prop_map(|(namespaces, pods)| PeerSelector::Pods(PodPeers { namespaces, pods }));
    let block = one_of(&CIDRS[..]).prop_flat_map(|cidr| {
        let cidr: IpNet = cidr.parse().unwrap();
        let within: Vec<IpNet> = CIDRS.iter().map(|net| net.parse().unwrap()).collect();
        let within: Vec<_> = within
            .into_iter()
            .filter(|net| cidr.contains(net))
            .collect();
        let most = within.len().min(3);
        subsequence(within, 0..=most)
            .prop_map(move |except| PeerSelector::Block(Block { cidr, except }))
    });
    if parts != Parts::All {
        return prop_oneof![2 => pods, 1 => block].boxed();
    }
    prop_oneof![
        4 => pods,
        2 => block,
        1 => Just(PeerSelector::Unsupported("services".into())),
    ]
    .boxed()
}

fn port() -> impl Strategy<Value = PortMatch> {
    let numbers = (one_of(vec![1_u16, 53, 79, 80, 81]), 0_u16..3);
    let numbers = numbers.prop_map(|(first, more)| PortRange::Numbers {
        first,
        last: first + more,
    });
    let wide = Just(PortRange::Numbers {
        first: 81,
        last: 65535,
    });
    let named = one_of(vec!["http", "dns"]).prop_map(|name| PortRange::Named(name.into()));
    let range = prop_oneof![1 => Just(PortRange::Any), 4 => numbers, 1 => wide, 2 => named];
    (protocol(), range).prop_map(|(protocol, port)| PortMatch { protocol, port })
}

pub(super) fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![
        4 => Just(Protocol::TCP),
        2 => Just(Protocol::UDP),
        1 => Just(Protocol::SCTP),
    ]
}

fn some_labels(of: &'static [(&str, &[&str])]) -> impl Strategy<Value = Labels> {
    let each: Vec<_> = of
        .iter()
        .map(|(key, values)| {
            let value = prop::option::of(one_of(*values));
            value.prop_map(move |value| Some((Arc::from(*key), Arc::from(value?))))
        })
        .collect();
    each.prop_map(|labels| labels.into_iter().flatten().collect())
}

pub(super) fn selector(
    of: &'static [(&str, &[&str])],
    most: usize,
) -> impl Strategy<Value = Selector> {
    let requirement = one_of(of).prop_flat_map(|(key, values)| {
        let values = subsequence(values, 0..=values.len())
            .prop_map(|values| values.into_iter().map(Arc::from).collect::<Vec<Arc<str>>>());
        let operator = prop_oneof![
            4 => values.clone().prop_map(Operator::In),
            2 => values.prop_map(Operator::NotIn),
            1 => Just(Operator::Exists),
            1 => Just(Operator::DoesNotExist),
        ];
        operator.prop_map(move |operator| Requirement {
            key: key.into(),
            operator,
        })
    });
    prop::collection::vec(requirement, 0..=most).prop_map(|requirements| Selector { requirements })
}
