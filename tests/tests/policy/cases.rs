//! The semantics of NetworkPolicy by hand: each case names one, and says who reaches whom. The oracle
//! is asked too, so a mistake in it shows.

use std::sync::Arc;

use weir_agent::compile::policy::Direction;
use weir_agent::model::{
    ContainerPort, Operator, PeerSelector, Peers, Policy, PortMatch, PortRange, Ports, Rule,
    Selector,
};
use weir_common::Protocol;
use weir_tests::oracle::{Cluster, Party, Who, may_receive, may_send};

use super::nouns::{
    DNS, NODES, OUTSIDE, anything, compiled, dns_pod, express, ip, name, namespace, only, pod,
    pods, pods_in, policy, select, tcp,
};
use super::walk::{Answer, judge};

/// Two namespaces with a web and a db pod each, all on n1; policies come from the case.
pub(super) fn shop() -> Cluster {
    Cluster {
        namespaces: vec![
            namespace("shop", "team=x"),
            namespace("blog", "team=y"),
            namespace("kube-system", ""),
        ],
        pods: vec![
            pod("shop/web", "app=web,tier=front", 1),
            pod("shop/db", "app=db,tier=back", 2),
            pod("blog/web", "app=web", 3),
            pod("blog/db", "app=db", 4),
        ],
        policies: Vec::new(),
        cluster_policies: Vec::new(),
    }
}

pub(super) fn shop_with(policies: Vec<Policy>) -> Cluster {
    Cluster { policies, ..shop() }
}

/// "shop/web", "node", "other-node", "dns" or "outside".
pub(super) fn party(cluster: &Cluster, text: &str) -> Party {
    let of = |address: &str, is| Party {
        address: ip(address),
        is,
    };
    match text {
        "node" => of(NODES[0].1[0], Who::Node("n1".into())),
        "other-node" => of(NODES[1].1[0], Who::Node("n2".into())),
        "dns" => of(DNS[0], Who::Pod(dns_pod())),
        "outside" => of(OUTSIDE[1], Who::Outside),
        pod => {
            let pod = cluster.pods.iter().find(|p| p.id == name(pod)).unwrap();
            Party {
                address: pod.addresses[0],
                is: Who::Pod(pod.clone()),
            }
        }
    }
}

/// Who may exchange TCP port 80 with shop/db, of all others in the cluster and around it?
fn peers_of_db(cluster: &Cluster, direction: Direction) -> Vec<&'static str> {
    let everybody = [
        "shop/web",
        "blog/web",
        "blog/db",
        "node",
        "other-node",
        "dns",
        "outside",
    ];
    let reaches = |peer: &&str| exchange(cluster, "shop/db", direction, peer, (Protocol::TCP, 80));
    everybody.into_iter().filter(reaches).collect()
}

/// What the tables say, when the oracle says the same.
fn exchange(
    cluster: &Cluster,
    subject: &str,
    direction: Direction,
    peer: &str,
    probe: (Protocol, u16),
) -> bool {
    let compiled = compiled(cluster, "n1");
    let (us, them) = (party(cluster, subject), party(cluster, peer));
    let answer = judge(
        compiled.rows(),
        &name(subject),
        direction,
        them.address,
        probe,
    );
    let oracle = match direction {
        Direction::Ingress => may_receive(cluster, &them, &us, probe.0, probe.1),
        Direction::Egress => may_send(cluster, &us, &them, probe.0, probe.1),
    };
    assert_ne!(answer, Answer::Missing);
    assert_eq!(answer.is_allowed(), oracle, "{subject} {direction} {peer}");
    answer.is_allowed()
}

const EVERYBODY: &[&str] = &[
    "shop/web",
    "blog/web",
    "blog/db",
    "node",
    "other-node",
    "dns",
    "outside",
];
/// Its own node reaches a pod, always.
const NOBODY: &[&str] = &["node"];

fn in_operator(values: &[&str]) -> Operator {
    Operator::In(values.iter().map(|v| Arc::from(*v)).collect())
}

