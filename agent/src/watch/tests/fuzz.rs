//! Arbitrary objects of all kinds: they may be refused, and nothing else may happen.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::decoded;
use crate::compile::service::{NodeView, compile};
use crate::model::{Object, Snapshot};
use crate::watch::controllers::{Assigned, PodLeases, Surroundings, derive};
use crate::watch::documents::{Parsed, parse};
use crate::watch::last_good::Folder;
use crate::watch::wire::{self, Decoded, WireKind};

/// Words that mean something somewhere, so that the depths are reached.
const WORDS: &[&str] = &[
    "metadata",
    "name",
    "namespace",
    "labels",
    "deletionTimestamp",
    "spec",
    "status",
    "type",
    "clusterIP",
    "clusterIPs",
    "None",
    "ports",
    "port",
    "targetPort",
    "protocol",
    "TCP",
    "UDP",
    "selector",
    "sessionAffinity",
    "ClientIP",
    "sessionAffinityConfig",
    "clientIP",
    "timeoutSeconds",
    "addressType",
    "IPv4",
    "IPv6",
    "FQDN",
    "endpoints",
    "addresses",
    "conditions",
    "ready",
    "serving",
    "terminating",
    "targetRef",
    "kind",
    "Pod",
    "Service",
    "podSelector",
    "policyTypes",
    "Ingress",
    "Egress",
    "ingress",
    "egress",
    "from",
    "to",
    "ipBlock",
    "cidr",
    "except",
    "endPort",
    "matchLabels",
    "matchExpressions",
    "key",
    "operator",
    "values",
    "In",
    "Exists",
    "containers",
    "containerPort",
    "initContainers",
    "restartPolicy",
    "podIP",
    "podIPs",
    "ip",
    "phase",
    "Running",
    "podCIDR",
    "podCIDRs",
    "InternalIP",
    "10.0.0.1",
    "fd00::1",
    "::ffff:1.2.3.4",
    "10.0.0.0/8",
    "::/0",
    "",
    "ExternalName",
    "externalName",
    "ipFamilies",
    "ipFamilyPolicy",
    "RequireDualStack",
    "a.b",
    "kubernetes.io/service-name",
    "tier",
    "Admin",
    "Baseline",
    "priority",
    "subject",
    "namespaces",
    "pods",
    "namespaceSelector",
    "action",
    "Accept",
    "Deny",
    "Pass",
    "networks",
    "nodes",
    "domainNames",
    "protocols",
    "tcp",
    "udp",
    "sctp",
    "destinationPort",
    "number",
    "range",
    "start",
    "end",
    "destinationNamedPort",
];

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        9 => proptest::sample::select(WORDS).prop_map(str::to_owned),
        1 => any::<String>(),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0..70_000i64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((word(), inner), 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// A valid object of each kind.
fn valid() -> Vec<Value> {
    let meta = json!({"namespace": "default", "name": "web", "labels": {"kubernetes.io/service-name": "web"}});
    let object = |api: &str, kind: &str, rest: Value| {
        let mut object = json!({"apiVersion": api, "kind": kind, "metadata": meta});
        if let (Some(object), Value::Object(rest)) = (object.as_object_mut(), rest) {
            object.extend(rest);
        }
        object
    };
    vec![
        object(
            "v1",
            "Service",
            json!({"spec": {"clusterIPs": ["10.96.0.1", "fd00::1"], "selector": {"a": "b"},
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}], "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}, "ipFamilies": ["IPv4"]}}),
        ),
        object(
            "discovery.k8s.io/v1",
            "EndpointSlice",
            json!({"addressType": "IPv4",
            "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": true}, "targetRef": {"kind": "Pod", "name": "p"}}],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}),
        ),
        object(
            "v1",
            "Pod",
            json!({"spec": {"containers": [{"ports": [{"name": "http", "containerPort": 80}]}],
            "initContainers": [{"restartPolicy": "Always"}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}], "conditions": [{"type": "Ready", "status": "True"}]}}),
        ),
        object("v1", "Namespace", json!({"status": {"phase": "Active"}})),
        object(
            "v1",
            "Node",
            json!({"spec": {"podCIDRs": ["10.1.0.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.1"}]}}),
        ),
        object(
            "networking.k8s.io/v1",
            "NetworkPolicy",
            json!({"spec": {"podSelector": {"matchLabels": {"a": "b"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}},
                {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}],
                "ports": [{"port": 80, "endPort": 90}]}], "egress": [{}]}}),
        ),
        object(
            "policy.networking.k8s.io/v1alpha2",
            "ClusterNetworkPolicy",
            json!({"spec": {"tier": "Admin", "priority": 10, "subject": {"namespaces": {"matchLabels": {"a": "b"}}},
            "ingress": [{"name": "one", "action": "Pass", "from": [{"pods": {"podSelector": {}, "namespaceSelector": {}}}],
                "protocols": [{"tcp": {"destinationPort": {"number": 80}}}, {"destinationNamedPort": "http"}]}],
            "egress": [{"action": "Deny", "to": [{"networks": ["10.0.0.0/8"]}, {"namespaces": {}}],
                "protocols": [{"udp": {"destinationPort": {"range": {"start": 80, "end": 90}}}}]},
                {"action": "Accept", "to": [{"domainNames": ["a.b"]}]}]}}),
        ),
    ]
}

