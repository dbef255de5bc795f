//! Single objects: JSON in, our nouns or a reason out.

use serde_json::{Value, json};

use super::decoded;
use crate::model::convert::{Converted, Invalid};
use crate::model::{
    Family, Labels, NamespacePhase, Object, Operator, PeerSelector, Peers, PodPhase, Policy,
    PortRange, Ports, Proxying, Service, ServiceKind, TargetPort,
};
use crate::watch::wire::{self, Decoded};

fn policy_object(spec: Value) -> Value {
    json!({"metadata": {"namespace": "default", "name": "p"}, "spec": spec})
}

fn policy(spec: Value) -> Policy {
    let object = policy_object(spec);
    match decoded::<wire::NetworkPolicy>(&object).1 {
        Ok(Converted {
            object: Some(Object::Policy(policy)),
            ..
        }) => Policy::clone(&policy),
        other => panic!("{object}: {other:?}"),
    }
}

fn refused_policy(spec: Value) -> Invalid {
    let object = policy_object(spec);
    decoded::<wire::NetworkPolicy>(&object)
        .1
        .expect_err("it is not valid")
}

fn service(spec: Value) -> Result<Service, String> {
    let object = json!({"metadata": {"namespace": "default", "name": "s"}, "spec": spec});
    match decoded::<wire::Service>(&object).1 {
        Ok(Converted {
            object: Some(Object::Service(service)),
            ..
        }) => Ok(Service::clone(&service)),
        Ok(other) => panic!("{other:?}"),
        Err(invalid) => Err(invalid.reason),
    }
}

#[test]
fn policy_types_have_their_defaults() {
    let rule = json!([{}]);
    for (spec, ingress, egress) in [
        (json!({}), Some(0), None),
        (
            json!({"podSelector": null, "policyTypes": null}),
            Some(0),
            None,
        ),
        (json!({"ingress": rule}), Some(1), None),
        (json!({"egress": rule}), Some(0), Some(1)),
        (json!({"egress": []}), Some(0), None),
        (json!({"policyTypes": ["Egress"]}), None, Some(0)),
        (
            json!({"policyTypes": ["Egress"], "ingress": rule}),
            None,
            Some(0),
        ),
        (
            json!({"policyTypes": ["Ingress"], "egress": rule}),
            Some(0),
            None,
        ),
        (
            json!({"policyTypes": ["Ingress", "Egress"]}),
            Some(0),
            Some(0),
        ),
    ] {
        let found = policy(spec.clone());
        let count = |rules: &Option<Vec<_>>| rules.as_ref().map(Vec::len);
        assert_eq!(
            (count(&found.ingress), count(&found.egress)),
            (ingress, egress),
            "{spec}"
        );
    }
}

#[test]
fn an_empty_list_of_peers_or_ports_means_all() {
    for rule in [
        json!({}),
        json!({"from": [], "ports": []}),
        json!({"from": null, "ports": null}),
    ] {
        let found = policy(json!({"ingress": [rule]})).ingress.unwrap();
        assert_eq!(
            (&found[0].peers, &found[0].ports),
            (&Peers::Any, &Ports::Any)
        );
    }
}

#[test]
fn a_peer_with_both_selectors_is_one_peer() {
    let found = policy(json!({"ingress": [{"from": [
        {"namespaceSelector": {"matchLabels": {"a": "b"}}, "podSelector": {"matchLabels": {"c": "d"}}},
        {"namespaceSelector": {}},
        {"podSelector": {}},
        {"ipBlock": {"cidr": "10.1.2.3/8", "except": ["10.2.0.0/16", "10.1.0.0/16"]}},
    ]}]}));
    let rules = found.ingress.unwrap();
    let Peers::Of(peers) = &rules[0].peers else {
        panic!("{rules:?}");
    };
    let [
        PeerSelector::Pods(both),
        PeerSelector::Pods(namespaces),
        PeerSelector::Pods(pods),
        PeerSelector::Block(block),
    ] = &peers[..]
    else {
        panic!("{peers:?}");
    };
    assert!(both.namespaces.is_some() && !both.pods.requirements.is_empty());
    assert!(namespaces.namespaces.is_some() && namespaces.pods.requirements.is_empty());
    assert!(pods.namespaces.is_none() && pods.pods.requirements.is_empty());
    assert_eq!(block.cidr.to_string(), "10.0.0.0/8");
    assert_eq!(block.except[0].to_string(), "10.1.0.0/16");
}

