//! What Prometheus and probes get of a real agent: pages that the tools accept, counters that move, conversations that come
//! and go.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use weir_tests::netns::{End, Netns, link};
use weir_tests::node::{Family, Node, NodeOptions, Pod, Source, binary};
use weir_tests::process::{Launch, Process};
use weir_tests::shop::Shop;
use weir_tests::traffic::{
    Conversation, PATIENCE, any, eventually, exchange, is_echoed, udp_socket,
};
use weir_tests::workloads::{Transport, Workload};

/// A policy that lets nothing in.
const HUSH: &str = "\
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: hush, namespace: shop}
spec:
  podSelector: {matchLabels: {app: quiet}}
  policyTypes: [Ingress]
";

/// `promtool`, which `cargo xtask setup` unpacks into `target/tools`.
fn promtool() -> PathBuf {
    let tools = std::env::var_os("WEIR_TOOLS_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools"),
        PathBuf::from,
    );
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([tools.clone(), tools.join("usr/bin")])
        .map(|folder| folder.join("promtool"))
        .find(|file| file.is_file())
        .unwrap_or_else(|| {
            panic!(
                "no promtool in PATH or {}: run `cargo xtask setup`, which fetches it",
                tools.display()
            )
        })
}

/// The page as a client that accepts `accept` gets it, with its type.
fn page(node: &Node, accept: &str) -> (String, String) {
    let mut curl = node.machine().netns().command("curl");
    curl.args(["-sf", "-w", "\n%{content_type}", "-H"]);
    curl.arg(format!("Accept: {accept}"));
    let output = curl.arg("http://127.0.0.1:9660/metrics").output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    let (page, kind) = text.rsplit_once('\n').unwrap();
    (page.to_owned(), kind.to_owned())
}

fn probe(node: &Node, path: &str) -> (String, String) {
    let mut curl = node.machine().netns().command("curl");
    curl.args(["-s", "-w", "\n%{http_code}"]);
    let output = curl.arg(format!("http://127.0.0.1:9660{path}")).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    let (said, code) = text.rsplit_once('\n').unwrap();
    (code.to_owned(), said.trim().to_owned())
}

