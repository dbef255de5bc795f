//! Cases of the API's documentation: the stories of users of network-policy-api, and what its fields say.

use std::collections::BTreeMap;

use weir_agent::model::{
    ContainerPort, Namespace, NamespacePhase, Object, ObjectName, Pod, PodNetwork, PodPhase,
};
use weir_agent::watch::documents::{Parsed, parse};
use weir_common::Protocol;

use super::{Cluster, Party, Passing, Who, allowed, received, sent};

const NODES: [(&str, &str); 2] = [("n1", "192.168.0.1"), ("n2", "192.168.0.2")];
/// By name, with the label `app` and the last byte of their addresses; all on n1.
const PODS: [(&str, &str, u8); 5] = [
    ("sensitive-ns/vault", "vault", 1),
    ("monitoring-ns/prometheus", "prometheus", 2),
    ("bar-ns-1/pub", "svc-pub", 3),
    ("foo/web", "web", 4),
    ("kube-system/dns", "kube-dns", 5),
];

fn world() -> Cluster {
    let pod = |(name, app, number): (&str, &str, u8)| {
        let (namespace, name) = name.split_once('/').unwrap();
        Pod {
            id: ObjectName::new(namespace, name),
            uid: name.into(),
            static_uid: None,
            labels: BTreeMap::from([("app".into(), app.into())]),
            node: Some("n1".into()),
            addresses: vec![
                [10, 0, 0, number].into(),
                [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(number)].into(),
            ],
            network: PodNetwork::Own,
            phase: PodPhase::Running,
            ready: true,
            hostname: None,
            subdomain: None,
            ports: vec![ContainerPort {
                name: Some("web-alt".into()),
                protocol: Protocol::SCTP,
                port: 8081,
                host: None,
            }],
        }
    };
    let pods: Vec<_> = PODS.into_iter().map(pod).collect();
    let namespace = |pod: &Pod| Namespace {
        name: pod.id.namespace.clone(),
        labels: BTreeMap::new(),
        phase: NamespacePhase::Active,
        keeps_established: false,
    };
    Cluster {
        namespaces: pods.iter().map(namespace).collect(),
        pods,
        policies: Vec::new(),
        cluster_policies: Vec::new(),
    }
}

/// With these policies. What is not understood stands closed.
fn with(texts: &[&str]) -> Cluster {
    let mut cluster = world();
    for parsed in parse("a.yaml", &texts.join("\n---\n")) {
        let Parsed::Ours(document) = parsed else {
            panic!("{parsed:?}");
        };
        let object = match document.outcome {
            Ok(converted) => converted.object,
            Err(invalid) => panic!("{invalid:?}"),
        };
        match object {
            Some(Object::Policy(policy)) => cluster.policies.push((*policy).clone()),
            Some(Object::ClusterPolicy(policy)) => {
                cluster.cluster_policies.push((*policy).clone());
            }
            other => panic!("{other:?}"),
        }
    }
    cluster
}

/// A ClusterNetworkPolicy about all pods with these rules, such as `ingress: [...]`.
fn tier(name: &str, tier: &str, priority: u16, rules: &str) -> String {
    format!(
        "{{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {{name: {name}}}, spec: {{tier: {tier}, \
         priority: {priority}, subject: {{namespaces: {{}}}}, {rules}}}}}"
    )
}

/// A NetworkPolicy about all pods of foo with this rest of its spec.
fn np(rest: &str) -> String {
    format!(
        "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: np, namespace: foo}}, spec: {{podSelector: {{}}, {rest}}}}}"
    )
}

/// "foo/web", "n2", or "outside"; of IPv6 with a 6 behind it.
fn party(cluster: &Cluster, text: &str) -> Party {
    if let Some((_, address)) = NODES.iter().find(|(name, _)| *name == text) {
        let address = address.parse().unwrap();
        let is = Who::Node(text.into());
        return Party { address, is };
    }
    if text == "outside" {
        let address = [203, 0, 113, 9].into();
        let is = Who::Outside;
        return Party { address, is };
    }
    let (name, which) = match text.strip_suffix(" 6") {
        Some(name) => (name, 1),
        None => (text, 0),
    };
    let pod = cluster.pods.iter().find(|it| it.id.to_string() == name);
    let pod = pod.unwrap();
    Party {
        address: pod.addresses[which],
        is: Who::Pod(pod.clone()),
    }
}

