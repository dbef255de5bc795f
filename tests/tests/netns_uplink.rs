//! Ring 4: a node with an uplink and a world behind it, which knows nothing of pods.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use aya::maps::{HashMap, MapData};
use weir_agent::kernel::pin_path;
use weir_common::event::Hook;
use weir_common::table::TABLES;
use weir_common::way::{Plan, WayKey};
use weir_tests::load::Load;
use weir_tests::netns::{End, Netns, link};
use weir_tests::node::{Node, NodeOptions, Pod, binary};
use weir_tests::process::{Launch, Process};
use weir_tests::traffic::{
    Answer, Conversation, PATIENCE, SILENCE, ask_tcp, ask_udp, eventually, is_echoed, recent_drops,
    udp_socket,
};
use weir_tests::workloads::{Transport, Workload};
use zerocopy::transmute;

/// The node's ends of the uplink, and the world's.
const NODE: [&str; 2] = ["198.51.100.2", "2001:db8:1::2"];
const WORLD: [&str; 2] = ["198.51.100.1", "2001:db8:1::1"];
/// A host behind the world's router, on a link of a smaller MTU.
const BEYOND: [&str; 2] = ["203.0.113.2", "2001:db8:2::2"];
/// Longer than an audit of the hooks takes to come around.
const AUDIT: Duration = Duration::from_secs(15);