/// The value of the sample whose line begins with this.
fn sample(node: &Node, begins: &str) -> f64 {
    let page = node.metrics().unwrap();
    let line = page.lines().find(|l| l.starts_with(begins));
    let line = line.unwrap_or_else(|| panic!("no {begins} in\n{page}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Has `promtool check metrics` read the page; it must find nothing wrong. Returns how many samples there are.
fn checked(node: &Node) -> usize {
    let (text, kind) = page(node, "text/plain");
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let mut checker = Command::new(promtool())
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = checker.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    let said = checker.wait_with_output().unwrap();
    let faults = String::from_utf8_lossy(&said.stderr);
    assert!(
        said.status.success() && faults.is_empty(),
        "{faults}\n{text}"
    );
    text.lines().filter(|l| !l.starts_with('#')).count()
}

#[test]
fn promtool_finds_no_fault_with_the_page() {
    let node = Node::start(NodeOptions::named("promtool")).unwrap();
    let samples = checked(&node);
    assert!(samples > 50, "only {samples} samples");
    println!("promtool: 0 faults in {samples} samples");
}

#[test]
fn a_scraper_that_reads_openmetrics_gets_it() {
    let node = Node::start(NodeOptions::named("openmetrics")).unwrap();
    // As Prometheus asks.
    let accept = "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5";
    let (text, kind) = page(&node, accept);
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    assert!(text.ends_with("# EOF\n"), "{text}");
}

#[test]
fn counters_move_with_traffic_and_say_why_packets_were_dropped() {
    let mut shop = Shop::open(NodeOptions::named("counters"), 1, 1).unwrap();
    shop.node.write_manifest("hush.yaml", HUSH).unwrap();
    let quiet = Workload::named("shop", "quiet").port(Transport::Tcp, 80);
    shop.backends.push(shop.node.run_pod(quiet).unwrap());
    let balanced = "weir_socket_translations_total";
    let denied = "weir_drops_total{reason=\"ingress_denied\"}";
    let before = (sample(&shop.node, balanced), sample(&shop.node, denied));
    for _ in 0..10 {
        shop.still_serves().unwrap();
    }
    let address = shop.backends[1].address(Family::V4).unwrap();
    let mut curl = shop.clients[0].command("curl");
    curl.args(["-s", "--max-time", "1", &format!("http://{address}/")]);
    assert!(!curl.status().unwrap().success());
    let after = (sample(&shop.node, balanced), sample(&shop.node, denied));
    assert!(
        after.0 >= before.0 + 10.0,
        "{balanced}: {before:?} {after:?}"
    );
    assert!(after.1 > before.1, "{denied}: {before:?} {after:?}");
    assert_eq!(sample(&shop.node, "weir_pods "), 3.0);
    assert_eq!(sample(&shop.node, "weir_not_ready_reasons "), 0.0);
}

const NOWHERE: &str = "\
apiVersion: v1
kind: Config
current-context: nowhere
clusters: [{name: nowhere, cluster: {server: 'http://127.0.0.1:1'}}]
contexts: [{name: nowhere, context: {cluster: nowhere, user: nobody}}]
users: [{name: nobody, user: {token: none}}]
";

#[test]
fn a_node_that_is_not_ready_says_why_and_is_alive() {
    let mut node = Node::prepare(NodeOptions::named("unready")).unwrap();
    let kubeconfig = node.machine().dir().join("kubeconfig");
    std::fs::write(&kubeconfig, NOWHERE).unwrap();
    node.options.source = Source::Kube {
        kubeconfig,
        api_server: "http://127.0.0.1:1".into(),
    };
    node.start_agent().unwrap();
    let patience = Duration::from_secs(10);
    let log = "weir-agent runs";
    node.agent().unwrap().wait_for_log(log, patience).unwrap();
    let deadline = Instant::now() + patience;
    let why = loop {
        let (code, why) = probe(&node, "/readyz");
        assert_eq!(code, "503", "{why}");
        // Before the first attempt nothing is known to be wrong.
        if why.contains("Connection refused") {
            break why;
        }
        assert!(Instant::now() < deadline, "no cause in {why:?}");
    };
    for kind in ["Service", "EndpointSlice", "Pod", "NetworkPolicy"] {
        let reason = format!("{kind} objects are not synced yet");
        assert!(why.contains(&reason), "{why}");
    }
    assert!(why.contains("--kube-api-server"), "{why}");
    assert_eq!(probe(&node, "/healthz"), ("200".into(), "ok".into()));
    let said = node.weir("status").output().unwrap();
    assert_eq!(said.status.code(), Some(1), "weir status agrees");

    // The same node with a source that answers.
    node.kill_agent().unwrap();
    node.options.source = Source::Manifests;
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    assert_eq!(probe(&node, "/readyz"), ("200".into(), "ok".into()));
}

/// A node with an uplink, and a world behind it that knows nothing of pods.
struct Site {
    // Processes end before the namespaces that they are in.
    _server: Process,
    node: Node,
    world: Netns,
}

const NODE: &str = "198.51.100.2";
const WORLD: [&str; 2] = ["198.51.100.1", "2001:db8:1::1"];
/// Behind the world, which forwards nothing and says nothing.
const BEYOND: &str = "203.0.113.9";
const SERVICE: &str = "10.96.0.20";

const SERVED: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  clusterIP: 10.96.0.20
  selector: {app: web}
  ports:
  - {name: web, port: 80, targetPort: 8080, nodePort: 30080, protocol: TCP}
  - {name: feed, port: 81, targetPort: 8081, nodePort: 30081, protocol: UDP}
";

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

impl Site {
    fn new(name: &str) -> Self {
        let mut node = Node::prepare(NodeOptions::named(name)).unwrap();
        let world = Netns::new("world").unwrap();
        let netns = node.machine().netns();
        let here = End {
            netns,
            device: "eth0",
            addresses: &["198.51.100.2/24", "2001:db8:1::2/64"],
        };
        let there = End {
            netns: &world,
            device: "node",
            addresses: &["198.51.100.1/24", "2001:db8:1::1/64"],
        };
        link(here, there).unwrap();
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
        node.wait_ready().unwrap();
        Self {
            _server: server,
            node,
            world,
        }
    }

    fn pod(&self, name: &str) -> Pod {
        let pod = Workload::named("shop", name)
            .label("app", name)
            .port(Transport::Tcp, 8080)
            .port(Transport::Udp, 8081);
        self.node.run_pod(pod).unwrap()
    }

    /// What the page says of conversations, where that is not 0; by protocol, kind and state. Nothing before the first sweep.
    fn conversations(&self) -> Option<BTreeMap<String, u64>> {
        let page = self.node.metrics().unwrap();
        let lines = page
            .lines()
            .filter_map(|line| line.strip_prefix("weir_conversations{"));
        let samples: Vec<(String, u64)> = lines
            .map(|line| {
                let (labels, count) = line.split_once("} ").unwrap();
                let words: Vec<_> = labels.split('"').skip(1).step_by(2).collect();
                (words.join(" "), count.parse().unwrap())
            })
            .collect();
        let is_swept = !samples.is_empty();
        is_swept.then(|| {
            samples
                .into_iter()
                .filter(|(_, count)| *count > 0)
                .collect()
        })
    }

    /// A pod goes, so that the agent sweeps at once; waits until it counts these.
    fn counts(&self, goes: Vec<Pod>, expected: &[(&str, u64)]) {
        goes.into_iter()
            .for_each(|pod| self.node.delete_pod(pod).unwrap());
        let expected: BTreeMap<_, _> = expected
            .iter()
            .map(|(labels, count)| ((*labels).to_owned(), *count))
            .collect();
        let found = eventually(
            "they are counted",
            4 * PATIENCE,
            || self.conversations(),
            |found| found.as_ref() == Some(&expected),
        );
        found.unwrap_or_else(|error| panic!("{error:#}\nexpected: {expected:?}"));
    }
}

/// So many connections that have asked and were answered. None of our hooks at sockets sees them.
fn open(many: usize, from: &Netns, target: SocketAddr) -> Vec<Conversation> {
    let open = (0..many).map(|_| {
        let mut open = Conversation::open_in(from, target, PATIENCE).unwrap();
        open.ask().unwrap();
        open
    });
    open.collect()
}

/// Sends so many datagrams from one socket, and hears as many answers.
fn stream(many: usize, from: &Netns, target: SocketAddr) {
    let socket = udp_socket(from, any(target), PATIENCE).unwrap();
    socket.connect(target).unwrap();
    (0..many).for_each(|_| drop(exchange(&socket).unwrap()));
}

/// How an attempt to connect ends.
fn fails(from: &Netns, target: SocketAddr) -> ErrorKind {
    let patience = Duration::from_millis(500);
    let attempt = from.run(|| TcpStream::connect_timeout(&target, patience));
    attempt.unwrap().unwrap_err().kind()
}

#[test]
fn conversations_are_counted_as_what_they_are_and_no_more_when_they_have_ended() {
    let site = Site::new("tally");
    let (a, b, web) = (site.pod("a"), site.pod("b"), site.pod("web"));
    let spare: Vec<_> = ["c", "d", "e"].map(|name| site.pod(name)).into();
    let [first, second, third] = <[Pod; 3]>::try_from(spare).unwrap();
    site.node.write_manifest("web.yaml", SERVED).unwrap();
    site.node.wait_for_service("shop/web", 1, PATIENCE).unwrap();
    // Nothing has come to pass but what the node itself has asked.
    site.counts(vec![first], &[]);

    let direct = SocketAddr::new(web.address(Family::V4).unwrap(), 8080);
    let mut held = open(3, a.netns(), direct);
    held.extend(open(4, a.netns(), at(SERVICE, 80)));
    held.extend(open(3, a.netns(), at(WORLD[0], 8080)));
    held.extend(open(2, b.netns(), at(WORLD[0], 8080)));
    held.extend(open(1, a.netns(), at(WORLD[1], 8080)));
    held.extend(open(6, &site.world, at(NODE, 30_080)));
    // By a process of the pod, whose socket is led to the backend itself.
    let mut bash = a.command("bash");
    let script = format!("exec 3<>/dev/tcp/{SERVICE}/80; echo; read -r _");
    bash.args(["-c", &script]).stdin(Stdio::piped());
    let mut by_socket = bash.stdout(Stdio::piped()).spawn().unwrap();
    let mut is_open = [0];
    let mut says = by_socket.stdout.take().unwrap();
    says.read_exact(&mut is_open).unwrap();
    // One whose client has said goodbye, and whose server has not.
    let listener = site.world.run(|| TcpListener::bind((WORLD[0], 0))).unwrap();
    let listener = listener.unwrap();
    let listens = listener.local_addr().unwrap();
    let half = a.netns().run(|| TcpStream::connect(listens));
    let half = half.unwrap().unwrap();
    let (server, _) = listener.accept().unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    // Nobody listens, and nobody hears.
    let refused = fails(a.netns(), at(WORLD[0], 9));
    assert_eq!(refused, ErrorKind::ConnectionRefused);
    assert_eq!(fails(a.netns(), at(BEYOND, 80)), ErrorKind::TimedOut);
    stream(1, a.netns(), SocketAddr::new(direct.ip(), 8081));
    stream(3, b.netns(), at(SERVICE, 81));
    stream(4, &site.world, at(NODE, 30_081));
    let silent = udp_socket(&site.world, at(WORLD[0], 0), PATIENCE).unwrap();
    let asks = udp_socket(b.netns(), at("0.0.0.0", 0), PATIENCE).unwrap();
    asks.send_to(b"who", silent.local_addr().unwrap()).unwrap();
    let pinged: IpAddr = WORLD[0].parse().unwrap();
    assert!(is_echoed(a.netns(), pinged, PATIENCE).unwrap());

    let datagrams = [
        ("udp direct replied", 1),
        ("udp service stream", 1),
        ("udp external stream", 1),
        ("udp masquerade unreplied", 1),
        ("icmp masquerade replied", 1),
    ];
    let never_open = [("tcp masquerade close", 1), ("tcp masquerade syn_sent", 1)];
    let connections = [
        ("tcp direct established", 3 + 1),
        ("tcp service established", 4),
        ("tcp masquerade established", 3 + 2 + 1),
        ("tcp masquerade half_closed", 1),
        ("tcp external established", 6),
    ];
    let all = [&datagrams[..], &never_open, &connections].concat();
    site.counts(vec![second], &all);
    let node = &site.node;
    // Those that leave or come in have their ways at the uplink, too.
    let rows = 2 * (4 + 4) + 4 * (6 + 1 + 6);
    assert_eq!(
        sample(node, "weir_table_rows{table=\"TCP_WAYS\"}"),
        f64::from(rows)
    );
    assert_eq!(sample(node, "weir_table_rows{table=\"TCP_PLANS\"}"), 4.0);
    assert_eq!(sample(node, "weir_connections_evictable "), 0.0);
    assert_eq!(sample(node, "weir_ways_lost_total "), 0.0);
    // Of the connections out, of one half closed, refused, silent; a datagram, and an echo.
    assert_eq!(
        sample(node, "weir_nat_ports_used "),
        f64::from(6 + 1 + 1 + 1 + 1 + 1)
    );
    assert_eq!(sample(node, "weir_nat_ports_peer_max "), 5.0);
    assert_eq!(sample(node, "weir_nat_ports_pod_max "), 3.0);
    assert!(sample(node, "weir_nat_ports_capacity ") >= 8_192.0);
    assert!(sample(node, "weir_sweep_age_seconds ") <= 31.0);
    let nat = node.ask("status").unwrap()["nat"].clone();
    assert_eq!(
        (&nat["used"], &nat["error"]),
        (&11.into(), &0.into()),
        "{nat}"
    );
    let busiest = &nat["peers"][0];
    assert_eq!(busiest["peer"]["address"], WORLD[0], "{nat}");
    assert_eq!(busiest["peer"]["port"], 8080, "{nat}");
    assert_eq!(
        (&busiest["ports"], &busiest["pod_ports"]),
        (&5.into(), &3.into()),
        "{nat}"
    );
    assert_eq!(busiest["pod"], "shop/a", "{nat}");
    let shown = String::from_utf8(node.weir("status").output().unwrap().stdout).unwrap();
    let line = shown
        .lines()
        .find(|line| line.contains("198.51.100.1:8080"));
    assert!(line.is_some_and(|line| line.contains("shop/a")), "{shown}");
    println!("promtool: 0 faults in {} samples", checked(node));

    // They end on both sides, and with that are forgotten.
    drop((held, half, server));
    drop(by_socket.stdin.take());
    by_socket.wait().unwrap();
    site.counts(vec![third], &[&datagrams[..], &never_open].concat());
    // What is known of pods goes with them.
    site.counts(vec![a, b, web], &[]);
    for name in [
        "weir_nat_ports_used ",
        "weir_nat_ports_peer_max ",
        "weir_nat_ports_pod_max ",
    ] {
        assert_eq!(sample(&site.node, name), 0.0, "{name}");
    }
}
