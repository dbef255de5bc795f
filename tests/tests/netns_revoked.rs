//! Ring 4: a policy that is revoked under open connections, and namespaces that let those live on.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use weir_tests::netns::Netns;
use weir_tests::node::{Family, Node, NodeOptions, Pod};
use weir_tests::traffic::{Answer, PATIENCE, SILENCE, ask_tcp, drops, eventually};
use weir_tests::workloads::{Transport, Workload};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// Of each family.
const CONNECTIONS: usize = 250;
const SOON: Duration = Duration::from_secs(3);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: echo\r\n\r\n";

/// The server takes whom `from` names.
fn policy(from: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: server, namespace: a}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: server}}}}\n  ingress: [{{from: [{{podSelector: {{matchLabels: {{app: {from}}}}}}}]}}]\n"
    )
}

/// Nobody takes anything from any pod.
const WALLS: &str = "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: walls}\nspec:\n  \
     {tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}\n";

fn namespace(annotations: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, annotations: {{{annotations}}}}}\n"
    )
}

struct Town {
    node: Node,
    server: Pod,
    client: Pod,
}

impl Town {
    fn start(name: &str, annotations: &str) -> Self {
        let node = Node::start(NodeOptions::named(name)).unwrap();
        node.write_manifest("namespace.yaml", &namespace(annotations))
            .unwrap();
        node.write_manifest("policy.yaml", &policy("client"))
            .unwrap();
        let server = Workload::named("a", "server").port(Transport::Tcp, 80);
        let server = node.run_pod(server).unwrap();
        let client = node.run_pod(Workload::named("a", "client")).unwrap();
        Self {
            node,
            server,
            client,
        }
    }

    fn server(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.server.address(family).unwrap(), 80)
    }

    fn connect(&self) -> Vec<TcpStream> {
        let all = FAMILIES.into_iter().flat_map(|family| {
            let target = self.server(family);
            let open = move || {
                let connect = || TcpStream::connect_timeout(&target, PATIENCE);
                self.client.netns().run(connect).unwrap().unwrap()
            };
            (0..CONNECTIONS).map(move |_| open())
        });
        all.collect()
    }

    /// Nothing new is let in, in either family.
    fn wait_until_denied(&self) {
        let client: &Netns = self.client.netns();
        for family in FAMILIES {
            let ask = || ask_tcp(client, self.server(family), SILENCE);
            eventually("denied", SOON, ask, |it| *it == Answer::Silence).unwrap();
        }
    }
}

/// Sends a request on every connection.
fn ask(connections: &mut [TcpStream]) {
    for connection in connections {
        connection.write_all(REQUEST).unwrap();
    }
}

/// How many of them have an answer within so long, all in all.
fn answered(connections: &mut [TcpStream], patience: Duration) -> usize {
    std::thread::sleep(patience);
    let mut buffer = [0; 4096];
    let mut has_answer = |connection: &mut TcpStream| {
        connection.set_nonblocking(true).unwrap();
        let read = connection.read(&mut buffer);
        connection.set_nonblocking(false).unwrap();
        match read {
            Ok(length) => length > 0,
            Err(e) if e.kind() == ErrorKind::WouldBlock => false,
            Err(e) => panic!("a connection has ended: {e}"),
        }
    };
    connections
        .iter_mut()
        .filter_map(|it| has_answer(it).then_some(()))
        .count()
}

#[test]
fn the_next_packet_of_every_open_connection_meets_a_policy_that_was_revoked() {
    let town = Town::start("revoked", "");
    let mut connections = town.connect();
    ask(&mut connections);
    assert_eq!(answered(&mut connections, SILENCE), 2 * CONNECTIONS);
    town.node
        .write_manifest("policy.yaml", &policy("nobody"))
        .unwrap();
    town.wait_until_denied();
    let before = drops(&town.node, "ingress_denied").unwrap();
    ask(&mut connections);
    assert_eq!(answered(&mut connections, SILENCE), 0);
    let dropped = drops(&town.node, "ingress_denied").unwrap() - before;
    assert!(dropped >= 2 * CONNECTIONS as u64, "{dropped} dropped");
    // It was policy that held them, and nothing else: they go on where they were.
    town.node
        .write_manifest("policy.yaml", &policy("client"))
        .unwrap();
    assert_eq!(
        answered(&mut connections, Duration::from_secs(5)),
        2 * CONNECTIONS
    );
}

#[test]
fn a_namespace_that_keeps_established_connections_loses_none_until_it_does_not() {
    const KEEP: &str = "weir.local/established-connections: keep";
    let town = Town::start("kept", KEEP);
    let mut connections = town.connect();
    ask(&mut connections);
    assert_eq!(answered(&mut connections, SILENCE), 2 * CONNECTIONS);
    town.node
        .write_manifest("policy.yaml", &policy("nobody"))
        .unwrap();
    town.wait_until_denied();
    ask(&mut connections);
    assert_eq!(answered(&mut connections, SILENCE), 2 * CONNECTIONS);
    // What the Admin tier denies is not kept.
    town.node.write_manifest("walls.yaml", WALLS).unwrap();
    let walled = || {
        ask(&mut connections);
        answered(&mut connections, SILENCE)
    };
    eventually("walled", SOON + 3 * SILENCE, walled, |it| *it == 0).unwrap();
    std::fs::remove_file(town.node.manifests().join("walls.yaml")).unwrap();
    let again = answered(&mut connections, Duration::from_secs(5));
    assert_eq!(again, 2 * CONNECTIONS);
    town.node
        .write_manifest("namespace.yaml", &namespace(""))
        .unwrap();
    let before = drops(&town.node, "ingress_denied").unwrap();
    // Nobody says when that is in force but these packets themselves: each is answered or dropped.
    let mut last = Vec::new();
    let cut = || {
        ask(&mut connections);
        last.push(answered(&mut connections, SILENCE));
        last[last.len() - 1]
    };
    eventually("cut", SOON + 3 * SILENCE, cut, |it| *it == 0).unwrap();
    assert!(drops(&town.node, "ingress_denied").unwrap() - before >= 2 * CONNECTIONS as u64);
}