/// A node with an uplink.
struct Site {
    // Processes end before the namespaces that they are in.
    _server: Process,
    node: Node,
    world: Netns,
}

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// Runs a command and returns what it printed; it must succeed.
fn output(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn curl(mut command: Command, target: SocketAddr) -> String {
    command.args(["-sS", "--max-time", "3", &format!("http://{target}/")]);
    output(command).trim().to_owned()
}

impl Site {
    fn new(name: &str, agent_args: &[&str]) -> Self {
        let mut options = NodeOptions::named(name);
        options.agent_args = agent_args.iter().map(ToString::to_string).collect();
        let mut node = Node::prepare(options).unwrap();
        let world = Netns::new("world").unwrap();
        let netns = node.machine().netns();
        link(
            End {
                netns,
                device: "eth0",
                addresses: &["198.51.100.2/24", "2001:db8:1::2/64"],
            },
            End {
                netns: &world,
                device: "node",
                addresses: &["198.51.100.1/24", "2001:db8:1::1/64"],
            },
        )
        .unwrap();
        netns.ip("route del default").unwrap();
        netns.ip("-6 route del default").unwrap();
        for via in WORLD {
            netns.add_route("default", via.parse().unwrap()).unwrap();
        }
        let mut server = Launch::new("server", binary("weir-echo"))
            .in_netns(&world)
            .log_to(&node.machine().dir().join("world.log"))
            .args(["--name", "world", "--tcp", "8080", "--udp", "8081"])
            .spawn()
            .unwrap();
        server.wait_for_log("ready", PATIENCE).unwrap();
        node.start_agent().unwrap();
        node.start_dns().unwrap();
        node.wait_ready().unwrap();
        let site = Self {
            _server: server,
            node,
            world,
        };
        site.wait_for_hooks(PATIENCE);
        site
    }

    fn pod(&self, name: &str) -> Pod {
        let pod = Workload::named("shop", name)
            .port(Transport::Tcp, 8080)
            .port(Transport::Udp, 8081);
        self.node.run_pod(pod).unwrap()
    }

    /// A server of the node itself.
    fn serve(&self, words: &str) -> Process {
        let launch = self.node.machine().launch("own", binary("weir-echo"));
        let mut server = launch.args(words.split(' ')).spawn().unwrap();
        server.wait_for_log("ready", PATIENCE).unwrap();
        server
    }

    /// The hooks of the uplink that hold their program.
    fn hooks(&self) -> Vec<String> {
        let verify = self.node.ask("verify").unwrap();
        let hooks = verify["hooks"].as_array().unwrap().iter();
        let right = hooks.filter(|hook| hook["problem"].is_null());
        let names = right.filter_map(|hook| hook["hook"].as_str().map(ToOwned::to_owned));
        names.filter(|name| name.starts_with("uplink-")).collect()
    }

    fn wait_for_hooks(&self, within: Duration) {
        let are_there = |hooks: &Vec<String>| *hooks == ["uplink-eth0-in", "uplink-eth0-out"];
        let hooks = || self.hooks();
        eventually("the uplink has its programs", within, hooks, are_there).unwrap();
    }

    /// A UDP server of the world that says where what it hears comes from.
    fn listener(&self, ip: &str) -> UdpSocket {
        udp_socket(&self.world, at(ip, 0), PATIENCE).unwrap()
    }
}

fn set_offload(pod: &Pod, offload: &str) {
    let mut ethtool = pod.netns().command("ethtool");
    ethtool.args(["-K", "eth0", "tx", offload]);
    output(ethtool);
}

#[test]
fn what_leaves_the_cluster_has_the_nodes_address() {
    let site = Site::new("leaves", &[]);
    let pod = site.pod("client");
    for (ours, theirs) in NODE.iter().zip(WORLD) {
        for offload in ["on", "off"] {
            set_offload(&pod, offload);
            let said = curl(pod.command("curl"), at(theirs, 8080));
            assert_eq!(said, format!("world {ours}"), "tx {offload}");
            // From a socket that no hook of ours sees.
            let target = at(theirs, 8081);
            let said = ask_udp(pod.netns(), target, PATIENCE);
            assert_eq!(said, Answer::By("world".into()), "tx {offload}");
        }
        let theirs: IpAddr = theirs.parse().unwrap();
        assert!(
            is_echoed(pod.netns(), theirs, PATIENCE).unwrap(),
            "ping {theirs}"
        );
        let listener = site.listener(&theirs.to_string());
        let target = listener.local_addr().unwrap();
        let any = weir_tests::traffic::any(target);
        let socket = udp_socket(pod.netns(), any, PATIENCE).unwrap();
        let mut ports = Vec::new();
        for _ in 0..3 {
            socket.send_to(b"who", target).unwrap();
            let (_, peer) = listener.recv_from(&mut [0; 16]).unwrap();
            assert_eq!(peer.ip().to_string(), *ours);
            assert!((16_384..30_000).contains(&peer.port()), "{peer}");
            ports.push(peer.port());
        }
        assert!(
            ports.iter().all(|port| *port == ports[0]),
            "{ports:?}: a flow keeps its port"
        );
    }
    for problem in ["no_nat_port", "not_translatable", "no_flow"] {
        assert_eq!(
            weir_tests::traffic::drops(&site.node, problem).unwrap(),
            0,
            "{problem}"
        );
    }
}

#[test]
fn two_hundred_connections_at_once_have_their_own_ports() {
    let site = Site::new("many", &[]);
    let pods = [site.pod("one"), site.pod("two")];
    for theirs in WORLD {
        let target = at(theirs, 8080);
        let mut open: Vec<_> = (0..200)
            .map(|n| Conversation::open_in(pods[n % 2].netns(), target, PATIENCE).unwrap())
            .collect();
        for _ in 0..2 {
            for conversation in &mut open {
                assert_eq!(conversation.ask().unwrap(), "world");
            }
        }
    }
}

#[test]
fn nothing_is_lost_when_the_agent_is_killed() {
    let mut site = Site::new("killed", &[]);
    let pod = site.pod("client");
    for theirs in WORLD {
        let target = at(theirs, 8080);
        let mut long = Conversation::open_in(pod.netns(), target, PATIENCE).unwrap();
        let words = format!("--kind http --target {target} --rate 200 --seconds 5 --patience 3000");
        let load = Load::start(&pod, &words).unwrap();
        for _ in 0..2 {
            long.ask().unwrap();
            site.node.kill_agent().unwrap();
            long.ask().unwrap();
            site.node.start_agent().unwrap();
            site.node.wait_ready().unwrap();
        }
        site.wait_for_hooks(PATIENCE);
        let tally = load.finish().unwrap();
        assert_eq!(tally.failed(), 0, "of {}: {tally:?}", tally.attempted);
        assert!(tally.attempted >= 1000, "{tally:?}");
        long.ask().unwrap();
    }
}

#[test]
fn the_nodes_own_traffic_is_as_it_was() {
    let site = Site::new("own", &[]);
    // Also a server on a port that could stand for a pod.
    let mut server = site.serve("--name node --tcp 20000 --tcp 7000 --udp 20000");
    for (ours, theirs) in NODE.iter().zip(WORLD) {
        let said = curl(
            site.node.machine().netns().command("curl"),
            at(theirs, 8080),
        );
        assert_eq!(said, format!("world {ours}"));
        for port in [7000, 20_000] {
            let said = curl(site.world.command("curl"), at(ours, port));
            assert_eq!(said, format!("node {theirs}"));
        }
        let said = ask_udp(&site.world, at(ours, 20_000), PATIENCE);
        assert_eq!(said, Answer::By("node".into()));
        let ip = theirs.parse().unwrap();
        assert!(is_echoed(site.node.machine().netns(), ip, PATIENCE).unwrap());
        assert!(is_echoed(&site.world, ours.parse().unwrap(), PATIENCE).unwrap());
    }
    server.kill().unwrap();
}

#[test]
fn an_uplink_gets_its_programs_back() {
    let site = Site::new("back", &[]);
    let pod = site.pod("client");
    for side in ["ingress", "egress"] {
        let mut tc = site.node.machine().netns().command("tc");
        tc.args(["filter", "del", "dev", "eth0", side]);
        output(tc);
    }
    eventually("both are gone", PATIENCE, || site.hooks(), Vec::is_empty).unwrap();
    site.wait_for_hooks(AUDIT);
    let said = curl(pod.command("curl"), at(WORLD[0], 8080));
    assert_eq!(said, format!("world {}", NODE[0]));
}

#[test]
fn a_device_that_comes_later_becomes_an_uplink() {
    let site = Site::new("later", &["--device", "eth0", "--device", "eth1"]);
    let netns = site.node.machine().netns();
    let other = Netns::new("other").unwrap();
    link(
        End {
            netns,
            device: "eth1",
            addresses: &["192.168.77.2/24"],
        },
        End {
            netns: &other,
            device: "node",
            addresses: &["192.168.77.1/24"],
        },
    )
    .unwrap();
    let has_both = |hooks: &Vec<String>| hooks.len() == 4;
    eventually("eth1 is an uplink", PATIENCE, || site.hooks(), has_both).unwrap();
    let pod = site.pod("client");
    let listener = udp_socket(&other, at("192.168.77.1", 0), PATIENCE).unwrap();
    let target = listener.local_addr().unwrap();
    let any = weir_tests::traffic::any(target);
    let socket = udp_socket(pod.netns(), any, PATIENCE).unwrap();
    socket.send_to(b"who", target).unwrap();
    let (_, peer) = listener.recv_from(&mut [0; 16]).unwrap();
    assert_eq!(peer.ip().to_string(), "192.168.77.2");
    netns.ip("link del eth1").unwrap();
    let has_one = |hooks: &Vec<String>| hooks.len() == 2;
    eventually("eth1 is gone", PATIENCE, || site.hooks(), has_one).unwrap();
}

#[test]
fn without_masquerading_the_pods_address_leaves() {
    let site = Site::new("plain", &["--masquerade", "false"]);
    let pod = site.pod("client");
    for theirs in WORLD {
        let listener = site.listener(theirs);
        let target = listener.local_addr().unwrap();
        let any = weir_tests::traffic::any(target);
        let socket = udp_socket(pod.netns(), any, PATIENCE).unwrap();
        socket.send_to(b"who", target).unwrap();
        let (_, peer) = listener.recv_from(&mut [0; 16]).unwrap();
        assert!(pod.addresses.contains(&peer.ip()), "{peer}");
    }
}

#[test]
fn a_router_that_wants_smaller_packets_is_heard_by_the_pod() {
    let site = Site::new("mtu", &[]);
    let beyond = Netns::new("beyond").unwrap();
    link(
        End {
            netns: &site.world,
            device: "far",
            addresses: &["203.0.113.1/24", "2001:db8:2::1/64"],
        },
        End {
            netns: &beyond,
            device: "far",
            addresses: &["203.0.113.2/24", "2001:db8:2::2/64"],
        },
    )
    .unwrap();
    site.world.set_sysctl("net.ipv4.ip_forward", "1").unwrap();
    site.world
        .set_sysctl("net.ipv6.conf.all.forwarding", "1")
        .unwrap();
    // The server offers large segments, the router cannot pass them on: only its word makes them smaller.
    site.world.ip("link set far mtu 1300").unwrap();
    for via in ["203.0.113.1", "2001:db8:2::1"] {
        beyond.add_route("default", via.parse().unwrap()).unwrap();
    }
    let pod = site.pod("client");
    const MANY: usize = 300_000;
    for theirs in BEYOND {
        let server = beyond
            .run(|| TcpListener::bind(at(theirs, 0)))
            .unwrap()
            .unwrap();
        let target = server.local_addr().unwrap();
        let reader = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            all.len()
        });
        let mut stream = pod
            .netns()
            .run(|| TcpStream::connect(target))
            .unwrap()
            .unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream.write_all(&vec![7; MANY]).unwrap();
        drop(stream);
        assert_eq!(reader.join().unwrap(), MANY);
    }
}

