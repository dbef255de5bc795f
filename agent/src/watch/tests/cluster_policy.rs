//! ClusterNetworkPolicies: JSON in, our nouns or a reason out, and what holds of one that is not understood.

use serde_json::{Value, json};
use weir_common::Protocol;

use super::decoded;
use crate::model::convert::{Converted, Invalid, Problem};
use crate::model::{
    Block, ClusterPolicy, ClusterRule, Object, PeerSelector, Peers, PortMatch, PortRange, Ports,
    RuleAction, Selector, Tier,
};
use crate::watch::wire;

fn object(spec: &Value) -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "p"}, "spec": spec,
    })
}

fn of(object: Option<Object>) -> Option<ClusterPolicy> {
    match object? {
        Object::ClusterPolicy(policy) => Some(ClusterPolicy::clone(&policy)),
        other => panic!("{other:?}"),
    }
}

fn read(spec: &Value) -> (ClusterPolicy, Vec<Problem>) {
    match decoded::<wire::ClusterNetworkPolicy>(&object(spec)).1 {
        Ok(Converted { object, problems }) => (of(object).unwrap(), problems),
        Err(other) => panic!("{spec}: {other:?}"),
    }
}

fn policy(spec: &Value) -> ClusterPolicy {
    let (policy, problems) = read(spec);
    assert_eq!(problems, [], "{spec}");
    policy
}

fn refused(object: &Value) -> (String, Option<ClusterPolicy>) {
    match decoded::<wire::ClusterNetworkPolicy>(object).1 {
        Err(Invalid { reason, closed }) => (reason, of(closed)),
        Ok(converted) => panic!("{object}: {converted:?}"),
    }
}

/// A policy with these fields besides or instead.
fn spec(more: Value) -> Value {
    let mut spec = json!({"tier": "Admin", "priority": 5, "subject": {"namespaces": {}}});
    if let (Some(spec), Value::Object(more)) = (spec.as_object_mut(), more) {
        spec.extend(more);
    }
    spec
}

fn selects(key: &str, value: &str) -> Value {
    json!({"matchLabels": {key: value}})
}

fn selector(key: &str, value: &str) -> Selector {
    let both = json!({"pods": {"podSelector": selects(key, value)}});
    policy(&spec(json!({"subject": both}))).subject.pods
}

fn numbers(protocol: Protocol, first: u16, last: u16) -> PortMatch {
    let port = PortRange::Numbers { first, last };
    PortMatch { protocol, port }
}