fn not_in(values: &[&str]) -> Operator {
    Operator::NotIn(values.iter().map(|v| Arc::from(*v)).collect())
}

#[test]
fn who_may_connect_to_the_database() {
    let all = Selector::default;
    let db = || select("app=db");
    let to_db = |rules| policy("shop/p", db(), Some(rules), None);
    let metadata_name = |operator| express("kubernetes.io/metadata.name", operator);
    let cases: Vec<(&str, Vec<Policy>, &[&str])> = vec![
        ("no policy", vec![], EVERYBODY),
        (
            "default deny ingress",
            vec![policy("shop/p", all(), Some(vec![]), None)],
            NOBODY,
        ),
        (
            "default deny egress says nothing about ingress",
            vec![policy("shop/p", all(), None, Some(vec![]))],
            EVERYBODY,
        ),
        (
            "an empty podSelector selects the namespace, not the cluster",
            vec![policy("blog/p", all(), Some(vec![]), None)],
            EVERYBODY,
        ),
        (
            "a policy that selects another pod",
            vec![policy("shop/p", select("app=web"), Some(vec![]), None)],
            EVERYBODY,
        ),
        (
            "allow all: an empty rule",
            vec![to_db(vec![anything()])],
            EVERYBODY,
        ),
        (
            "policies add up",
            vec![
                policy("shop/a", all(), Some(vec![]), None),
                policy(
                    "shop/b",
                    db(),
                    Some(vec![only(vec![pods(select("app=web"))])]),
                    None,
                ),
            ],
            &["shop/web", "node"],
        ),
        (
            "a podSelector alone means the policy's namespace",
            vec![to_db(vec![only(vec![pods(select("app=web"))])])],
            &["shop/web", "node"],
        ),
        (
            "an empty podSelector as a peer: the policy's namespace",
            vec![to_db(vec![only(vec![pods(all())])])],
            &["shop/web", "node"],
        ),
        (
            "an empty namespaceSelector: every pod, nobody outside",
            vec![to_db(vec![only(vec![pods_in(all(), all())])])],
            &["shop/web", "blog/web", "blog/db", "node", "dns"],
        ),
        (
            "one item with both selectors: AND",
            vec![to_db(vec![only(vec![pods_in(
                select("team=y"),
                select("app=web"),
            )])])],
            &["blog/web", "node"],
        ),
        (
            "two items: OR",
            vec![to_db(vec![only(vec![
                pods_in(select("team=y"), all()),
                pods(select("app=web")),
            ])])],
            &["shop/web", "blog/web", "blog/db", "node"],
        ),
        (
            "two rules: OR",
            vec![to_db(vec![
                only(vec![pods_in(select("team=y"), select("app=db"))]),
                only(vec![pods(select("app=web"))]),
            ])],
            &["shop/web", "blog/db", "node"],
        ),
        (
            "a namespace by its name",
            vec![to_db(vec![only(vec![pods_in(
                metadata_name(in_operator(&["blog"])),
                all(),
            )])])],
            &["blog/web", "blog/db", "node"],
        ),
        (
            "every namespace but one",
            vec![to_db(vec![only(vec![pods_in(
                metadata_name(not_in(&["blog", "kube-system"])),
                all(),
            )])])],
            &["shop/web", "node"],
        ),
        (
            "NotIn holds for pods without the label",
            vec![to_db(vec![only(vec![pods_in(
                all(),
                express("tier", not_in(&["front"])),
            )])])],
            &["blog/web", "blog/db", "node", "dns"],
        ),
        (
            "DoesNotExist stays in the policy's namespace",
            vec![to_db(vec![only(vec![pods(express(
                "unknown",
                Operator::DoesNotExist,
            ))])])],
            &["shop/web", "node"],
        ),
        (
            "Exists",
            vec![to_db(vec![only(vec![pods_in(
                all(),
                express("tier", Operator::Exists),
            )])])],
            &["shop/web", "node"],
        ),
        (
            "In of no value selects nobody",
            vec![to_db(vec![only(vec![pods_in(
                all(),
                express("app", in_operator(&[])),
            )])])],
            NOBODY,
        ),
        (
            "a list of peers without an item that is understood is not an absent list",
            vec![to_db(vec![only(vec![PeerSelector::Unsupported(
                "x".into(),
            )])])],
            NOBODY,
        ),
    ];
    for (case, policies, expected) in cases {
        let reached = peers_of_db(&shop_with(policies), Direction::Ingress);
        assert_eq!(reached, expected, "{case}");
    }
}

