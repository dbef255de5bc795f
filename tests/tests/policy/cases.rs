//! The semantics of NetworkPolicy by hand: each case names one, and says who reaches whom. The oracle
//! is asked too, so a mistake in it shows.

use std::sync::Arc;

use weir_agent::compile::policy::{Claimant, Compiled, Direction, Report, RuleOwner, compile};
use weir_agent::model::{
    Block, ContainerPort, Operator, PeerSelector, Peers, Pod, PodNetwork, PodPhase, Policy,
    PortMatch, PortRange, Ports, Rule, Selector,
};
use weir_common::policy::{Class, RuleId};
use weir_common::{Addr, Protocol};
use weir_tests::oracle::{Cluster, Party, Who, may_receive, may_send};

use super::nouns::{
    DNS, NODES, OUTSIDE, anything, compiled, dns_pod, express, ip, name, namespace, only, pod,
    pods, pods_in, policy, select, snapshot, tcp, view,
};
use super::walk::{Answer, class, judge};

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
    }
}

fn shop_with(policies: Vec<Policy>) -> Cluster {
    Cluster { policies, ..shop() }
}

/// "shop/web", "node", "other-node", "dns" or "outside".
fn party(cluster: &Cluster, text: &str) -> Party {
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

#[test]
fn only_pods_of_this_node_that_live_in_their_own_network_get_rules() {
    let base = || pod("shop/x", "", 9);
    let cases: Vec<(&str, Pod, bool)> = vec![
        ("running", base(), true),
        (
            "pending",
            Pod {
                phase: PodPhase::Pending,
                ..base()
            },
            true,
        ),
        (
            "terminating",
            Pod {
                phase: PodPhase::Terminating,
                ..base()
            },
            true,
        ),
        (
            "finished",
            Pod {
                phase: PodPhase::Finished,
                ..base()
            },
            false,
        ),
        (
            "elsewhere",
            Pod {
                node: Some("n2".into()),
                ..base()
            },
            false,
        ),
        (
            "nowhere yet",
            Pod {
                node: None,
                ..base()
            },
            false,
        ),
        (
            "in the node's network",
            Pod {
                network: PodNetwork::Host,
                ..base()
            },
            false,
        ),
        (
            "without an address yet",
            Pod {
                addresses: Vec::new(),
                ..base()
            },
            true,
        ),
    ];
    for (case, pod, expected) in cases {
        let deny = policy("shop/p", Selector::default(), Some(vec![]), Some(vec![]));
        let mut cluster = shop_with(vec![deny]);
        cluster.pods.push(pod);
        let compiled = compiled(&cluster, "n1");
        assert_eq!(
            compiled.rows().rules.contains_key(&name("shop/x")),
            expected,
            "{case}"
        );
    }
}

#[test]
fn who_has_an_address_that_several_claim() {
    let taken = |pod: Pod| {
        let allow_x = policy(
            "shop/p",
            select("app=db"),
            Some(vec![only(vec![pods(select("app=x"))])]),
            None,
        );
        let mut cluster = shop_with(vec![allow_x]);
        cluster.pods.push(pod);
        compiled(&cluster, "n1")
    };
    let x = |address: &str, uid: &str, phase| Pod {
        addresses: vec![ip(address)],
        uid: uid.into(),
        phase,
        ..pod("shop/x", "app=x", 9)
    };
    let holder = |c: &Compiled| match c.reports() {
        [] => None,
        [Report::AddressTaken { pod, holder, .. }] => Some((pod.to_string(), holder.clone())),
        reports => panic!("{reports:?}"),
    };
    let of = |text: &str| Claimant::Pod(name(text));
    use PodPhase::{Finished, Running, Terminating};
    let web = "10.0.0.1";
    let cases = [
        (
            "the greater uid",
            x(web, "uid-9", Running),
            Some(("shop/web", of("shop/x"))),
        ),
        (
            "the smaller uid",
            x(web, "uid-0", Running),
            Some(("shop/x", of("shop/web"))),
        ),
        (
            "one that is leaving",
            x(web, "uid-9", Terminating),
            Some(("shop/x", of("shop/web"))),
        ),
        ("one that is gone", x(web, "uid-9", Finished), None),
        (
            "its own node",
            x("10.1.0.1", "uid-9", Running),
            Some(("shop/x", Claimant::Node)),
        ),
        (
            "another node",
            x("10.1.0.2", "uid-9", Running),
            Some(("shop/x", Claimant::Node)),
        ),
        (
            "the DNS",
            x(DNS[0], "uid-9", Running),
            Some(("shop/x", Claimant::Dns)),
        ),
    ];
    for (case, pod, expected) in cases {
        let address = pod.addresses[0];
        let compiled = taken(pod);
        let expected = expected.map(|(pod, holder)| (pod.to_string(), holder));
        assert_eq!(holder(&compiled), expected, "{case}");
        let probe = (Protocol::TCP, 80);
        let answer = judge(
            compiled.rows(),
            &name("shop/db"),
            Direction::Ingress,
            address,
            probe,
        );
        let allowed = case == "the greater uid" || case == "its own node";
        assert_eq!(answer.is_allowed(), allowed, "{case}");
    }
}

#[test]
fn addresses_of_this_node_have_its_class_and_nothing_outside_has_a_row() {
    let compiled = compiled(&shop(), "n1");
    for address in NODES[0].1 {
        assert_eq!(class(compiled.rows(), ip(address)), Class::OWN_NODE);
    }
    for address in NODES[1].1.iter().chain(&DNS) {
        assert!(class(compiled.rows(), ip(address)).0 >= Class::FIRST_COMPILED);
    }
    for address in OUTSIDE {
        assert!(
            !compiled
                .rows()
                .classes
                .contains_key(&Addr::from(ip(address)))
        );
    }
}

#[test]
fn pods_that_no_policy_can_tell_apart_share_everything() {
    let mut cluster = shop_with(vec![policy(
        "shop/p",
        select("app=db"),
        Some(vec![only(vec![pods(select("app=web"))])]),
        None,
    )]);
    cluster
        .pods
        .push(pod("shop/db2", "app=db,unasked=label", 5));
    let compiled = compiled(&cluster, "n1");
    let rows = compiled.rows();
    assert_eq!(rows.rules[&name("shop/db")], rows.rules[&name("shop/db2")]);
    assert_eq!(class(rows, ip("10.0.0.2")), class(rows, ip("10.0.0.5")));
    let classes: std::collections::BTreeSet<_> = rows.classes.values().collect();
    assert_eq!(classes.len(), 3, "this node, shop/web, everybody else");
}

#[test]
fn a_policy_that_isolates_no_pod_here_costs_nothing() {
    let mut cluster = shop_with(vec![policy(
        "shop/p",
        select("app=db"),
        Some(vec![only(vec![pods(select("app=web"))])]),
        None,
    )]);
    cluster.pods[1].node = Some("n2".into());
    let with = compiled(&cluster, "n1");
    cluster.policies.clear();
    assert_eq!(with.rows(), compiled(&cluster, "n1").rows());
    assert!(with.rows().verdicts.is_empty());
}

#[test]
fn verdicts_name_their_owners() {
    let web_on_80 = Rule {
        peers: Peers::Of(vec![pods(select("app=web"))]),
        ports: Ports::Of(vec![tcp(80, 80)]),
    };
    let everybody_on_443 = Rule {
        peers: Peers::Any,
        ports: Ports::Of(vec![tcp(80, 443)]),
    };
    let cluster = shop_with(vec![
        policy(
            "shop/b",
            select("app=db"),
            Some(vec![everybody_on_443, web_on_80.clone()]),
            None,
        ),
        policy("shop/a", Selector::default(), Some(vec![web_on_80]), None),
    ]);
    let compiled = compiled(&cluster, "n1");
    let owner = |peer: &str, port| {
        let peer = party(&cluster, peer).address;
        let probe = (Protocol::TCP, port);
        let answer = judge(
            compiled.rows(),
            &name("shop/db"),
            Direction::Ingress,
            peer,
            probe,
        );
        let (Answer::Allowed(rule) | Answer::Denied(rule)) = answer else {
            panic!("{answer:?}")
        };
        compiled.book().owner(rule).unwrap().to_string()
    };
    assert_eq!(owner("shop/web", 80), "allowed by shop/a spec.ingress[0]");
    assert_eq!(owner("shop/web", 81), "allowed by shop/b spec.ingress[0]");
    assert_eq!(owner("outside", 80), "allowed by shop/b spec.ingress[0]");
    let denied = "no rule allows it; ingress is isolated by shop/a, shop/b";
    assert_eq!(owner("outside", 22), denied);
    assert!(compiled.book().owner(RuleId::NONE).is_none());
    let isolated = RuleOwner::Isolated {
        policies: vec![name("shop/a"), name("shop/b")],
        direction: Direction::Ingress,
    };
    assert!(compiled.book().iter().any(|(_, owner)| *owner == isolated));
}

#[test]
fn parts_that_allow_nothing_are_reported_in_words() {
    let block = PeerSelector::Block(Block {
        cidr: "10.0.0.0/8".parse().unwrap(),
        except: Vec::new(),
    });
    let odd = vec![
        PortMatch {
            protocol: Protocol::TCP,
            port: PortRange::Named("http".into()),
        },
        PortMatch {
            protocol: Protocol(47),
            port: PortRange::Any,
        },
        tcp(90, 80),
    ];
    let egress = vec![
        anything(),
        Rule {
            peers: Peers::Of(vec![pods(Selector::default()), block]),
            ports: Ports::Of(odd),
        },
    ];
    let ingress = vec![only(vec![PeerSelector::Unsupported("services".into())])];
    let cluster = shop_with(vec![policy(
        "shop/p",
        Selector::default(),
        Some(ingress),
        Some(egress),
    )]);
    let words: Vec<String> = compiled(&cluster, "n1")
        .reports()
        .iter()
        .map(Report::to_string)
        .collect();
    assert_eq!(
        words,
        [
            "NetworkPolicy shop/p: spec.ingress[0].from[0] is a peer that is not understood (services) \
             and allows nothing",
            "NetworkPolicy shop/p: spec.egress[1].ports[0] is the named port \"http\" of egress, which \
             this version does not know, and allows nothing",
            "NetworkPolicy shop/p: spec.egress[1].to[1] is an ipBlock, which this version does not \
             know, and allows nothing",
            "NetworkPolicy shop/p: spec.egress[1].ports[1] has protocol 47, not TCP, UDP or SCTP, and \
             allows nothing",
            "NetworkPolicy shop/p: spec.egress[1].ports[2] ends at 80, before 90, and allows nothing",
        ]
    );
}

#[test]
fn kept_policies_hold_until_one_of_their_name_exists() {
    let deny = Arc::new(policy("shop/p", Selector::default(), Some(vec![]), None));
    let answer = |cluster: &Cluster| {
        let none = Compiled::default();
        let compiled = compile(
            &snapshot(cluster),
            &view("n1"),
            std::slice::from_ref(&deny),
            &none,
        );
        let probe = (Protocol::TCP, 80);
        judge(
            compiled.rows(),
            &name("shop/db"),
            Direction::Ingress,
            ip("10.0.0.1"),
            probe,
        )
        .is_allowed()
    };
    assert!(!answer(&shop()));
    let replaced = policy("shop/p", Selector::default(), Some(vec![anything()]), None);
    assert!(answer(&shop_with(vec![replaced])));
}

#[test]
fn in_a_host_network_a_pod_is_its_node() {
    let mut cluster = shop_with(vec![policy(
        "shop/p",
        select("app=db"),
        Some(vec![only(vec![pods_in(
            Selector::default(),
            Selector::default(),
        )])]),
        None,
    )]);
    for (id, address) in [
        ("shop/h1", "10.1.0.1"),
        ("shop/h2", "10.1.0.2"),
        ("shop/h3", "10.1.0.3"),
    ] {
        cluster.pods.push(Pod {
            network: PodNetwork::Host,
            addresses: vec![ip(address)],
            ..pod(id, "app=web", 9)
        });
    }
    let compiled = compiled(&cluster, "n1");
    for (address, allowed) in [("10.1.0.1", true), ("10.1.0.2", false), ("10.1.0.3", false)] {
        let probe = (Protocol::TCP, 80);
        let answer = judge(
            compiled.rows(),
            &name("shop/db"),
            Direction::Ingress,
            ip(address),
            probe,
        );
        assert_eq!(answer.is_allowed(), allowed, "{address}");
    }
}