/// Every place in an object.
fn places(value: &Value, at: String, into: &mut Vec<String>) {
    into.push(at.clone());
    match value {
        Value::Object(fields) => {
            for (key, inner) in fields {
                let key = key.replace('~', "~0").replace('/', "~1");
                places(inner, format!("{at}/{key}"), into);
            }
        }
        Value::Array(items) => {
            for (i, inner) in items.iter().enumerate() {
                places(inner, format!("{at}/{i}"), into);
            }
        }
        _ => {}
    }
}

/// A valid object with something else in a few places.
fn damaged() -> impl Strategy<Value = Value> {
    let objects = valid();
    let wounds = prop::collection::vec((any::<prop::sample::Index>(), value()), 1..4);
    (proptest::sample::select(objects), wounds).prop_map(|(mut object, wounds)| {
        for (index, value) in wounds {
            let mut all = Vec::new();
            places(&object, String::new(), &mut all);
            if let Some(place) = object.pointer_mut(index.get(&all).as_str()) {
                *place = value;
            }
        }
        object
    })
}

fn converted<K: WireKind>(value: &Value) -> Option<Object> {
    let outcome = decoded::<K>(value).1;
    let listed: Vec<Decoded<K>> = serde_json::from_str(&format!("[{value}]")).unwrap();
    // Alone as in a list.
    assert_eq!(outcome.is_ok(), listed[0].outcome.is_ok(), "{value}");
    match outcome {
        Ok(converted) => converted.object,
        Err(invalid) => invalid.closed,
    }
}

fn check(value: &Value) -> usize {
    let objects = [
        converted::<wire::Service>(value),
        converted::<wire::EndpointSlice>(value),
        converted::<wire::Pod>(value),
        converted::<wire::Namespace>(value),
        converted::<wire::Node>(value),
        converted::<wire::NetworkPolicy>(value),
        converted::<wire::ClusterNetworkPolicy>(value),
    ];
    let mut snapshot = Snapshot::default();
    let found = objects
        .into_iter()
        .flatten()
        .map(|o| snapshot.apply(o))
        .count();
    let node = NodeView {
        name: "here",
        zone: None,
        external_ips: &[],
    };
    for service in snapshot.services.values() {
        let slices = snapshot.slices.values().map(AsRef::as_ref);
        compile(service, slices, &node, None);
    }
    found
}

#[test]
fn valid_objects_are_understood() {
    // Otherwise the property below would hold for a decoder that refuses everything.
    for object in valid() {
        assert!(check(&object) > 0, "{object}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn arbitrary_json_never_panics(value in value()) {
        check(&value);
    }

    #[test]
    fn damaged_objects_never_panic(value in damaged()) {
        check(&value);
    }

    #[test]
    fn damaged_manifests_never_panic(values in prop::collection::vec(damaged(), 1..5)) {
        let text: Vec<_> = values.iter().map(ToString::to_string).collect();
        let documents: Vec<_> = parse("a.yaml", &text.join("\n---\n"))
            .into_iter()
            .filter_map(|parsed| match parsed {
                Parsed::Ours(document) => Some(document),
                Parsed::Foreign(_) => None,
            })
            .collect();
        let (folder, _) = Folder::default().next(&documents);
        let surroundings = Surroundings {
            node: "here".into(),
            service_cidrs: vec!["10.96.0.0/30".parse().unwrap()],
        };
        derive(&folder.manifests(), &PodLeases::new(), &surroundings, &Assigned::new());
    }

    #[test]
    fn arbitrary_text_never_panics(text in "\\PC*", lines in "([-a-z:{}\\[\\]&*!|> \n]){0,80}") {
        parse("a.yaml", &text);
        parse("a.yaml", &lines);
    }
}
