//! A Service that changes its type and its ports, and addresses that two ask for: YAML in, what the
//! kernel's tables hold out. Who has an address is told by `claims.rs`.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use weir_agent::apply::fake::FakeTable;
use weir_agent::apply::{Services, Status};
use weir_agent::compile::claims::Claims;
use weir_agent::compile::service::{NodeView, compile};
use weir_agent::compile::{Owner, host_port};
use weir_agent::model::{Object, ObjectName, Snapshot};
use weir_agent::watch::documents::{Parsed, parse};
use weir_common::service::{Backend, Frontend, FrontendKey, Generation};

const ENDPOINTS: &str = "
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.0.0.1]}]
";

/// The tables and what fills them.
struct World {
    frontends: FakeTable<FrontendKey, Frontend>,
    live: FakeTable<u32, Generation>,
    claims: Claims,
    services: Services<
        FakeTable<FrontendKey, Frontend>,
        FakeTable<u32, Backend>,
        FakeTable<u32, Generation>,
    >,
    snapshot: Snapshot,
}

impl World {
    fn new() -> Self {
        let frontends = FakeTable::empty(64);
        let live = FakeTable::empty(64);
        let backends = FakeTable::empty(64);
        let mut services = Services::resume(frontends.clone(), backends, live.clone()).unwrap();
        services.allow_deletes(Instant::now());
        let mut claims = Claims::resume(services.held());
        claims.everything_said();
        Self {
            frontends,
            live,
            claims,
            services,
            snapshot: Snapshot::default(),
        }
    }

    /// Takes documents in and writes what follows for all that is known.
    fn apply(&mut self, text: &str) {
        for parsed in parse("test", text) {
            let Parsed::Ours(document) = parsed else {
                panic!("a kind that is not ours");
            };
            let object = document.outcome.unwrap().object.unwrap();
            self.snapshot.apply(object.clone());
            if let Object::Pod(pod) = object {
                let owner = Owner::HostPorts(pod.id.clone());
                let delta = self.claims.update(&owner, host_port::compile(&pod));
                self.services.apply(delta.plans, Instant::now());
            }
        }
        let node = NodeView {
            name: "here",
            zone: None,
            external_ips: &["10.96.0.0/16".parse().unwrap()],
        };
        for service in self.snapshot.services.values() {
            let slices = self.snapshot.slices_of(&service.id).map(Arc::as_ref);
            let plan = compile(service, slices, &node, None);
            let delta = self.claims.update(&plan.id.clone(), Some(plan));
            let pass = self.services.apply(delta.plans, Instant::now());
            assert_eq!(pass.unfinished, 0);
        }
    }

    /// `address:port` of every frontend for clients inside.
    fn inside(&self) -> Vec<String> {
        let rows = self.frontends.rows();
        let keys = rows.keys().filter(|key| !key.scope.is_external());
        keys.map(|key| {
            let port = u16::from(key.port);
            if key.is_of_cluster_ip() {
                IpAddr::from(key.addr).to_string()
            } else if key.scope.is_of_nodes() {
                format!("nodes:{port}")
            } else {
                format!("{}:{port}", IpAddr::from(key.addr))
            }
        })
        .collect()
    }

    fn numbers(&self) -> BTreeSet<u32> {
        self.frontends.rows().values().map(|f| f.service).collect()
    }

    fn usable(&self) -> usize {
        let rows = self.live.rows();
        rows.values().filter(|g| g.is_usable()).count()
    }

    /// How many backends are usable, how many drain, and how many are gone.
    fn backends(&self) -> [usize; 3] {
        let rows = self.live.rows();
        // Number 0 is nobody's, and always gone.
        let all = || rows.iter().filter(|(id, _)| **id != 0);
        let count = |is: fn(Generation) -> bool| all().filter(|(_, g)| is(**g)).count();
        [
            count(Generation::is_usable),
            count(Generation::is_draining),
            count(Generation::is_gone),
        ]
    }
}

