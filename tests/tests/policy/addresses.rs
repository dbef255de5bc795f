//! Whose an address is, and which pods get rules.

use weir_agent::compile::policy::{Claimant, Direction, Report};
use weir_agent::model::{Pod, PodNetwork, PodPhase, Selector};
use weir_common::policy::Class;
use weir_common::{Addr, Protocol};

use super::nouns::{
    Compiled, DNS, NODES, OUTSIDE, compiled, ip, name, only, pod, pods, pods_in, policy, select,
};
use super::walk::{class, judge};

use super::cases::{shop, shop_with};

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
fn addresses_of_this_node_have_its_class_and_nobody_whom_no_policy_asks_for_has_a_row() {
    let compiled = compiled(&shop(), "n1");
    for address in NODES[0].1 {
        assert_eq!(class(compiled.rows(), ip(address)), Class::OWN_NODE);
    }
    // Nobody asks for another node, nor for DNS.
    for address in OUTSIDE.iter().chain(&NODES[1].1).chain(&DNS) {
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
    assert_eq!(
        classes.len(),
        2,
        "this node, shop/web; all others have none"
    );
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