fn in_at(cluster: &Cluster, from: &str, to: &str) -> Passing {
    received(cluster, &party(cluster, from), &party(cluster, to))
}

fn out_of(cluster: &Cluster, from: &str, to: &str) -> Passing {
    sent(cluster, &party(cluster, from), &party(cluster, to))
}

/// These ports, and nothing else.
fn only(ports: &[(Protocol, u16)]) -> Passing {
    let mut all = Passing::nothing();
    for (protocol, port) in ports {
        all.set(*protocol, *port..=*port, true);
    }
    all
}

/// Everything but these ports.
fn all_but(ports: &[(Protocol, u16)]) -> Passing {
    let mut all = Passing::everything();
    all.remove(&only(ports));
    all
}

const ALL_BUT_NOBODY: [&str; 3] = ["n1", "n2", "outside"];
const STORY_1: &str = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: cluster-wide-deny-example}
spec:
  tier: Admin
  priority: 10
  subject: {namespaces: {matchLabels: {kubernetes.io/metadata.name: sensitive-ns}}}
  ingress:
  - {action: Deny, from: [{namespaces: {matchLabels: {}}}], name: select-all-deny-all}
";
const STORY_2: &str = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: cluster-wide-allow-example}
spec:
  tier: Admin
  priority: 30
  subject: {namespaces: {}}
  ingress:
  - action: Accept
    name: allow-monitoring-ns-ingress
    from: [{namespaces: {matchLabels: {kubernetes.io/metadata.name: monitoring-ns}}}]
  egress:
  - action: Accept
    name: allow-kube-dns-egress
    to:
    - pods:
        namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}
        podSelector: {matchLabels: {app: kube-dns}}
";
const STORY_3: &str = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: pub-svc-delegate-example}
spec:
  tier: Admin
  priority: 20
  subject: {namespaces: {}}
  egress:
  - action: Pass
    to:
    - pods:
        namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: bar-ns-1}}
        podSelector: {matchLabels: {app: svc-pub}}
    protocols:
    - {tcp: {destinationPort: {number: 8080}}}
    - {destinationNamedPort: web-alt}
    - {udp: {destinationPort: {number: 53}}}
";
const STORY_5: &str = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: default}
spec:
  tier: Baseline
  priority: 10
  subject: {namespaces: {}}
  ingress:
  - {action: Deny, from: [{namespaces: {}}]}
";

#[test]
fn story_1_denies_a_sensitive_namespace_to_all_pods_whatever_a_network_policy_says() {
    let open = np("ingress: [{}]").replace("namespace: foo", "namespace: sensitive-ns");
    for texts in [vec![STORY_1], vec![STORY_1, &open]] {
        let cluster = with(&texts);
        for from in ["foo/web", "monitoring-ns/prometheus 6"] {
            assert_eq!(
                in_at(&cluster, from, "sensitive-ns/vault"),
                Passing::nothing()
            );
            assert_eq!(in_at(&cluster, from, "bar-ns-1/pub"), Passing::everything());
        }
        // Namespaces are peers with pods in them, and nobody else.
        for from in ALL_BUT_NOBODY {
            assert_eq!(
                in_at(&cluster, from, "sensitive-ns/vault"),
                Passing::everything()
            );
        }
        // "CNPs with no egress rules do not affect egress traffic."
        let out = out_of(&cluster, "sensitive-ns/vault", "foo/web");
        assert_eq!(out, Passing::everything());
    }
}

#[test]
fn story_2_accepts_what_no_network_policy_can_take_away() {
    let closed = np("policyTypes: [Ingress, Egress]");
    let cluster = with(&[STORY_2, &closed]);
    for (from, to, is_in, is_out) in [
        ("monitoring-ns/prometheus", "foo/web", true, true),
        ("bar-ns-1/pub", "foo/web", false, true),
        ("outside", "foo/web", false, true),
        ("foo/web", "kube-system/dns", true, true),
        ("foo/web", "bar-ns-1/pub", true, false),
    ] {
        let whole = |is| {
            if is {
                Passing::everything()
            } else {
                Passing::nothing()
            }
        };
        assert_eq!(in_at(&cluster, from, to), whole(is_in), "{from} {to}");
        assert_eq!(out_of(&cluster, from, to), whole(is_out), "{from} {to}");
    }
}