fn web(kind: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: default}}\n\
         spec: {{type: {kind}, {more}}}\n"
    )
}

#[test]
fn a_service_has_the_addresses_of_its_present_type() {
    const IP: &str = "clusterIPs: [10.96.0.5], ports: [{name: http, port: 80}]";
    const NODE: &str = "clusterIPs: [10.96.0.5], ports: [{name: http, port: 80, nodePort: 30080}]";
    const OTHER: &str = "clusterIPs: [10.96.0.5], ports: [{name: http, port: 81, nodePort: 30081}, \
                         {name: more, port: 82, nodePort: 30082}]";
    let steps: [(&str, String, &[&str], usize); 9] = [
        (
            "ClusterIP",
            web("ClusterIP", IP),
            &["10.96.0.5", "10.96.0.5:80"],
            1,
        ),
        (
            "NodePort",
            web("NodePort", NODE),
            &["nodes:30080", "10.96.0.5", "10.96.0.5:80"],
            1,
        ),
        (
            "renumbered, and one more without endpoints",
            web("NodePort", OTHER),
            &[
                "nodes:30081",
                "nodes:30082",
                "10.96.0.5",
                "10.96.0.5:81",
                "10.96.0.5:82",
            ],
            1,
        ),
        (
            "ExternalName",
            web("ExternalName", "externalName: example.com"),
            &[],
            0,
        ),
        (
            "LoadBalancer without an address",
            web("LoadBalancer", NODE),
            &["nodes:30080", "10.96.0.5", "10.96.0.5:80"],
            1,
        ),
        (
            "LoadBalancer",
            web("LoadBalancer", NODE) + "status: {loadBalancer: {ingress: [{ip: 192.0.2.9}]}}\n",
            &["nodes:30080", "10.96.0.5", "10.96.0.5:80", "192.0.2.9:80"],
            1,
        ),
        ("headless", web("ClusterIP", "clusterIP: None"), &[], 0),
        (
            "ExternalName",
            web("ExternalName", "externalName: example.com"),
            &[],
            0,
        ),
        (
            "ClusterIP",
            web("ClusterIP", IP),
            &["10.96.0.5", "10.96.0.5:80"],
            1,
        ),
    ];
    let mut world = World::new();
    for (name, text, addresses, backends) in steps {
        world.apply(&(text + ENDPOINTS));
        assert_eq!(world.inside(), addresses, "{name}");
        assert_eq!(world.usable(), backends, "{name}");
        assert!(world.numbers().len() <= 1, "{name}");
    }
}

#[test]
fn nobody_takes_a_cluster_ip_away_by_naming_it() {
    let thief = "apiVersion: v1\nkind: Service\nmetadata: {name: a-thief, namespace: default}\n\
                 spec: {clusterIPs: [10.96.0.6], externalIPs: [10.96.0.5], \
                 ports: [{name: http, port: 80}]}\n";
    let both = format!(
        "{thief}---\n{}",
        web("ClusterIP", "clusterIPs: [10.96.0.5], ports: [{port: 80}]")
    );
    let name = |name: &str| Owner::Service(ObjectName::new("default", name));
    for text in [thief, &both] {
        let mut world = World::new();
        world.apply(text);
        world.apply(&both);
        assert_eq!(world.services.statuses()[&name("web")], Status::Done);
        // Nothing has failed: it has what is its own, and is told what is not.
        assert_eq!(world.services.statuses()[&name("a-thief")], Status::Done);
        let reports = world.claims.reports(&name("a-thief")).into_iter();
        let reports: Vec<_> = reports.map(|report| report.to_string()).collect();
        assert_eq!(reports, ["10.96.0.5:80 TCP belongs to default/web"]);
        assert_eq!(
            world.inside(),
            ["10.96.0.5", "10.96.0.5:80", "10.96.0.6", "10.96.0.6:80"]
        );
        let rows = world.frontends.rows();
        let owner = rows.iter().find(|(key, _)| {
            IpAddr::from(key.addr).to_string() == "10.96.0.5" && !key.scope.is_external()
        });
        let number = owner.unwrap().1.service;
        assert_eq!(world.services.name_of(number), Some(&name("web")));
    }
}