#[test]
fn ports_of_a_rule_are_numbers_names_or_ranges() {
    let found = policy(json!({"egress": [{"ports": [
        {}, {"port": 80}, {"protocol": "UDP", "port": "dns"}, {"protocol": "SCTP", "port": 1, "endPort": 65535},
    ]}]}));
    let rules = found.egress.unwrap();
    let Ports::Of(ports) = &rules[0].ports else {
        panic!("{rules:?}");
    };
    let ranges: Vec<_> = ports
        .iter()
        .map(|p| (p.protocol.0, p.port.clone()))
        .collect();
    assert_eq!(
        ranges,
        [
            (6, PortRange::Any),
            (
                6,
                PortRange::Numbers {
                    first: 80,
                    last: 80
                }
            ),
            (17, PortRange::Named("dns".into())),
            (
                132,
                PortRange::Numbers {
                    first: 1,
                    last: 65535
                }
            ),
        ]
    );
}

#[test]
fn selectors_select_as_kubernetes_does() {
    let labels: Labels = [
        ("app".into(), "web".into()),
        ("tier".into(), "front".into()),
    ]
    .into();
    for (selector, is_selected) in [
        (json!({}), true),
        (
            json!({"matchLabels": {"app": "web", "tier": "front"}}),
            true,
        ),
        (
            json!({"matchLabels": {"app": "web", "tier": "back"}}),
            false,
        ),
        (
            json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["api", "web"]}]}),
            true,
        ),
        (
            json!({"matchExpressions": [{"key": "gone", "operator": "NotIn", "values": ["x"]}]}),
            true,
        ),
        (
            json!({"matchExpressions": [{"key": "app", "operator": "Exists"}, {"key": "gone", "operator": "DoesNotExist", "values": null}]}),
            true,
        ),
        (
            json!({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}),
            false,
        ),
    ] {
        let subject = policy(json!({"podSelector": selector})).subject;
        assert_eq!(subject.matches(&labels), is_selected, "{selector}");
    }
    let one = policy(json!({"podSelector": {"matchLabels": {"a": "b"}}})).subject;
    let same = policy(
        json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b", "b"]}]}}),
    );
    assert_eq!(one, same.subject);
    assert!(matches!(&one.requirements[0].operator, Operator::In(values) if values.len() == 1));
}

