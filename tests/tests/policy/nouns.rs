//! Short ways to write objects down. Nothing random is here.

use std::net::IpAddr;
use std::sync::Arc;

use weir_agent::compile::PolicyRows;
use weir_agent::compile::policy::{Compiler, NodeView, Report, RuleBook, Touched};
use weir_agent::model::{
    ContainerPort, Labels, Namespace, NamespacePhase, Node, Object, ObjectName, Operator,
    PeerSelector, Peers, Pod, PodNetwork, PodPeers, PodPhase, Policy, PortMatch, PortRange, Ports,
    Requirement, Rule, Selector, Snapshot,
};
use weir_common::Protocol;
use weir_tests::oracle::{Cluster, Party, Who};

/// The nodes of every test cluster with their addresses, and where each answers DNS.
pub(super) const NODES: [(&str, [&str; 2]); 2] = [
    ("n1", ["10.1.0.1", "fd01::1"]),
    ("n2", ["10.1.0.2", "fd01::2"]),
];
pub(super) const DNS: [&str; 2] = ["169.254.20.10", "fd02::10"];
pub(super) const OUTSIDE: [&str; 8] = [
    "192.0.2.1",
    "2001:db8::1",
    "192.0.2.2",
    "198.51.101.255",
    "203.0.113.9",
    "2001:db8:0:1::1",
    "2001:db9::1",
    "fd99::1",
];

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// "ns/name".
pub(super) fn name(text: &str) -> ObjectName {
    let (namespace, name) = text.split_once('/').unwrap();
    ObjectName::new(namespace, name)
}

/// "app=web,tier=front", or nothing.
pub(super) fn labels(text: &str) -> Labels {
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    pairs.map(|(k, v)| (k.into(), v.into())).collect()
}

/// `matchLabels`.
pub(super) fn select(text: &str) -> Selector {
    let equal = |(key, value)| Requirement {
        key,
        operator: Operator::In(vec![value]),
    };
    Selector {
        requirements: labels(text).into_iter().map(equal).collect(),
    }
}

/// One of `matchExpressions`.
pub(super) fn express(key: &str, operator: Operator) -> Selector {
    Selector {
        requirements: vec![Requirement {
            key: key.into(),
            operator,
        }],
    }
}

pub(super) fn namespace(name: &str, text: &str) -> Namespace {
    Namespace {
        name: name.into(),
        labels: labels(text),
        phase: NamespacePhase::Active,
        keeps_established: false,
    }
}

/// A running pod on n1 with the addresses 10.0.0.`number` and fd00::`number`.
pub(super) fn pod(id: &str, text: &str, number: u8) -> Pod {
    Pod {
        id: name(id),
        uid: format!("uid-{number:03}").into(),
        static_uid: None,
        labels: labels(text),
        node: Some("n1".into()),
        addresses: vec![
            ip(&format!("10.0.0.{number}")),
            ip(&format!("fd00::{number}")),
        ],
        network: PodNetwork::Own,
        phase: PodPhase::Running,
        ready: true,
        hostname: None,
        subdomain: None,
        ports: Vec::new(),
    }
}

pub(super) fn policy(
    id: &str,
    subject: Selector,
    ingress: Option<Vec<Rule>>,
    egress: Option<Vec<Rule>>,
) -> Policy {
    Policy {
        id: name(id),
        subject,
        ingress,
        egress,
        is_audit: false,
    }
}

/// `{}`.
pub(super) fn anything() -> Rule {
    Rule {
        peers: Peers::Any,
        ports: Ports::Any,
    }
}

/// All ports of some peers.
pub(super) fn only(peers: Vec<PeerSelector>) -> Rule {
    Rule {
        peers: Peers::Of(peers),
        ports: Ports::Any,
    }
}

pub(super) fn pods(selector: Selector) -> PeerSelector {
    PeerSelector::Pods(PodPeers {
        namespaces: None,
        pods: selector,
    })
}

pub(super) fn pods_in(namespaces: Selector, pods: Selector) -> PeerSelector {
    PeerSelector::Pods(PodPeers {
        namespaces: Some(namespaces),
        pods,
    })
}

pub(super) fn tcp(first: u16, last: u16) -> PortMatch {
    PortMatch {
        protocol: Protocol::TCP,
        port: PortRange::Numbers { first, last },
    }
}

