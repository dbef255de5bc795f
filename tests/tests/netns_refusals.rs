//! Ring 4: what nobody serves is refused at once, to real sockets that no hook sees: pods', and those of a world beyond
//! the node's uplink.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use weir_tests::netns::{End, Netns, link};
use weir_tests::node::{Node, NodeOptions, Pod};
use weir_tests::traffic::{
    Answer, Conversation, PATIENCE, SILENCE, ask_tcp, ask_udp, drops, eventually, is_echoed,
};
use weir_tests::workloads::{Transport, Workload};

/// The node's ends of the uplink, and the world's.
const NODE: [&str; 2] = ["198.51.100.2", "2001:db8:1::2"];
const WORLD: [&str; 2] = ["198.51.100.1", "2001:db8:1::1"];
/// The Service's own addresses.
const SERVICE: [&str; 2] = ["10.96.0.80", "fd00:10:96::80"];
const NODE_PORTS: [u16; 2] = [30_080, 30_081];
/// What is refused is so before a SYN is sent again, after a second, and mostly much sooner.
const AT_ONCE: Duration = Duration::from_millis(900);
const SOON: Duration = Duration::from_millis(100);

/// A node with an uplink, the Service `web`, a pod that asks, and a world.
struct Site {
    client: Pod,
    node: Node,
    world: Netns,
}

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

impl Site {
    fn new(name: &str, more: &str) -> Self {
        let mut node = Node::prepare(NodeOptions::named(name)).unwrap();
        let world = Netns::new("world").unwrap();
        let netns = node.machine().netns();
        let [here, there] = [NODE, WORLD].map(|[v4, v6]| [format!("{v4}/24"), format!("{v6}/64")]);
        link(
            End {
                netns,
                device: "eth0",
                addresses: &here.each_ref().map(String::as_str),
            },
            End {
                netns: &world,
                device: "node",
                addresses: &there.each_ref().map(String::as_str),
            },
        )
        .unwrap();
        netns.ip("route del default").unwrap();
        netns.ip("-6 route del default").unwrap();
        for via in WORLD {
            netns.add_route("default", via.parse().unwrap()).unwrap();
        }
        node.start_agent().unwrap();
        node.start_dns().unwrap();
        node.wait_ready().unwrap();
        let client = node.run_pod(Workload::named("shop", "client")).unwrap();
        let [v4, v6] = SERVICE;
        let [tcp, udp] = NODE_PORTS;
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec:\n  \
             type: NodePort\n  ipFamilyPolicy: RequireDualStack\n  clusterIPs: ['{v4}', '{v6}']\n  \
             {more}\n  ports:\n  \
             - {{name: web, port: 80, targetPort: 8080, nodePort: {tcp}, protocol: TCP}}\n  \
             - {{name: feed, port: 81, targetPort: 8081, nodePort: {udp}, protocol: UDP}}\n"
        );
        node.write_manifest("web.yaml", &service).unwrap();
        node.wait_for_service("shop/web", 0, PATIENCE).unwrap();
        let hooks = || node.ask("verify").unwrap()["hooks"].to_string();
        let is_there = |hooks: &String| hooks.contains("uplink-eth0-in");
        eventually("the uplink has its programs", PATIENCE, hooks, is_there).unwrap();
        Self {
            client,
            node,
            world,
        }
    }

    /// Who asks, and for which ports of TCP and UDP: the Service by a pod, and the node by the world.
    fn asked(&self) -> [(&Netns, [SocketAddr; 2]); 4] {
        let of = |ip, [tcp, udp]: [u16; 2]| [at(ip, tcp), at(ip, udp)];
        let ([a, b], [c, d]) = (
            SERVICE.map(|ip| (self.client.netns(), of(ip, [80, 81]))),
            NODE.map(|ip| (&self.world, of(ip, NODE_PORTS))),
        );
        [a, b, c, d]
    }
}

fn set_offload(netns: &Netns, device: &str, offload: &str) {
    let mut ethtool = netns.command("ethtool");
    let output = ethtool.args(["-K", device, "tx", offload]).output();
    assert!(output.unwrap().status.success());
}

fn is_refused(from: &Netns, [tcp, udp]: [SocketAddr; 2]) {
    let mut fastest = AT_ONCE;
    for _ in 0..5 {
        let start = Instant::now();
        assert_eq!(ask_tcp(from, tcp, PATIENCE), Answer::Refused, "{tcp}");
        assert_eq!(ask_udp(from, udp, PATIENCE), Answer::Refused, "{udp}");
        assert!(start.elapsed() < AT_ONCE, "{tcp}: {:?}", start.elapsed());
        fastest = fastest.min(start.elapsed());
    }
    assert!(fastest < SOON, "{tcp}: {fastest:?}");
}