/// A Service with a node port of TCP 80 and UDP 81, in both families.
fn service(name: &str, tcp: u16, udp: u16, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  \
         type: NodePort\n  ipFamilyPolicy: RequireDualStack\n  ipFamilies: [IPv4, IPv6]\n  {more}\n  \
         ports:\n  \
         - {{name: web, port: 80, targetPort: 8080, nodePort: {tcp}, protocol: TCP}}\n  \
         - {{name: feed, port: 81, targetPort: 8081, nodePort: {udp}, protocol: UDP}}\n"
    )
}

/// A service that selects nothing, with node ports for TCP and, the next one, UDP, and a backend at an address of each family.
fn serve_at(node: &Node, name: &str, node_port: u16, addresses: [&str; 2]) {
    node.write_manifest("far.yaml", &service(name, node_port, node_port + 1, ""))
        .unwrap();
    for (family, ip) in ["IPv4", "IPv6"].iter().zip(addresses) {
        let slice = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-{}, \
             namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: {family}\n\
             endpoints:\n- {{addresses: ['{ip}'], conditions: {{ready: true}}}}\nports:\n\
             - {{name: web, port: 8080, protocol: TCP}}\n- {{name: feed, port: 8081, protocol: UDP}}\n",
            family.to_lowercase()
        );
        let file = format!("{name}-{family}.yaml");
        node.write_manifest(&file, &slice).unwrap();
    }
    let name = format!("shop/{name}");
    node.wait_for_service(&name, 1, PATIENCE).unwrap();
}