#[test]
fn a_policy_that_is_not_understood_says_where_and_closes_its_pods() {
    for (spec, reason) in [
        (
            json!({"podSelectors": {}}),
            "spec.podSelectors: unknown field `podSelectors`, expected one of `podSelector`, `policyTypes`, `ingress`, `egress`",
        ),
        (
            json!({"ingress": [{"from": [{"ipBlocks": {}}]}]}),
            "spec.ingress[0].from[0].ipBlocks: unknown field `ipBlocks`, expected one of `podSelector`, `namespaceSelector`, `ipBlock`",
        ),
        (
            json!({"ingress": [{"from": [{"podSelector": {"matchLabel": {}}}]}]}),
            "spec.ingress[0].from[0].podSelector.matchLabel: unknown field `matchLabel`, expected `matchLabels` or `matchExpressions`",
        ),
        (
            json!({"ingress": [{}, {"to": [{"podSelector": {}}]}]}),
            "spec.ingress[1]: unknown field `to`, expected `from`",
        ),
        (
            json!({"ingress": [{"from": [{}]}]}),
            "spec.ingress[0].from[0]: it has no selector",
        ),
        (
            json!({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}]}),
            "spec.ingress[0].from[0]: ipBlock stands beside another selector",
        ),
        (
            json!({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}]}),
            "spec.ingress[0].from[0]: ipBlock.cidr: \"10.0.0.0/33\" is not a CIDR",
        ),
        (
            json!({"ingress": [{"from": [{"ipBlock": {"cidr": "::ffff:10.0.0.0/104"}}]}]}),
            "spec.ingress[0].from[0]: ipBlock.cidr: ::ffff:10.0.0.0/104 is an IPv4-mapped IPv6 prefix",
        ),
        (
            json!({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]}]}),
            "spec.ingress[0].from[0]: ipBlock.except: 11.0.0.0/16 is not within 10.0.0.0/8",
        ),
        (
            json!({"ingress": [{"from": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}}]}]}),
            "spec.ingress[0].from[0]: podSelector: operator \"Gt\" is not In, NotIn, Exists or DoesNotExist",
        ),
        (
            json!({"ingress": [{"from": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}]}]}),
            "spec.ingress[0].from[0]: podSelector: operator In needs values for label \"a\"",
        ),
        (
            json!({"ingress": [{"ports": [{"port": 0}]}]}),
            "spec.ingress[0].ports[0]: port 0 is not within 1 to 65535",
        ),
        (
            json!({"ingress": [{"ports": [{"port": 65536}]}]}),
            "spec.ingress[0].ports[0]: port 65536 is not within 1 to 65535",
        ),
        (
            json!({"ingress": [{"ports": [{"port": 80, "endPort": 79}]}]}),
            "spec.ingress[0].ports[0]: endPort 79 is less than port 80",
        ),
        (
            json!({"ingress": [{"ports": [{"port": "http", "endPort": 80}]}]}),
            "spec.ingress[0].ports[0]: endPort needs a numeric port",
        ),
        (
            json!({"ingress": [{"ports": [{"endPort": 80}]}]}),
            "spec.ingress[0].ports[0]: endPort without port",
        ),
        (
            json!({"ingress": [{"ports": [{"protocol": "ICMP"}]}]}),
            "spec.ingress[0].ports[0]: protocol \"ICMP\" is not TCP, UDP or SCTP",
        ),
        (
            json!({"ingress": [{"ports": [{"port": true}]}]}),
            "spec.ingress[0].ports[0].port: expected a port number or a port name",
        ),
        (
            json!({"ingress": [
                {"from": [{}, {"ipBlock": {"cidr": "10.0.0.0/33", "except": ["x"]}}], "ports": [{"port": 0}]}, {"ports": [{"endPort": 80}]}]}),
            "spec.ingress[0].from[0]: it has no selector; spec.ingress[0].from[1]: ipBlock.cidr: \"10.0.0.0/33\" is not a CIDR; \
             spec.ingress[0].from[1]: ipBlock.except: \"x\" is not a CIDR; spec.ingress[0].ports[0]: port 0 is not within 1 to \
             65535; spec.ingress[1].ports[0]: endPort without port",
        ),
    ] {
        let found = refused_policy(spec.clone());
        assert_eq!(found.reason, reason, "{spec}");
        let Some(Object::Policy(closed)) = found.closed else {
            panic!("{spec} closes nothing");
        };
        let rules = closed.ingress.as_ref().expect("it isolates ingress");
        assert_eq!(rules.len(), 1);
        assert_eq!(
            rules[0].peers,
            Peers::Of(vec![PeerSelector::Unsupported(reason.into())])
        );
        assert_eq!(closed.egress, None, "{spec}");
    }
}

#[test]
fn a_policy_whose_subject_cannot_be_read_is_only_reported() {
    for spec in [
        json!({"podSelector": {"matchLabel": {}}}),
        json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Is"}]}}),
        json!({"policyTypes": ["ingress"]}),
        json!("none"),
    ] {
        assert_eq!(refused_policy(spec.clone()).closed, None, "{spec}");
    }
}

#[test]
fn services_are_what_their_spec_says() {
    let kind = |spec| service(spec).map(|s| s.kind);
    let ips = |texts: &[&str]| {
        Ok(ServiceKind::ClusterIp(
            texts.iter().map(|t| t.parse().unwrap()).collect(),
        ))
    };
    assert_eq!(kind(json!({})), ips(&[]));
    assert_eq!(kind(json!({"clusterIP": ""})), ips(&[]));
    assert_eq!(kind(json!({"clusterIP": "10.0.0.1"})), ips(&["10.0.0.1"]));
    assert_eq!(
        kind(json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"]})),
        ips(&["10.0.0.1", "fd00::1"])
    );
    assert_eq!(
        kind(json!({"clusterIP": "None", "clusterIPs": ["None"]})),
        Ok(ServiceKind::Headless)
    );
    assert_eq!(
        kind(json!({"type": "ExternalName", "externalName": "a.example."})),
        Ok(ServiceKind::ExternalName("a.example.".into()))
    );
    for (spec, reason) in [
        (
            json!({"clusterIPs": ["10.0.0.1", "10.0.0.2"]}),
            "spec.clusterIPs: more than one address of a family",
        ),
        (
            json!({"clusterIP": "::ffff:10.0.0.1"}),
            "spec.clusterIPs: ::ffff:10.0.0.1 is an IPv4-mapped IPv6 address",
        ),
        (
            json!({"clusterIP": "010.0.0.1"}),
            "spec.clusterIPs: \"010.0.0.1\" is not an IP address",
        ),
        (json!({"type": "Other"}), "spec.type: unknown \"Other\""),
        (
            json!({"type": "ExternalName", "externalName": "a b"}),
            "spec.externalName: \"a b\" is not a host name",
        ),
        (
            json!({"type": "ExternalName"}),
            "spec.externalName: \"\" is not a host name",
        ),
        (
            json!({"ports": [{"port": 1}, {"port": 1, "name": "x"}]}),
            "spec.ports[1]: port 1 is there twice with the same protocol",
        ),
        (
            json!({"ports": [{"port": 1, "targetPort": 70000}]}),
            "spec.ports[0]: targetPort: port 70000 is not within 1 to 65535",
        ),
        (
            json!({"ports": [{}]}),
            "spec.ports[0]: missing field `port`",
        ),
        (
            json!({"sessionAffinity": "Cookie"}),
            "spec.sessionAffinity: unknown \"Cookie\"",
        ),
        (
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}}),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is not within 1 to 86400",
        ),
        (
            json!({"internalTrafficPolicy": "Nearby"}),
            "spec.internalTrafficPolicy: unknown \"Nearby\"",
        ),
    ] {
        assert_eq!(service(spec.clone()), Err(reason.to_owned()), "{spec}");
    }
}