#[test]
fn every_field_of_the_standard_channel_is_understood() {
    let (tcp, udp, sctp) = (Protocol::TCP, Protocol::UDP, Protocol::SCTP);
    let policy = policy(&json!({
        "tier": "Baseline", "priority": 1000,
        "subject": {"pods": {"namespaceSelector": selects("team", "a"), "podSelector": selects("app", "b")}},
        "ingress": [
            {"name": "first", "action": "Pass", "from": [{"namespaces": {}}, {"pods": {"podSelector": {}}}]},
            {"action": "Deny", "from": [{"namespaces": selects("team", "c")}], "protocols": [
                {"tcp": {"destinationPort": {"number": 80}}},
                {"udp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}},
                {"sctp": {"destinationPort": {"number": 65535}}},
                {"destinationNamedPort": "dns"},
            ]},
        ],
        "egress": [{"action": "Accept", "to": [{"networks": ["10.0.0.0/8", "fd00::/8"]}, {"namespaces": {}}]}],
    }));
    assert_eq!((policy.tier, policy.priority), (Tier::Baseline, 1000));
    assert_eq!(policy.subject.namespaces, Some(selector("team", "a")));
    assert_eq!(policy.subject.pods, selector("app", "b"));
    let [pass, deny] = &policy.ingress[..] else {
        panic!("{policy:?}");
    };
    assert_eq!(
        (pass.name.as_deref(), pass.action),
        (Some("first"), RuleAction::Pass)
    );
    assert_eq!(pass.rule.ports, Ports::Any);
    let Peers::Of(peers) = &pass.rule.peers else {
        panic!("{pass:?}");
    };
    // "if empty, it selects all Namespaces": so it is where it is absent.
    assert!(
        peers.len() == 2
            && peers.iter().all(|it| matches!(it, PeerSelector::Pods(pods)
                if pods.namespaces == Some(Selector::default()) && pods.pods == Selector::default())),
        "{peers:?}"
    );
    assert_eq!((&deny.name, deny.action), (&None, RuleAction::Deny));
    let named = |protocol| PortMatch {
        protocol,
        port: PortRange::Named("dns".into()),
    };
    let ports = vec![
        numbers(tcp, 80, 80),
        numbers(udp, 1, 65535),
        numbers(sctp, 65535, 65535),
        named(tcp),
        named(udp),
        named(sctp),
    ];
    assert_eq!(deny.rule.ports, Ports::Of(ports));
    let block = |cidr: &str| {
        PeerSelector::Block(Block {
            cidr: cidr.parse().unwrap(),
            except: Vec::new(),
        })
    };
    let Peers::Of(peers) = &policy.egress[0].rule.peers else {
        panic!("{policy:?}");
    };
    assert_eq!(peers[..2], [block("10.0.0.0/8"), block("fd00::/8")]);
    assert_eq!(peers.len(), 3);
    let none = self::policy(&spec(json!({"ingress": null, "egress": []})));
    assert!(none.ingress.is_empty() && none.egress.is_empty());
}

/// Does it deny everything?
fn denies_all(rule: &ClusterRule) -> bool {
    rule.action == RuleAction::Deny
        && rule.rule.peers == Peers::Any
        && rule.rule.ports == Ports::Any
}

/// Can it match nothing?
fn matches_nothing(rule: &ClusterRule) -> bool {
    rule.action == RuleAction::Accept
        && matches!(&rule.rule.peers, Peers::Of(peers)
            if peers.iter().all(|it| matches!(it, PeerSelector::Unsupported(_))))
}

#[test]
fn a_peer_of_an_unknown_kind_closes_its_rule_and_no_other() {
    let good = json!({"action": "Accept", "to": [{"namespaces": {}}]});
    for (peer, what) in [
        (json!({}), "it is of no known kind of peer"),
        (json!({"pods": null}), "it is of no known kind of peer"),
        (
            json!({"nodes": {}}),
            "nodes is experimental, and not supported",
        ),
        (
            json!({"domainNames": ["a.b"]}),
            "domainNames is experimental, and not supported",
        ),
        (
            json!({"planets": ["mars"]}),
            "planets is not a known kind of peer",
        ),
        (
            json!({"namespaces": {}, "planets": ["mars"]}),
            "planets is not a known kind of peer",
        ),
    ] {
        for action in ["Accept", "Deny", "Pass"] {
            let bad = json!({
                "name": "bad", "action": action, "to": [{"namespaces": {}}, peer],
                "protocols": [{"tcp": {"destinationPort": {"number": 80}}}],
            });
            let (policy, problems) = read(&spec(json!({"egress": [good, bad, good]})));
            let [before, bad, after] = &policy.egress[..] else {
                panic!("{policy:?}");
            };
            assert_eq!(before, after);
            assert!(!denies_all(before) && !matches_nothing(before));
            let so = if action == "Accept" {
                assert!(matches_nothing(bad), "{bad:?}");
                "its rule matches nothing"
            } else {
                assert!(denies_all(bad), "{bad:?}");
                "its rule denies everything"
            };
            assert_eq!(bad.name.as_deref(), Some("bad"));
            let part = "spec.egress[1].to[1]".to_owned();
            let reason = format!("{what}: {so}");
            assert_eq!(problems, [Problem { part, reason }]);
        }
    }
    // What is a peer of egress is none of ingress.
    let networks =
        json!({"ingress": [{"action": "Accept", "from": [{"networks": ["10.0.0.0/8"]}]}]});
    let (policy, problems) = read(&spec(networks));
    assert!(matches_nothing(&policy.ingress[0]));
    assert_eq!(problems.len(), 1);
}

/// What is wrong with one rule of egress, as a Deny, and where the message says that it is.
fn wrong_rules() -> Vec<(Value, &'static str)> {
    let any = json!([{"namespaces": {}}]);
    let protocols = |item: Value| json!({"to": any, "protocols": [item]});
    let networks = |list: Value| json!({"to": [{"networks": list}]});
    let port = |port: Value| protocols(json!({"tcp": {"destinationPort": port}}));
    vec![
        (json!({}), ".to: it must contain at least one item"),
        (json!({"to": []}), ".to: it must contain at least one item"),
        (
            json!({"to": null}),
            ".to: it must contain at least one item",
        ),
        (
            json!({"to": vec![json!({"namespaces": {}}); 26]}),
            ".to: 26 items are more than 25",
        ),
        (
            json!({"to": any, "from": any}),
            ": unknown field `from`, expected `to`",
        ),
        (
            json!({"to": any, "ports": []}),
            ".ports: unknown field `ports`, expected one of `name`, `action`, `from`, `to`, `protocols`",
        ),
        (
            json!({"to": any, "action": "Allow"}),
            ".action: \"Allow\" is not Accept, Deny or Pass",
        ),
        (
            json!({"to": any, "action": null}),
            ".action: invalid type: null, expected a string",
        ),
        (
            json!({"to": any, "name": "n".repeat(101)}),
            ".name: 101 characters are more than 100",
        ),
        (
            json!({"to": any, "protocols": []}),
            ".protocols: it must contain at least one item",
        ),
        (
            json!({"to": [{"namespaces": {}, "pods": {"podSelector": {}}}]}),
            ".to[0]: namespaces and pods exclude each other",
        ),
        (
            json!({"to": [{"pods": {}}]}),
            ".to[0].pods: missing field `podSelector`",
        ),
        (
            json!({"to": [{"pods": {"podSelector": {}, "namespaces": {}}}]}),
            ".to[0].pods.namespaces: unknown field `namespaces`, expected `namespaceSelector` or `podSelector`",
        ),
        (
            json!({"to": [{"namespaces": {"matchLabel": {}}}]}),
            ".to[0].namespaces.matchLabel: unknown field `matchLabel`, expected `matchLabels` or `matchExpressions`",
        ),
        (
            json!({"to": [{"namespaces": {"matchExpressions": [{"key": "a", "operator": "Gt"}]}}]}),
            ".to[0].namespaces: operator \"Gt\" is not In, NotIn, Exists or DoesNotExist",
        ),
        (
            networks(json!([])),
            ".to[0].networks: it must contain at least one item",
        ),
        (
            networks(json!("10.0.0.0/8")),
            ".to[0].networks: invalid type: string \"10.0.0.0/8\", expected a sequence",
        ),
        (
            networks(json!(["10.0.0.0"])),
            ".to[0].networks[0]: \"10.0.0.0\" is not a CIDR",
        ),
        (
            networks(json!(["10.0.0.1/8"])),
            ".to[0].networks[0]: 10.0.0.1/8 has bits behind its length, 10.0.0.0/8 has none",
        ),
        (
            networks(json!(["::ffff:10.0.0.0/104"])),
            ".to[0].networks[0]: ::ffff:10.0.0.0/104 is an IPv4-mapped IPv6 prefix",
        ),
        (
            protocols(json!({})),
            ".protocols[0]: it has none of tcp, udp, sctp and destinationNamedPort",
        ),
        (
            protocols(json!({"destinationNamedPort": ""})),
            ".protocols[0]: it has none of tcp, udp, sctp and destinationNamedPort",
        ),
        (
            protocols(json!({"icmp": {}})),
            ".protocols[0].icmp: unknown field `icmp`, expected one of `tcp`, `udp`, `sctp`, `destinationNamedPort`",
        ),
        (
            protocols(
                json!({"tcp": {"destinationPort": {"number": 1}}, "destinationNamedPort": "a"}),
            ),
            ".protocols[0]: tcp, udp, sctp and destinationNamedPort exclude each other",
        ),
        (
            protocols(
                json!({"tcp": {"destinationPort": {"number": 1}}, "udp": {"destinationPort": {"number": 1}}}),
            ),
            ".protocols[0]: tcp, udp, sctp and destinationNamedPort exclude each other",
        ),
        (
            protocols(json!({"tcp": {}})),
            ".protocols[0].tcp: it has no destinationPort",
        ),
        (
            port(json!({})),
            ".protocols[0].tcp.destinationPort: it has neither number nor range",
        ),
        (
            port(json!({"number": 0})),
            ".protocols[0].tcp.destinationPort.number: port 0 is not within 1 to 65535",
        ),
        (
            port(json!({"number": 65536})),
            ".protocols[0].tcp.destinationPort.number: port 65536 is not within 1 to 65535",
        ),
        (
            port(json!({"number": 1, "range": {"start": 1, "end": 2}})),
            ".protocols[0].tcp.destinationPort: number and range exclude each other",
        ),
        (
            port(json!({"range": {"start": 0, "end": 2}})),
            ".protocols[0].tcp.destinationPort.range.start: port 0 is not within 1 to 65535",
        ),
        (
            port(json!({"range": {"start": 2, "end": 65536}})),
            ".protocols[0].tcp.destinationPort.range.end: port 65536 is not within 1 to 65535",
        ),
        (
            port(json!({"range": {"start": 2, "end": 2}})),
            ".protocols[0].tcp.destinationPort.range: start 2 is not less than end 2",
        ),
        (
            port(json!({"range": {"start": 2}})),
            ".protocols[0].tcp.destinationPort.range: missing field `end`",
        ),
        (
            json!({"to": [{"networks": ["10.0.0.0/8"]}], "protocols": [{"destinationNamedPort": "a"}]}),
            ": destinationNamedPort stands beside networks, which have no names of ports",
        ),
    ]
}

#[test]
fn a_wrong_rule_quarantines_its_policy_and_is_closed_in_what_stands_in_for_it() {
    let good = json!({"action": "Accept", "to": [{"namespaces": {}}]});
    for (mut rule, reason) in wrong_rules() {
        for action in ["Accept", "Deny", "Pass"] {
            let fields = rule.as_object_mut().unwrap();
            let is_of_action = fields.contains_key("action");
            if !is_of_action {
                fields.insert("action".to_owned(), json!(action));
            }
            let (found, closed) = refused(&object(&spec(json!({"egress": [good, rule, good]}))));
            assert_eq!(found, format!("spec.egress[1]{reason}"), "{rule}");
            let closed = closed.unwrap();
            assert_eq!((closed.tier, closed.priority), (Tier::Admin, 5));
            let [before, bad, after] = &closed.egress[..] else {
                panic!("{closed:?}");
            };
            assert_eq!(before, after);
            assert!(
                !denies_all(before) && !matches_nothing(before),
                "{before:?}"
            );
            let is_closed = if action == "Accept" && !is_of_action {
                matches_nothing(bad)
            } else {
                denies_all(bad)
            };
            assert!(is_closed, "{bad:?}");
            if is_of_action {
                break;
            }
            rule.as_object_mut().unwrap().remove("action");
        }
    }
}

#[test]
fn a_wrong_policy_stands_closed_if_it_can_be_said_about_whom_it_is() {
    let rules = json!([{"action": "Accept", "from": [{"namespaces": {}}]}, {"action": "Pass", "from": [{"namespaces": {}}]}]);
    // (fields, reason, does something stand in, and of which priority)
    for (fields, reason, priority) in [
        (
            json!({"tier": "Middle"}),
            "spec.tier: \"Middle\" is not Admin or Baseline",
            None,
        ),
        (json!({"tier": null}), "spec.tier is missing", None),
        (json!({"priority": null}), "spec.priority is missing", None),
        (
            json!({"priority": "1"}),
            "spec.priority: invalid type: string \"1\", expected i64",
            None,
        ),
        (
            json!({"priority": -1}),
            "spec.priority: -1 is not within 0 to 1000",
            Some(0),
        ),
        (
            json!({"priority": 1001}),
            "spec.priority: 1001 is not within 0 to 1000",
            Some(1000),
        ),
        (json!({"subject": null}), "spec.subject is missing", None),
        (
            json!({"subject": {}}),
            "spec.subject: it has neither namespaces nor pods",
            None,
        ),
        (
            json!({"subject": {"nodes": {}}}),
            "spec.subject.nodes: unknown field `nodes`, expected `namespaces` or `pods`",
            None,
        ),
        (
            json!({"subject": {"namespaces": {}, "pods": {"podSelector": {}}}}),
            "spec.subject: namespaces and pods exclude each other",
            None,
        ),
        (
            json!({"egress": "none"}),
            "spec.egress: invalid type: string \"none\", expected a sequence",
            Some(5),
        ),
        (
            json!({"egress": vec![json!({"action": "Deny", "to": [{"namespaces": {}}]}); 26]}),
            "spec.egress: 26 rules are more than 25",
            Some(5),
        ),
        (
            json!({"users": {}}),
            "spec.users: unknown field `users`, expected one of `tier`, `priority`, `subject`, `ingress`, `egress`",
            Some(5),
        ),
    ] {
        let mut spec = spec(json!({"ingress": rules}));
        spec.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        let (found, closed) = refused(&object(&spec));
        assert_eq!(found, reason);
        assert_eq!(closed.as_ref().map(|it| it.priority), priority, "{fields}");
        let Some(closed) = closed else { continue };
        let [accept, pass] = &closed.ingress[..] else {
            panic!("{closed:?}");
        };
        let is_whole = fields.get("users").is_some();
        assert_eq!(
            (matches_nothing(accept), denies_all(pass)),
            (is_whole, is_whole),
            "{fields}"
        );
        match fields.get("egress") {
            None => assert!(closed.egress.is_empty(), "it says nothing about egress"),
            Some(Value::Array(_)) => assert_eq!(closed.egress.len(), 26),
            Some(_) => assert!(closed.egress.len() == 1 && denies_all(&closed.egress[0])),
        }
    }
    let mut nameless = object(&spec(json!({})));
    nameless["metadata"] = json!({});
    assert_eq!(
        refused(&nameless),
        ("metadata.name is missing".to_owned(), None)
    );
}

#[test]
fn a_network_that_is_written_twice_is_one_network() {
    let networks = |texts: Value| {
        let rule = json!({"action": "Deny", "to": [{"networks": texts}]});
        policy(&spec(json!({"egress": [rule]}))).egress
    };
    for (texts, once) in [
        (json!(["fd00::/8", "FD00::/8", "fd00:0::/8"]), "fd00::/8"),
        (json!(["10.0.0.0/8", "10.0.0.0/8"]), "10.0.0.0/8"),
    ] {
        assert_eq!(networks(texts), networks(json!([once])));
    }
    assert_ne!(
        networks(json!(["fd00::/8", "fd00::/9"])),
        networks(json!(["fd00::/8"]))
    );
}

#[test]
fn every_fault_of_a_policy_is_said_up_to_eight() {
    let rule = |network: &str| json!({"action": "Permit", "to": [{"networks": [network]}, {"nodes": {}}], "protocols": [{}, {"tcp": {}}]});
    let faulty = spec(json!({
        "tier": "Middle", "priority": 1001, "users": {},
        "egress": [rule("10.0.0.1/8"), rule("x")],
    }));
    let of = |texts: &[&str]| texts.join("; ");
    let said = [
        "spec.tier: \"Middle\" is not Admin or Baseline",
        "spec.priority: 1001 is not within 0 to 1000",
        "spec.users: unknown field `users`, expected one of `tier`, `priority`, `subject`, `ingress`, `egress`",
        "spec.egress[0].action: \"Permit\" is not Accept, Deny or Pass",
        "spec.egress[0].protocols[0]: it has none of tcp, udp, sctp and destinationNamedPort",
        "spec.egress[0].protocols[1].tcp: it has no destinationPort",
        "spec.egress[0].to[0].networks[0]: 10.0.0.1/8 has bits behind its length, 10.0.0.0/8 has none",
        "spec.egress[1].action: \"Permit\" is not Accept, Deny or Pass",
    ];
    // Three more of the second rule, and two peers of no known kind.
    let (reason, closed) = refused(&object(&faulty));
    assert_eq!(reason, format!("{}; and 5 more", of(&said)));
    assert_eq!(closed, None);

    let mut few = object(&spec(json!({
        "priority": 1001,
        "egress": [{"action": "Accept", "to": [{"nodes": {}}]}],
    })));
    few["metadata"]["annotations"] = json!({"weir.local/enforcement": "perhaps"});
    let said = [
        "spec.priority: 1001 is not within 0 to 1000",
        "spec.egress[0].to[0]: nodes is experimental, and not supported",
        "annotation weir.local/enforcement: \"perhaps\" is neither \"audit\" nor \"enforce\"",
    ];
    assert_eq!(refused(&few).0, of(&said));
}