#[test]
fn a_node_port_leads_to_a_pod_which_sees_the_client() {
    for policy in ["Cluster", "Local"] {
        let site = Site::new("port", &[]);
        let pod = site.pod("web");
        let more = format!("selector: {{app: web}}\n  externalTrafficPolicy: {policy}");
        site.node
            .write_manifest("web.yaml", &service("web", 30_080, 30_081, &more))
            .unwrap();
        site.node.wait_for_service("shop/web", 1, PATIENCE).unwrap();
        for (ours, theirs) in NODE.iter().zip(WORLD) {
            for offload in ["on", "off"] {
                set_offload(&pod, offload);
                let said = curl(site.world.command("curl"), at(ours, 30_080));
                assert_eq!(said, format!("web {theirs}"), "{policy}, tx {offload}");
                // A connected socket takes answers from the node port alone.
                let said = ask_udp(&site.world, at(ours, 30_081), PATIENCE);
                assert_eq!(said, Answer::By("web".into()), "{policy}, tx {offload}");
            }
            let mut open: Vec<_> = (0..50)
                .map(|_| Conversation::open_in(&site.world, at(ours, 30_080), PATIENCE).unwrap())
                .collect();
            for conversation in &mut open {
                assert_eq!(conversation.ask().unwrap(), "web");
            }
        }
        // The pod's policy judges the client itself.
        let closed = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed, \
                      namespace: shop}\nspec: {podSelector: {}, policyTypes: [Ingress]}\n";
        site.node.write_manifest("closed.yaml", closed).unwrap();
        for (ours, theirs) in NODE.iter().zip(WORLD) {
            let is_silent = |answer: &Answer| *answer == Answer::Silence;
            let ask = || ask_udp(&site.world, at(ours, 30_081), SILENCE);
            eventually("the policy holds", AUDIT, ask, is_silent).unwrap();
            let drops = recent_drops(&site.node, "ingress_denied").unwrap();
            let from = |drop: &serde_json::Value| drop.to_string().contains(theirs);
            assert!(drops.iter().any(from), "{theirs}: {drops:?}");
        }
    }
}