#[test]
fn story_3_leaves_some_ports_to_network_policies_and_the_rest_to_the_tier() {
    let rest = "egress: [{action: Deny, to: [{namespaces: {}}]}]";
    let deny = tier("rest", "Admin", 21, rest);
    let passed = [
        (Protocol::TCP, 8080),
        (Protocol::SCTP, 8081),
        (Protocol::UDP, 53),
    ];
    let out = |texts: &[&str]| out_of(&with(texts), "foo/web", "bar-ns-1/pub");
    assert_eq!(out(&[STORY_3]), Passing::everything());
    assert_eq!(out(&[STORY_3, &deny]), only(&passed));
    let dns =
        np("policyTypes: [Egress], egress: [{ports: [{protocol: UDP, port: 53}, {port: 80}]}]");
    assert_eq!(out(&[STORY_3, &deny, &dns]), only(&[(Protocol::UDP, 53)]));
    // The other way round the Deny goes first.
    let first = tier("rest", "Admin", 19, rest);
    assert_eq!(out(&[STORY_3, &first]), Passing::nothing());
}

#[test]
fn story_5_holds_for_pods_that_no_network_policy_selects() {
    let http = np("ingress: [{ports: [{port: 80}]}]");
    let of_egress = np("policyTypes: [Egress], egress: [{}]");
    let cluster = with(&[STORY_5, &http]);
    assert_eq!(
        in_at(&cluster, "bar-ns-1/pub", "foo/web"),
        only(&[(Protocol::TCP, 80)])
    );
    assert_eq!(
        in_at(&cluster, "foo/web", "bar-ns-1/pub"),
        Passing::nothing()
    );
    assert_eq!(
        in_at(&cluster, "outside", "bar-ns-1/pub"),
        Passing::everything()
    );
    // One that says nothing about ingress makes no decision there.
    let cluster = with(&[STORY_5, &of_egress]);
    assert_eq!(
        in_at(&cluster, "bar-ns-1/pub", "foo/web"),
        Passing::nothing()
    );
}

#[test]
fn the_first_rule_that_matches_decides() {
    let deny_80 = "{action: Deny, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 80}}}]}";
    let accept = "{action: Accept, from: [{namespaces: {}}]}";
    let deny = "{action: Deny, from: [{namespaces: {}}]}";
    let pass = "{action: Pass, from: [{namespaces: {}}]}";
    let but_80 = all_but(&[(Protocol::TCP, 80)]);
    let rules = |list: &[&str]| format!("ingress: [{}]", list.join(", "));
    let one = |list: &[&str]| tier("one", "Admin", 5, &rules(list));
    let baseline = tier("base", "Baseline", 5, &rules(&[deny_80]));
    let of = |name, priority, list: &[&str]| tier(name, "Admin", priority, &rules(list));
    let passing_base = tier("base", "Baseline", 5, &rules(&[pass, deny]));
    let closed = np("policyTypes: [Ingress]");
    let (all, none) = (Passing::everything(), Passing::nothing());
    for (texts, expected) in [
        (vec![one(&[deny_80])], but_80.clone()),
        (vec![one(&[deny_80, accept])], but_80.clone()),
        (vec![one(&[accept, deny_80])], all.clone()),
        // Priority, and of equal ones the name.
        (
            vec![of("a", 1, &[deny]), of("b", 0, &[accept])],
            all.clone(),
        ),
        (
            vec![of("a", 1000, &[deny]), of("b", 1000, &[accept])],
            none.clone(),
        ),
        (
            vec![of("b", 7, &[deny]), of("a", 7, &[accept])],
            all.clone(),
        ),
        // A tier goes before the next, whatever the numbers.
        (
            vec![
                of("a", 1000, &[accept]),
                tier("b", "Baseline", 0, &rules(&[deny])),
            ],
            all.clone(),
        ),
        (
            vec![
                of("a", 1000, &[pass]),
                tier("b", "Baseline", 0, &rules(&[deny])),
            ],
            none.clone(),
        ),
        // Pass skips the rest of its tier alone.
        (vec![of("a", 1, &[pass]), of("b", 2, &[deny])], all.clone()),
        (
            vec![of("a", 1, &[pass]), of("b", 2, &[deny]), closed.clone()],
            none.clone(),
        ),
        (vec![passing_base], all.clone()),
        (
            vec![of("a", 1, &[deny_80, accept]), closed.clone()],
            but_80.clone(),
        ),
        (vec![of("a", 1, &[deny_80]), closed.clone()], none.clone()),
        (vec![baseline.clone()], but_80.clone()),
        (vec![baseline.clone(), np("ingress: [{}]")], all.clone()),
        (vec![baseline, one(&[accept])], all.clone()),
    ] {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        assert_eq!(
            in_at(&with(&texts), "bar-ns-1/pub", "foo/web"),
            expected,
            "{texts:#?}"
        );
    }
}