#[test]
fn whom_the_database_may_connect_to() {
    let from_db = |rules| policy("shop/p", select("app=db"), None, Some(rules));
    let dns = pods_in(
        select("kubernetes.io/metadata.name=kube-system"),
        select("k8s-app=kube-dns"),
    );
    let cases: Vec<(&str, Vec<Policy>, &[&str])> = vec![
        ("default deny egress", vec![from_db(vec![])], NOBODY),
        (
            "default deny ingress says nothing about egress",
            vec![policy("shop/p", Selector::default(), Some(vec![]), None)],
            EVERYBODY,
        ),
        ("allow all", vec![from_db(vec![anything()])], EVERYBODY),
        (
            "the node's DNS is a kube-dns pod in kube-system",
            vec![from_db(vec![only(vec![dns])])],
            &["node", "dns"],
        ),
        (
            "the policy's namespace",
            vec![from_db(vec![only(vec![pods(Selector::default())])])],
            &["shop/web", "node"],
        ),
    ];
    for (case, policies, expected) in cases {
        let reached = peers_of_db(&shop_with(policies), Direction::Egress);
        assert_eq!(reached, expected, "{case}");
    }
}

#[test]
fn which_ports_are_open() {
    let port = |protocol, port| PortMatch { protocol, port };
    let http = || PortRange::Named("http".into());
    let declared = |name: &str, protocol, port| ContainerPort {
        name: Some(name.into()),
        protocol,
        port,
        host: None,
    };
    let (t, u, s) = (Protocol::TCP, Protocol::UDP, Protocol::SCTP);
    type Case = (&'static str, Ports, Vec<(Protocol, u16)>);
    let cases: Vec<Case> = vec![
        (
            "no list: everything, ICMP too",
            Ports::Any,
            vec![(t, 80), (t, 443), (u, 80), (s, 80), (Protocol::ICMP, 80)],
        ),
        ("a number", Ports::Of(vec![tcp(80, 80)]), vec![(t, 80)]),
        (
            "endPort",
            Ports::Of(vec![tcp(80, 500)]),
            vec![(t, 80), (t, 443)],
        ),
        (
            "a protocol without a port",
            Ports::Of(vec![port(u, PortRange::Any)]),
            vec![(u, 80)],
        ),
        (
            "SCTP is not TCP",
            Ports::Of(vec![port(
                s,
                PortRange::Numbers {
                    first: 80,
                    last: 80,
                },
            )]),
            vec![(s, 80)],
        ),
        (
            "a name that the pod declares",
            Ports::Of(vec![port(t, http())]),
            vec![(t, 443)],
        ),
        (
            "a name for another protocol",
            Ports::Of(vec![port(s, http())]),
            vec![],
        ),
        (
            "a name nobody declares",
            Ports::Of(vec![port(t, PortRange::Named("x".into()))]),
            vec![],
        ),
        ("a list of nothing", Ports::Of(vec![]), vec![]),
    ];
    for (case, ports, expected) in cases {
        let rule = Rule {
            peers: Peers::Any,
            ports,
        };
        let mut cluster = shop_with(vec![policy(
            "shop/p",
            select("app=db"),
            Some(vec![rule]),
            None,
        )]);
        cluster.pods[1].ports = vec![declared("http", t, 443), declared("http", u, 81)];
        let probes = [(t, 80), (t, 443), (u, 80), (s, 80), (Protocol::ICMP, 80)];
        let open: Vec<_> = probes
            .into_iter()
            .filter(|probe| exchange(&cluster, "shop/db", Direction::Ingress, "shop/web", *probe))
            .collect();
        assert_eq!(open, expected, "{case}");
    }
}

#[test]
fn a_named_port_is_each_pods_own() {
    let rule = Rule {
        peers: Peers::Any,
        ports: Ports::Of(vec![PortMatch {
            protocol: Protocol::TCP,
            port: PortRange::Named("http".into()),
        }]),
    };
    let mut cluster = shop_with(vec![policy(
        "shop/p",
        Selector::default(),
        Some(vec![rule]),
        None,
    )]);
    for (pod, port) in [(0, 80), (1, 8080)] {
        cluster.pods[pod].ports = vec![ContainerPort {
            name: Some("http".into()),
            protocol: Protocol::TCP,
            port,
            host: None,
        }];
    }
    for (pod, port, open) in [
        ("shop/web", 80, true),
        ("shop/web", 8080, false),
        ("shop/db", 80, false),
        ("shop/db", 8080, true),
    ] {
        let probe = (Protocol::TCP, port);
        let reached = exchange(&cluster, pod, Direction::Ingress, "outside", probe);
        assert_eq!(reached, open, "{pod} {port}");
    }
}

#[test]
fn a_change_of_labels_changes_who_is_allowed() {
    let mut cluster = shop_with(vec![policy(
        "shop/p",
        select("app=db"),
        Some(vec![only(vec![
            pods(select("app=web")),
            pods_in(select("team=z"), Selector::default()),
        ])]),
        None,
    )]);
    cluster.pods[0].labels = super::nouns::labels("app=other");
    assert_eq!(
        peers_of_db(&cluster, Direction::Ingress),
        ["node"],
        "of a peer"
    );
    cluster.namespaces[1].labels = super::nouns::labels("team=z");
    let blog = ["blog/web", "blog/db", "node"];
    assert_eq!(
        peers_of_db(&cluster, Direction::Ingress),
        blog,
        "of a namespace"
    );
    cluster.pods[1].labels = super::nouns::labels("app=other");
    assert_eq!(
        peers_of_db(&cluster, Direction::Ingress),
        EVERYBODY,
        "of the pod itself"
    );
}

#[test]
fn a_namespace_without_an_object_has_a_name_and_no_known_labels() {
    let blog_is = |selector: Selector| {
        let mut cluster = shop_with(vec![policy(
            "shop/p",
            select("app=db"),
            Some(vec![only(vec![pods_in(selector, Selector::default())])]),
            None,
        )]);
        cluster
            .namespaces
            .retain(|namespace| &*namespace.name != "blog");
        let compiled = compiled(&cluster, "n1");
        let probe = (Protocol::TCP, 80);
        judge(
            compiled.rows(),
            &name("shop/db"),
            Direction::Ingress,
            ip("10.0.0.3"),
            probe,
        )
        .is_allowed()
    };
    assert!(blog_is(Selector::default()));
    assert!(blog_is(select("kubernetes.io/metadata.name=blog")));
    assert!(!blog_is(select("team=y")));
    assert!(!blog_is(express("team", Operator::DoesNotExist)));
    assert!(!blog_is(express("team", not_in(&["x"]))));
}

#[test]
fn a_namespace_cannot_take_anothers_name_by_label() {
    let mut cluster = shop_with(vec![policy(
        "shop/p",
        select("app=db"),
        Some(vec![only(vec![pods_in(
            select("kubernetes.io/metadata.name=kube-system"),
            Selector::default(),
        )])]),
        None,
    )]);
    cluster.namespaces[1].labels = super::nouns::labels("kubernetes.io/metadata.name=kube-system");
    assert_eq!(peers_of_db(&cluster, Direction::Ingress), ["node", "dns"]);
}