#[test]
fn a_node_port_leads_to_a_backend_elsewhere_with_the_nodes_address() {
    let site = Site::new("elsewhere", &[]);
    let beyond = Netns::new("beyond").unwrap();
    link(
        End {
            netns: &site.world,
            device: "far",
            addresses: &["203.0.113.1/24", "2001:db8:2::1/64"],
        },
        End {
            netns: &beyond,
            device: "far",
            addresses: &["203.0.113.2/24", "2001:db8:2::2/64"],
        },
    )
    .unwrap();
    site.world.set_sysctl("net.ipv4.ip_forward", "1").unwrap();
    site.world
        .set_sysctl("net.ipv6.conf.all.forwarding", "1")
        .unwrap();
    for via in ["203.0.113.1", "2001:db8:2::1"] {
        beyond.add_route("default", via.parse().unwrap()).unwrap();
    }
    // The backend is the world's server.
    serve_at(&site.node, "far", 30_090, WORLD);
    for ours in NODE {
        let target = at(ours, 30_090);
        let is_there = |answer: &Answer| *answer == Answer::By("world".into());
        let ask = || ask_tcp(&beyond, target, PATIENCE);
        eventually("the backend is known", PATIENCE, ask, is_there).unwrap();
        let said = curl(beyond.command("curl"), target);
        assert_eq!(said, format!("world {ours}"));
        let said = ask_udp(&beyond, at(ours, 30_091), PATIENCE);
        assert_eq!(said, Answer::By("world".into()));
        let mut open: Vec<_> = (0..50)
            .map(|_| Conversation::open_in(&beyond, target, PATIENCE).unwrap())
            .collect();
        for _ in 0..2 {
            for conversation in &mut open {
                assert_eq!(conversation.ask().unwrap(), "world");
            }
        }
    }
}