#[test]
fn a_target_port_defaults_to_the_port() {
    for (port, target) in [
        (json!({"port": 80}), TargetPort::Number(80)),
        (json!({"port": 80, "targetPort": 0}), TargetPort::Number(80)),
        (
            json!({"port": 80, "targetPort": 8080}),
            TargetPort::Number(8080),
        ),
        (
            json!({"port": 80, "targetPort": "http"}),
            TargetPort::Name("http".into()),
        ),
    ] {
        let found = service(json!({"ports": [port]})).unwrap();
        assert_eq!(found.ports[0].target, target);
    }
}

#[test]
fn labels_can_take_a_service_from_us() {
    for (label, proxying) in [
        (
            "service.kubernetes.io/service-proxy-name",
            Proxying::Elsewhere,
        ),
        ("service.kubernetes.io/headless", Proxying::Elsewhere),
        ("app", Proxying::Here),
    ] {
        let object = json!({"metadata": {"namespace": "a", "name": "s", "labels": {label: ""}}});
        let found = decoded::<wire::Service>(&object).1.unwrap().object;
        assert!(
            matches!(found, Some(Object::Service(s)) if s.proxying == proxying),
            "{label}"
        );
    }
}

#[test]
fn pods_say_how_far_they_are() {
    let deleted =
        json!({"namespace": "a", "name": "p", "deletionTimestamp": "2026-01-01T00:00:00Z"});
    let alive = json!({"namespace": "a", "name": "p"});
    for (meta, phase, expected) in [
        (&alive, json!(null), PodPhase::Pending),
        (&alive, json!("Pending"), PodPhase::Pending),
        (&alive, json!("Running"), PodPhase::Running),
        (&alive, json!("Unknown"), PodPhase::Running),
        (&alive, json!("Succeeded"), PodPhase::Finished),
        (&deleted, json!("Running"), PodPhase::Terminating),
        (&deleted, json!("Failed"), PodPhase::Finished),
    ] {
        let object = json!({"metadata": meta, "status": {"phase": phase}});
        let found = decoded::<wire::Pod>(&object).1.unwrap().object;
        assert!(
            matches!(&found, Some(Object::Pod(p)) if p.phase == expected),
            "{object}"
        );
    }
}

#[test]
fn a_pod_has_the_ports_of_its_containers_and_sidecars() {
    let object = json!({
        "metadata": {"namespace": "a", "name": "p"},
        "spec": {
            "containers": [{"ports": [{"containerPort": 1, "name": "a"}, {"containerPort": 0}]}, {"ports": null}],
            "initContainers": [
                {"ports": [{"containerPort": 2}]},
                {"restartPolicy": "Always", "ports": [{"containerPort": 3, "protocol": "UDP"}]},
            ],
        },
        "status": {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "127.0.0.1"}, {"ip": "fd00::1"}]},
    });
    let found = decoded::<wire::Pod>(&object).1.unwrap();
    let parts: Vec<_> = found.problems.iter().map(|p| p.part.as_str()).collect();
    assert_eq!(parts, ["address 1", "port 1"]);
    let Some(Object::Pod(pod)) = found.object else {
        panic!("it is a pod");
    };
    assert_eq!(pod.ports.iter().map(|p| p.port).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(
        pod.addresses.iter().map(Family::of).collect::<Vec<_>>(),
        [Family::V4, Family::V6]
    );
}