#[test]
fn networks_are_pods_too_and_of_their_family_alone() {
    let v4 = tier(
        "one",
        "Admin",
        5,
        "egress: [{action: Deny, to: [{networks: [0.0.0.0/0]}]}]",
    );
    let cluster = with(&[&v4]);
    for (to, expected) in [
        ("bar-ns-1/pub", Passing::nothing()),
        ("bar-ns-1/pub 6", Passing::everything()),
        ("outside", Passing::nothing()),
        ("n2", Passing::nothing()),
        // Its own node and itself it reaches always.
        ("n1", Passing::everything()),
        ("foo/web", Passing::everything()),
    ] {
        assert_eq!(out_of(&cluster, "foo/web", to), expected, "{to}");
    }
}

#[test]
fn accepted_egress_is_judged_by_ingress_at_its_destination() {
    let out = tier(
        "out",
        "Admin",
        0,
        "egress: [{action: Accept, to: [{namespaces: {}}]}]",
    );
    let cluster = with(&[&out, STORY_1]);
    let [from, to] = ["foo/web", "sensitive-ns/vault"].map(|it| party(&cluster, it));
    assert!(!allowed(&cluster, &from, &to, Protocol::TCP, 80));
    assert!(allowed(&cluster, &to, &from, Protocol::ICMP, 0));
}

#[test]
fn a_peer_of_the_future_fails_closed() {
    for (action, to_another) in [
        ("Accept", Passing::nothing()),
        ("Deny", Passing::nothing()),
        ("Pass", Passing::nothing()),
    ] {
        let rules = format!("egress: [{{action: {action}, to: [{{nodes: {{}}}}]}}]");
        let one = tier("one", "Admin", 0, &rules);
        let closed = np("policyTypes: [Egress]");
        assert_eq!(
            out_of(&with(&[&one, &closed]), "foo/web", "n2"),
            to_another,
            "{action}"
        );
        let alone = out_of(&with(&[&one]), "foo/web", "outside");
        let expected = if action == "Accept" {
            Passing::everything()
        } else {
            Passing::nothing()
        };
        assert_eq!(alone, expected, "{action}");
    }
}

#[test]
fn equal_sets_of_packets_are_equal() {
    let mut pieces = Passing::nothing();
    for numbers in [0..=9, 11..=u16::MAX, 10..=10] {
        pieces.set(Protocol::TCP, numbers, true);
    }
    let mut whole = Passing::everything();
    whole.remove(&all_but(&[]).and(&{
        let mut rest = Passing::everything();
        rest.set(Protocol::TCP, 0..=u16::MAX, false);
        rest
    }));
    assert_eq!(pieces, whole);
    pieces.set(Protocol::ICMP, 0..=u16::MAX, true);
    assert_eq!(pieces, whole, "ICMP has no ports");
    assert!(!pieces.includes(Protocol::ICMP, 0) && pieces.includes(Protocol::TCP, 10));
    let mut none = pieces.clone();
    none.remove(&whole);
    assert_eq!(none, Passing::nothing());
}