#[test]
fn a_host_port_lives_as_long_as_its_pod_has_an_address() {
    let pod = |phase: &str, ip: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: default}}\n\
             spec: {{nodeName: here, containers: [{{ports: [{{containerPort: 80, hostPort: 9000}}]}}], \
             initContainers: [{{restartPolicy: Always, ports: [{{containerPort: 81, hostPort: 9001}}]}}, \
             {{ports: [{{containerPort: 82, hostPort: 9002}}]}}]}}\n\
             status: {{phase: {phase}, podIP: '{ip}'}}\n"
        )
    };
    let mut world = World::new();
    let both: &[&str] = &["nodes:9000", "nodes:9001"];
    let steps: [(&str, &str, &[&str]); 5] = [
        ("Pending", "", &[]),
        ("Running", "10.0.0.1", both),
        ("Running", "10.0.0.2", both),
        ("Unknown", "10.0.0.2", both),
        ("Succeeded", "10.0.0.2", &[]),
    ];
    for (phase, ip, addresses) in steps {
        world.apply(&pod(phase, ip));
        assert_eq!(world.inside(), addresses, "{phase} {ip}");
        assert_eq!(world.usable(), addresses.len(), "{phase} {ip}");
    }
}

#[test]
fn a_traffic_policy_takes_no_connection_from_an_endpoint_that_it_leaves_out() {
    let service = |policies: &str| {
        web(
            "NodePort",
            &format!(
                "clusterIPs: [10.96.0.5], ports: [{{name: http, port: 80, nodePort: 30080}}], {policies}"
            ),
        )
    };
    let slice = |endpoints: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: web-1, namespace: default, labels: {{kubernetes.io/service-name: web}}}}\n\
             addressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{endpoints}]\n"
        )
    };
    const HERE: &str = "{addresses: [10.0.0.1], nodeName: here}";
    const THERE: &str = "{addresses: [10.0.0.2], nodeName: there}";
    const UNREADY: &str = "{addresses: [10.0.0.1], nodeName: here, conditions: {ready: false}}";
    let both = slice(&format!("{HERE}, {THERE}"));
    // What is said, and how many backends are usable, drain and are gone then.
    type Case<'a> = (&'a str, &'a [(String, [usize; 3])]);
    let cases: [Case<'_>; 4] = [
        (
            "only this node's from outside: pods still ask for all",
            &[
                (service(""), [2, 0, 0]),
                (service("externalTrafficPolicy: Local"), [2, 0, 0]),
            ],
        ),
        (
            "nobody asks for the other node's, and then all do again",
            &[
                (clusterip(""), [2, 0, 0]),
                (clusterip("internalTrafficPolicy: Local"), [1, 1, 0]),
                (clusterip(""), [2, 0, 0]),
            ],
        ),
        (
            "another node's endpoint that nobody ever asked has no number",
            &[(clusterip("internalTrafficPolicy: Local"), [1, 0, 0])],
        ),
        (
            "the last one of this node is not ready",
            &[
                (clusterip("internalTrafficPolicy: Local"), [1, 0, 0]),
                (slice(&format!("{UNREADY}, {THERE}")), [0, 1, 0]),
                // Named no more: it drains for five seconds, in case it only moves.
                (slice(THERE), [0, 1, 0]),
            ],
        ),
    ];
    for (name, steps) in cases {
        let mut world = World::new();
        world.apply(&both);
        for (text, expected) in steps {
            world.apply(text);
            assert_eq!(world.backends(), *expected, "{name}");
        }
    }
}

fn clusterip(policy: &str) -> String {
    let ports = "clusterIPs: [10.96.0.5], ports: [{name: http, port: 80}]";
    web("ClusterIP", &format!("{ports}, {policy}"))
}