#[test]
fn nodes_and_namespaces_are_what_they_say() {
    let node = json!({
        "metadata": {"name": "n", "labels": {"a": "b"}},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00::/64", "10.2.0.0/24"]},
        "status": {"addresses": [
            {"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "192.168.0.1"},
            {"type": "ExternalIP", "address": "x"}, {"type": "ExternalIP", "address": "192.0.2.1"},
            {"type": "InternalIP", "address": "192.168.0.2"}, {"type": "InternalIP", "address": "fd01::1"},
        ]},
    });
    let found = decoded::<wire::Node>(&node).1.unwrap();
    let parts: Vec<_> = found.problems.iter().map(|p| p.part.as_str()).collect();
    assert_eq!(parts, ["address 2", "pod CIDR 2"]);
    let Some(Object::Node(node)) = found.object else {
        panic!("it is a node");
    };
    assert_eq!((node.addresses.len(), node.pod_cidrs.len()), (4, 2));
    let internal: Vec<_> = node.internal.iter().map(ToString::to_string).collect();
    assert_eq!(internal, ["192.168.0.1", "fd01::1"], "one of each family");
    let old = json!({"metadata": {"name": "n"}, "spec": {"podCIDR": "10.1.0.0/24"}});
    let Some(Object::Node(old)) = decoded::<wire::Node>(&old).1.unwrap().object else {
        panic!("it is a node");
    };
    assert_eq!(old.pod_cidrs, ["10.1.0.0/24".parse().unwrap()]);
    let namespace = json!({"metadata": {"name": "n"}, "status": {"phase": "Terminating"}});
    let found = decoded::<wire::Namespace>(&namespace).1.unwrap().object;
    assert!(matches!(found, Some(Object::Namespace(n)) if n.phase == NamespacePhase::Terminating));
}

#[test]
fn a_name_that_is_none_is_refused() {
    for (name, reason) in [
        ("", "metadata.name is missing"),
        ("a/b", "metadata.name: \"a/b\" is not a valid name"),
        ("A", "metadata.name: \"A\" is not a valid name"),
        ("-a", "metadata.name: \"-a\" is not a valid name"),
        ("a\n", "metadata.name: \"a\\n\" is not a valid name"),
    ] {
        let object = json!({"metadata": {"namespace": "a", "name": name}});
        let found = decoded::<wire::Service>(&object).1;
        assert_eq!(found.unwrap_err().reason, reason);
    }
}

#[test]
fn a_list_survives_its_worst_item() {
    let text = r#"[{"metadata":{"namespace":"a","name":"bad"},"spec":{"ports":{"x":1}}},
                   {"metadata":{"namespace":"a","name":"good"},"spec":{}}, 7, null]"#;
    let list: Vec<Decoded<wire::Service>> = serde_json::from_str(text).unwrap();
    let reasons: Vec<_> = list
        .iter()
        .map(|d| {
            (
                d.name.to_string(),
                d.outcome.as_ref().map(|_| ()).map_err(|e| e.reason.clone()),
            )
        })
        .collect();
    assert_eq!(
        reasons[..2],
        [
            (
                "a/bad".to_owned(),
                Err("spec.ports: invalid type: map, expected a sequence".to_owned())
            ),
            ("a/good".to_owned(), Ok(())),
        ]
    );
    assert!(reasons[2..].iter().all(|(_, outcome)| outcome.is_err()));
}

#[test]
fn a_mirror_pod_knows_the_uid_of_its_static_pod() {
    for (annotations, static_uid) in [
        (json!(null), None),
        (json!({"kubernetes.io/config.mirror": ""}), None),
        // An ordinary pod that says so of itself is still known by its own uid.
        (json!({"kubernetes.io/config.hash": "9d1c"}), None),
        (
            json!({
                "kubernetes.io/config.hash": "9d1c",
                "kubernetes.io/config.mirror": "9d1c",
                "kubernetes.io/config.source": "file",
            }),
            Some("9d1c"),
        ),
    ] {
        let pod = json!({
            "metadata": {
                "namespace": "kube-system", "name": "etcd-n1", "uid": "u-1",
                "annotations": annotations,
            },
        });
        let found = decoded::<wire::Pod>(&pod).1.unwrap().object;
        let Some(Object::Pod(found)) = found else {
            panic!("{pod} is a pod");
        };
        assert_eq!(&*found.uid, "u-1");
        assert_eq!(found.static_uid.as_deref(), static_uid, "{pod}");
    }
}