pub(super) fn view(node: &str) -> NodeView {
    let addresses = NODES.iter().filter(|(name, _)| *name == node);
    NodeView {
        name: node.into(),
        addresses: addresses
            .flat_map(|(_, ips)| ips)
            // Its devices have those of its DNS too.
            .chain(&DNS)
            .copied()
            .map(ip)
            .collect(),
        dns: DNS.map(ip).to_vec(),
    }
}

pub(super) fn snapshot(cluster: &Cluster) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for (name, addresses) in NODES {
        snapshot.apply(Object::Node(Arc::new(Node {
            name: name.into(),
            labels: Labels::new(),
            addresses: addresses.map(ip).to_vec(),
            internal: Vec::new(),
            pod_cidrs: Vec::new(),
            network: Default::default(),
        })));
    }
    for namespace in &cluster.namespaces {
        snapshot.apply(Object::Namespace(Arc::new(namespace.clone())));
    }
    for pod in &cluster.pods {
        snapshot.apply(Object::Pod(Arc::new(pod.clone())));
    }
    for policy in &cluster.policies {
        snapshot.apply(Object::Policy(Arc::new(policy.clone())));
    }
    for policy in &cluster.cluster_policies {
        snapshot.apply(Object::ClusterPolicy(Arc::new(policy.clone())));
    }
    snapshot
}

/// What a compiler says, read once.
pub(super) struct Compiled {
    rows: PolicyRows,
    book: RuleBook,
    reports: Vec<Report>,
}

impl Compiled {
    pub(super) fn of(compiler: &Compiler) -> Self {
        Self {
            rows: compiler.rows(),
            book: compiler.book(),
            reports: compiler.reports(),
        }
    }

    pub(super) fn rows(&self) -> &PolicyRows {
        &self.rows
    }

    pub(super) fn book(&self) -> &RuleBook {
        &self.book
    }

    pub(super) fn reports(&self) -> &[Report] {
        &self.reports
    }
}

/// A compiler that was told of all objects at once.
pub(super) fn compiler(snapshot: &Snapshot, node: &str, hash_bits: u32) -> Compiler {
    let mut compiler = Compiler::with_hash_bits(hash_bits);
    compiler.update(&Touched::all(snapshot), snapshot, &view(node));
    compiler.plan();
    compiler.commit();
    compiler
}

/// Everything that is in the one or the other.
pub(super) fn touched(before: &Snapshot, after: &Snapshot) -> Touched {
    let (mut all, others) = (Touched::all(before), Touched::all(after));
    all.pods.extend(others.pods);
    all.namespaces.extend(others.namespaces);
    all.nodes.extend(others.nodes);
    all.policies.extend(others.policies);
    all.cluster_policies.extend(others.cluster_policies);
    all
}

pub(super) fn compiled(cluster: &Cluster, node: &str) -> Compiled {
    Compiled::of(&compiler(&snapshot(cluster), node, u32::BITS))
}

/// Everybody who can send or receive, each address its own party.
pub(super) fn parties(cluster: &Cluster) -> Vec<Party> {
    let mut parties = Vec::new();
    let mut add = |addresses: &[IpAddr], is: Who| {
        parties.extend(addresses.iter().map(|address| Party {
            address: *address,
            is: is.clone(),
        }));
    };
    for pod in cluster
        .pods
        .iter()
        .filter(|pod| pod.phase != PodPhase::Finished)
    {
        match pod.network {
            PodNetwork::Own => add(&pod.addresses, Who::Pod(pod.clone())),
            // Its addresses are its node's, which are parties already.
            PodNetwork::Host => {}
        }
    }
    for (name, addresses) in NODES {
        add(&addresses.map(ip), Who::Node(name.into()));
    }
    add(&OUTSIDE.map(ip), Who::Outside);
    add(&DNS.map(ip), Who::Pod(dns_pod()));
    parties
}

/// The pod that the DNS of a node is taken for.
pub(super) fn dns_pod() -> Pod {
    let port = |name: &str, protocol| ContainerPort {
        name: Some(name.into()),
        protocol,
        port: 53,
        host: None,
    };
    Pod {
        node: None,
        ports: vec![port("dns", Protocol::UDP), port("dns-tcp", Protocol::TCP)],
        ..pod("kube-system/dns", "k8s-app=kube-dns", 255)
    }
}