/// A pod in the host network, on the node that was asked.
#[test]
fn a_node_port_leads_to_a_process_of_the_node_which_sees_the_client() {
    let mut site = Site::new("host", &[]);
    let mut server = site.serve("--name host --tcp 8080 --udp 8081");
    serve_at(&site.node, "host", 30_100, NODE);
    for (ours, theirs) in NODE.iter().zip(WORLD) {
        let (tcp, udp) = (at(ours, 30_100), at(ours, 30_101));
        let is_there = |answer: &Answer| *answer == Answer::By("host".into());
        let ask = || ask_tcp(&site.world, tcp, PATIENCE);
        eventually("the backend is known", PATIENCE, ask, is_there).unwrap();
        let by_host = format!("host {theirs}");
        assert_eq!(curl(site.world.command("curl"), tcp), by_host);
        // A connected socket takes answers from the node port alone.
        let host = Answer::By("host".into());
        assert_eq!(ask_udp(&site.world, udp, PATIENCE), host);
        let mut open: Vec<_> = (0..50)
            .map(|_| Conversation::open_in(&site.world, tcp, PATIENCE).unwrap())
            .collect();
        for port in [8080, 30_100] {
            assert_eq!(curl(site.world.command("curl"), at(ours, port)), by_host);
        }
        assert_eq!(ask_udp(&site.world, at(ours, 8081), PATIENCE), host);
        for _ in 0..2 {
            for conversation in &mut open {
                assert_eq!(conversation.ask().unwrap(), "host");
            }
            // An agent without this table takes it away; the next one finds who is asked.
            site.node.kill_agent().unwrap();
            let table = TABLES.iter().find(|it| it.name == "HOSTNET_PORTS").unwrap();
            std::fs::remove_file(pin_path(
                &site.node.machine().bpffs().path().join("weir"),
                table,
            ))
            .unwrap();
            site.node.start_agent().unwrap();
            site.node.wait_ready().unwrap();
        }
    }
    // What the kernel refuses for nobody comes from the node port, too: RST, and an error about the datagram.
    server.kill().unwrap();
    for ours in NODE {
        for is_refused in [
            ask_tcp(&site.world, at(ours, 30_100), PATIENCE),
            ask_udp(&site.world, at(ours, 30_101), PATIENCE),
        ] {
            assert_eq!(is_refused, Answer::Refused, "{ours}");
        }
    }
}

/// Ports of the node that are reserved for a question, and perhaps an answer.
fn reserved(node: &Node) -> usize {
    let table = TABLES
        .iter()
        .find(|table| table.name == "OTHER_PLANS")
        .unwrap();
    let path = pin_path(&node.machine().bpffs().path().join("weir"), table);
    let map = aya::maps::Map::LruHashMap(MapData::from_pin(path).unwrap());
    let map: HashMap<MapData, [u8; 40], [u8; size_of::<Plan>()]> = map.try_into().unwrap();
    map.keys()
        .map(|key| transmute!(key.unwrap()))
        .filter(|key: &WayKey| key.hook == Hook::FROM_NET)
        .count()
}

#[test]
fn a_port_is_freed_with_the_pod_whoever_was_there_when_it_was_taken() {
    let mut site = Site::new("freed", &[]);
    let pods = [site.pod("goes"), site.pod("stays")];
    for pod in &pods {
        for theirs in WORLD {
            let said = ask_udp(pod.netns(), at(theirs, 8081), PATIENCE);
            assert_eq!(said, Answer::By("world".into()));
        }
    }
    let before = reserved(&site.node);
    assert!(before >= 4, "{before}");
    site.node.kill_agent().unwrap();
    site.node.start_agent().unwrap();
    site.node.wait_ready().unwrap();
    assert_eq!(reserved(&site.node), before);
    let [goes, _stays] = pods;
    site.node.delete_pod(goes).unwrap();
    // Two rounds of the sweep: a port that was taken in this moment is left for the next.
    let is_freed = |rows: &usize| (2..=before - 2).contains(rows);
    eventually(
        "ports are freed",
        Duration::from_secs(75),
        || reserved(&site.node),
        is_freed,
    )
    .unwrap();
}

#[test]
fn cleanup_takes_the_programs_off_the_uplink() {
    let mut site = Site::new("clean", &[]);
    site.node.kill_agent().unwrap();
    let machine = site.node.machine();
    let mut cleanup = machine.netns().command(binary("weir-agent"));
    cleanup
        .arg("cleanup")
        .arg("--bpffs")
        .arg(machine.bpffs().path().join("weir"));
    cleanup.arg("--cgroup").arg(machine.cgroup().path());
    cleanup.arg("--run-dir").arg(machine.dir().join("run"));
    let said = output(cleanup);
    assert!(said.contains("removed filters of the uplink"), "{said}");
    let mut tc = machine.netns().command("tc");
    tc.args(["qdisc", "show", "dev", "eth0", "clsact"]);
    assert_eq!(output(tc), "", "the queue was ours");
}