#[test]
fn a_service_without_endpoints_is_refused() {
    let site = Site::new("nobody", "selector: {app: nobody}");
    // Whoever makes checksums: the sender, a device behind the programs, or nobody.
    for (theirs, ours) in [("on", "on"), ("off", "on"), ("on", "off"), ("off", "off")] {
        set_offload(site.client.netns(), "eth0", theirs);
        set_offload(&site.world, "node", theirs);
        set_offload(site.node.machine().netns(), "eth0", ours);
        for (from, targets) in site.asked() {
            is_refused(from, targets);
        }
    }
    // Each was counted: two ways, two families, five times TCP and UDP.
    assert_eq!(drops(&site.node, "no_backend").unwrap(), 4 * 2 * 2 * 10);
    let metrics = site.node.metrics().unwrap();
    let refusals = metrics
        .lines()
        .find_map(|line| line.strip_prefix("weir_refusals_total "));
    assert_eq!(refusals, Some("160"));
}

#[test]
fn a_cluster_ip_is_refused_at_a_port_that_it_does_not_have() {
    let site = Site::new("ports", "selector: {app: nobody}");
    for offload in ["on", "off"] {
        set_offload(site.client.netns(), "eth0", offload);
        for ip in SERVICE {
            // The other protocol's port, too.
            for ports in [[82, 83], [81, 80]] {
                is_refused(site.client.netns(), ports.map(|port| at(ip, port)));
            }
            let error = is_echoed(site.client.netns(), ip.parse().unwrap(), PATIENCE).unwrap_err();
            let error = error.downcast_ref::<Errno>();
            assert_eq!(error, Some(&Errno::ECONNREFUSED), "{ip}");
        }
    }
    assert_eq!(
        drops(&site.node, "no_service").unwrap(),
        2 * 2 * (2 * 10 + 1)
    );
    let services = site.node.ask("services").unwrap();
    let rows = services.as_array().unwrap();
    let zero = |row: &&serde_json::Value| row["address"].to_string().ends_with(":0\"");
    assert!(
        !rows.is_empty() && !rows.iter().any(|row| zero(&row)),
        "{rows:?}"
    );
    // It is nobody's when the Service is gone.
    let manifest = site.node.manifests().join("web.yaml");
    std::fs::remove_file(manifest).unwrap();
    for ip in SERVICE {
        let ask = || ask_tcp(site.client.netns(), at(ip, 82), SILENCE);
        let is_let_go = |answer: &Answer| *answer != Answer::Refused;
        eventually("the row is gone", PATIENCE, ask, is_let_go).unwrap();
    }
}

#[test]
fn a_connection_whose_backend_is_gone_is_reset() {
    let site = Site::new("gone", "selector: {app: web}");
    let web = Workload::named("shop", "web").port(Transport::Tcp, 8080);
    let _server = site.node.run_pod(web).unwrap();
    site.node.wait_for_service("shop/web", 1, PATIENCE).unwrap();
    let mut open = Vec::new();
    for (from, [target, _]) in site.asked() {
        for is_large in [false, true] {
            let mut small = Conversation::open_in(from, target, PATIENCE).unwrap();
            assert_eq!(small.ask().unwrap(), "web");
            let large = from.run(|| TcpStream::connect(target).unwrap()).unwrap();
            large.set_read_timeout(Some(PATIENCE)).unwrap();
            open.push((target, is_large.then_some(large), small));
        }
    }
    // The object goes and the server stays: only the datapath can end a connection.
    let manifest = site.node.manifests().join("pods/shop.web.yaml");
    std::fs::rename(&manifest, site.node.machine().dir().join("web")).unwrap();
    site.node.wait_for_service("shop/web", 0, PATIENCE).unwrap();
    for (target, large, mut small) in open {
        let start = Instant::now();
        // More than a segment: it comes in one piece (GSO).
        let error = match large {
            Some(mut large) => large
                .write_all(&[7; 60_000])
                .and_then(|()| large.read_exact(&mut [0]))
                .unwrap_err(),
            None => small.ask().unwrap_err(),
        };
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{target}");
        // Before it is sent again, after 200 ms, on an idle machine.
        println!("{target}: reset after {:?}", start.elapsed());
        assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    }
    assert!(drops(&site.node, "backend_gone").unwrap() >= 8);
}

#[test]
fn a_local_policy_without_an_endpoint_here_is_silent() {
    let local = "externalTrafficPolicy: Local\n  internalTrafficPolicy: Local";
    let site = Site::new("local", local);
    for (family, ip) in ["IPv4", "IPv6"].iter().zip(["10.9.9.9", "fd00:9::9"]) {
        let slice = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-{}, \
             namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\naddressType: {family}\n\
             endpoints:\n- {{addresses: ['{ip}'], nodeName: elsewhere, conditions: {{ready: true}}}}\n\
             ports:\n- {{name: web, port: 8080, protocol: TCP}}\n\
             - {{name: feed, port: 8081, protocol: UDP}}\n",
            family.to_lowercase()
        );
        let file = format!("web-{family}.yaml");
        site.node.write_manifest(&file, &slice).unwrap();
    }
    for (from, [tcp, udp]) in site.asked() {
        let is_silent = |answer: &Answer| *answer == Answer::Silence;
        let ask = || ask_tcp(from, tcp, SILENCE);
        eventually("it is silent", PATIENCE, ask, is_silent).unwrap();
        assert_eq!(ask_udp(from, udp, SILENCE), Answer::Silence, "{udp}");
    }
    assert!(drops(&site.node, "no_local_backend").unwrap() >= 8);
}
