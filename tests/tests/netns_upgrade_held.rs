//! Conversations that are held while the last agent before "ways" (8ae8392) gives its place to ours: translated packet by
//! packet in every way that there is, and direct ones. What is opened meanwhile is `netns_upgrade`'s.
//!
//! Seen failing: `Line::take_over` without `adopt_conversations`; `PASSED` and `FORMER` of `common/src/node.rs` with each
//! other's bits (pods' addresses leave); `settle` without the exception for `adopt::is_of` (the killed agent); `adopt`
//! without `is_translated_back`, and 50 ms before the pods' hooks (the killed agent: what begins there ends);
//! `place_net_hooks` in the other order with 300 ms between the two (answers of a pod elsewhere leave untranslated). With
//! 300 ms between all steps of a take-over as they are, nothing was lost.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use weir_tests::lan::Pair;
use weir_tests::machine::Machine;
use weir_tests::netns::Netns;
use weir_tests::node::{Family, Node, Pod, binary};
use weir_tests::not_run::not_run;
use weir_tests::process::Process;
use weir_tests::traffic::{Conversation, PATIENCE, any, eventually, exchange, udp_socket};
use weir_tests::workloads::{Transport, Workload};

const WORLD: &str = "10.210.0.200";
const HERE: &str = "10.96.0.31";
const ALIKE: &str = "10.96.0.32";
const THERE: &str = "10.96.0.33";
const FEED: &str = "10.96.0.34";
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(3);
/// Longer than anything that is sent again.
const LONG: Duration = Duration::from_secs(5);

fn service(name: &str, ip: &str, role: Option<&str>, node_port: u16) -> String {
    let selector = role.map(|role| format!("  selector: {{role: {role}}}\n"));
    let selector = selector.unwrap_or_default();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  type: NodePort\n  \
         clusterIP: {ip}\n{selector}  ports:\n  \
         - {{name: web, port: 80, targetPort: 8080, nodePort: {node_port}}}\n  \
         - {{name: feed, port: 81, targetPort: 8081, protocol: UDP, nodePort: {}}}\n",
        node_port + 1
    )
}

/// The endpoints of a Service that selects none: pods, each with its conditions.
fn slice<'a>(service: &str, endpoints: impl IntoIterator<Item = (&'a Pod, &'a str)>) -> String {
    let endpoints = endpoints.into_iter().map(|(pod, conditions)| {
        let ip = pod.address(Family::V4).unwrap();
        format!("- {{addresses: ['{ip}'], conditions: {conditions}}}\n")
    });
    let endpoints: String = endpoints.collect();
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {service}-1, namespace: shop, \
         labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\nendpoints:\n{endpoints}ports:\n\
         - {{name: web, port: 8080}}\n- {{name: feed, port: 8081, protocol: UDP}}\n"
    )
}

const READY: &str = "{ready: true}";
const LEAVING: &str = "{ready: false, serving: true, terminating: true}";

const MANIFESTS: &str = "\
kind: Service
apiVersion: v1
metadata: {name: feed, namespace: shop}
spec:
  clusterIP: 10.96.0.34
  ports: [{name: feed, port: 81, targetPort: 8081, protocol: UDP}]
---
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: closed, namespace: shop}
spec:
  podSelector: {matchLabels: {role: closed}}
  policyTypes: [Ingress]
";

/// Two nodes, of which the first has its agent replaced, and a machine that is in no cluster.
struct Site {
    // What runs goes before the wires.
    _world_server: Process,
    client: Pod,
    closed: Pod,
    there: Pod,
    here: Pod,
    feeds: [Pod; 2],
    pair: Pair,
    world: Machine,
}

impl Site {
    fn new(name: &str, former: PathBuf) -> Self {
        let mut pair = Pair::prepare(name).unwrap();
        pair.nodes[0].options.agent = former;
        for place in pair.places.clone() {
            pair.declare(&place).unwrap();
        }
        for node in &mut pair.nodes {
            node.start_agent().unwrap();
            node.start_dns().unwrap();
        }
        for node in &mut pair.nodes {
            node.wait_ready().unwrap();
        }
        let world = Machine::new("world").unwrap();
        pair.lan.plug(&world, &[&format!("{WORLD}/24")]).unwrap();
        // What leaves a node with a pod's address and is not for a pod has no business here.
        nft(
            world.netns(),
            "table ip seen { chain c { type filter hook prerouting priority -300; \
             ip saddr 10.244.0.0/16 counter; }; }",
        );
        let server = ["--name", "world", "--tcp", "8080", "--udp", "8081"];
        let mut world_server = world
            .launch("world-echo", binary("weir-echo"))
            .args(server)
            .spawn()
            .unwrap();
        world_server.wait_for_log("ready", PATIENCE).unwrap();
        for text in [
            ("here.yaml", service("here", HERE, Some("here"), 30_080)),
            ("alike.yaml", service("alike", ALIKE, Some("here"), 30_082)),
            ("there.yaml", service("there", THERE, None, 30_084)),
            ("more.yaml", MANIFESTS.to_owned()),
        ] {
            pair.write_manifest(text.0, &text.1).unwrap();
        }
        let pod = |on, name: &str| {
            let workload = Workload::named("shop", name)
                .label("role", name)
                .port(Transport::Tcp, 8080)
                .port(Transport::Udp, 8081);
            pair.run_pod(on, workload).unwrap()
        };
        let here = pod(0, "here");
        let feeds = [pod(0, "feed-a"), pod(0, "feed-b")];
        let (client, closed, there) = (pod(0, "client"), pod(0, "closed"), pod(1, "there"));
        let of_feed = slice("feed", feeds.iter().zip([READY; 2]));
        pair.write_manifest("feed.yaml", &of_feed).unwrap();
        let of_there = slice("there", [(&there, READY)]);
        pair.write_manifest("there-1.yaml", &of_there).unwrap();
        for (service, backends) in [("here", 1), ("alike", 1), ("there", 1), ("feed", 2)] {
            pair.nodes[0]
                .wait_for_service(&format!("shop/{service}"), backends, PATIENCE)
                .unwrap();
        }
        Self {
            _world_server: world_server,
            client,
            closed,
            there,
            here,
            feeds,
            pair,
            world,
        }
    }

    fn node(&mut self) -> &mut Node {
        &mut self.pair.nodes[0]
    }

    /// Puts our agent in the place of the one that runs.
    fn replace(&mut self, agent: PathBuf) {
        let node = self.node();
        let stopped = node.agent().unwrap().stop(PATIENCE).unwrap();
        assert!(stopped.success(), "{stopped}");
        node.options.agent = agent;
        node.start_agent().unwrap();
        node.wait_ready().unwrap();
        let agent = node.agent().unwrap();
        agent
            .wait_for_log("our programs are on their hooks", PATIENCE)
            .unwrap();
    }

    /// `weir flows` has each connection once, with the service that was asked.
    fn is_listed_once(&self) {
        let node = self.pair.on_node(0, Family::V4, 0).unwrap().ip();
        let here = self.here.address(Family::V4).unwrap();
        let there = self.there.address(Family::V4).unwrap();
        let client = self.client.address(Family::V4).unwrap().to_string();
        let flows = self.pair.nodes[0].ask("flows").unwrap();
        for (source, destination, via) in [
            (&*client, format!("{WORLD}:8080"), None),
            (WORLD, format!("{here}:8080"), Some(format!("{node}:30080"))),
            (WORLD, format!("{here}:8080"), Some(format!("{node}:30082"))),
            (
                WORLD,
                format!("{there}:8080"),
                Some(format!("{node}:30084")),
            ),
            (&client, format!("{here}:8080"), Some(format!("{HERE}:80"))),
            (
                &client,
                format!("{there}:8080"),
                Some(format!("{THERE}:80")),
            ),
            (&client, format!("{there}:8080"), None),
        ] {
            let text = |end: &serde_json::Value| {
                format!("{}:{}", end["address"].as_str().unwrap(), end["port"])
            };
            let rows = flows.as_array().unwrap().iter().filter(|row| {
                text(&row["source"]).starts_with(&format!("{source}:"))
                    && text(&row["destination"]) == destination
                    && row["via"].as_str() == via.as_deref()
                    && row["protocol"] == "TCP"
                    && row["state"] == "open"
            });
            assert_eq!(rows.count(), 1, "{source} {destination} {via:?}: {flows:#}");
        }
    }

    /// One of every kind, each in a thread of its own.
    fn hold(&self) -> Vec<Held> {
        let [one, _] = &self.pair.nodes;
        let (client, node, world) = (
            self.client.netns(),
            one.machine().netns(),
            self.world.netns(),
        );
        let of_node = |port| self.pair.on_node(0, Family::V4, port).unwrap();
        let at = |ip: &str, port| SocketAddr::new(ip.parse().unwrap(), port);
        let pod = |pod: &Pod, port| SocketAddr::new(pod.address(Family::V4).unwrap(), port);
        let tcp: [(&str, &Netns, _); 9] = [
            ("a masqueraded connection", client, at(WORLD, 8080)),
            ("a node port, pod here", world, of_node(30_080)),
            ("another with the same endpoint", world, of_node(30_082)),
            ("a node port, pod elsewhere", world, of_node(30_084)),
            ("a service here", client, at(HERE, 80)),
            ("another with the same endpoint", client, at(ALIKE, 80)),
            ("a service elsewhere", client, at(THERE, 80)),
            ("the node and a closed pod", node, pod(&self.closed, 8080)),
            ("a pod elsewhere", client, pod(&self.there, 8080)),
        ];
        let udp: [(&str, &Netns, _); 4] = [
            ("a masqueraded stream", client, at(WORLD, 8081)),
            ("a stream at a node port, pod here", world, of_node(30_081)),
            (
                "a stream at a node port, pod elsewhere",
                world,
                of_node(30_085),
            ),
            ("a stream of a service", client, at(HERE, 81)),
        ];
        let tcp = tcp
            .into_iter()
            .map(|(name, netns, target)| Held::tcp(name, netns, target));
        let udp = udp
            .into_iter()
            .map(|(name, netns, target)| Held::udp(name, netns, target));
        tcp.chain(udp).chain([self.pour()]).collect()
    }

    /// A stream whose backend is the first of `feed`.
    fn hold_feed(&self) -> Held {
        let target = SocketAddr::new(FEED.parse().unwrap(), 81);
        let sockets = (0..100).map(|_| {
            let socket = udp_socket(self.client.netns(), any(target), LONG).unwrap();
            socket.connect(target).unwrap();
            socket
        });
        let socket = sockets
            .into_iter()
            .find(|socket| exchange(socket).unwrap() == "feed-a");
        let socket = socket.expect("one of two backends is never chosen");
        let name = "a stream whose backend ends (UDP)".to_owned();
        Held::spawn(name, PAUSE, move || exchange(&socket))
    }

    /// Datagrams of one socket to the world, as many as the machine makes: nobody answers, and the moment in which
    /// programs of both agents are there is short.
    fn pour(&self) -> Held {
        let target = SocketAddr::new(WORLD.parse().unwrap(), 9);
        let socket = udp_socket(self.client.netns(), any(target), PATIENCE).unwrap();
        Held::spawn("a flood (UDP)".to_owned(), Duration::ZERO, move || {
            socket.send_to(b"one of many", target)?;
            Ok(String::new())
        })
    }

    /// Packets that a pod has sent and that have left the cluster with its address.
    fn escaped(&self) -> u64 {
        let listed = self
            .world
            .netns()
            .command("nft")
            .args(["list", "table", "ip", "seen"])
            .output();
        let text = String::from_utf8(listed.unwrap().stdout).unwrap();
        let mut words = text
            .split_whitespace()
            .skip_while(|word| *word != "packets");
        words.nth(1).unwrap().parse().unwrap()
    }
}

fn nft(netns: &Netns, rules: &str) {
    let status = netns.command("nft").arg(rules).status().unwrap();
    assert!(status.success());
}

/// A conversation that says something every few milliseconds until it is told to stop.
struct Held {
    name: String,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Tally>,
}

#[derive(Debug, Default)]
struct Tally {
    asked: u64,
    /// What was asked last is never answered: the conversation has ended.
    failure: Option<String>,
    longest: Duration,
    /// Who has answered, one after the other.
    by: Vec<String>,
}

impl Held {
    fn tcp(name: &str, netns: &Netns, target: SocketAddr) -> Self {
        let mut open = Conversation::open_in(netns, target, LONG)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        Self::spawn(format!("{name} (TCP)"), PAUSE, move || open.ask())
    }

    fn udp(name: &str, netns: &Netns, target: SocketAddr) -> Self {
        let socket: UdpSocket = udp_socket(netns, any(target), Duration::from_secs(1)).unwrap();
        socket.connect(target).unwrap();
        Self::spawn(format!("{name} (UDP)"), PAUSE, move || exchange(&socket))
    }

    fn spawn(
        name: String,
        pause: Duration,
        mut ask: impl FnMut() -> std::io::Result<String> + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = thread::spawn(move || {
            let mut tally = Tally::default();
            while !told.load(Relaxed) {
                let began = Instant::now();
                match ask() {
                    Ok(by) => {
                        if tally.by.last() != Some(&by) {
                            tally.by.push(by);
                        }
                    }
                    Err(error) => {
                        tally.failure = Some(format!("question {}: {error}", tally.asked));
                        break;
                    }
                }
                tally.asked += 1;
                tally.longest = tally.longest.max(began.elapsed());
                thread::sleep(pause);
            }
            tally
        });
        Self { name, stop, thread }
    }

    fn finish(self) -> (String, Tally) {
        self.stop.store(true, Relaxed);
        (self.name, self.thread.join().unwrap())
    }
}

/// Those that have ended before they were told to.
fn lost_of(held: Vec<Held>) -> Vec<String> {
    let mut lost = Vec::new();
    for it in held {
        let (name, tally) = it.finish();
        println!("{name}: {tally:?}");
        if tally.failure.is_some() || tally.asked < 200 {
            lost.push(name);
        }
    }
    lost
}

fn former(test: &str) -> Option<PathBuf> {
    let former = binary("weir-agent-unwayed");
    if !former.exists() {
        not_run(
            test,
            &"there is no weir-agent-unwayed; `cargo xtask build` makes it of the history",
        );
        return None;
    }
    Some(former)
}

#[test]
fn what_is_held_goes_on_while_our_agent_takes_over_from_the_last_without_ways() {
    let test = "what_is_held_goes_on_while_our_agent_takes_over_from_the_last_without_ways";
    let Some(former) = former(test) else { return };
    let mut site = Site::new("held", former);
    let mut held = site.hold();
    held.push(site.hold_feed());
    thread::sleep(Duration::from_millis(500));
    // A backend that is on its way out gets no datagram any more, of either agent.
    let leaving = slice("feed", site.feeds.iter().zip([LEAVING, READY]));
    site.pair.write_manifest("feed.yaml", &leaving).unwrap();
    thread::sleep(Duration::from_secs(1));
    site.replace(binary("weir-agent"));
    thread::sleep(Duration::from_secs(2));
    site.is_listed_once();
    assert_eq!(lost_of(held), [""; 0]);
    assert_eq!(site.escaped(), 0, "packets left with a pod's address");
}

#[test]
fn an_agent_that_is_killed_while_it_takes_over_is_finished_by_the_next() {
    let test = "an_agent_that_is_killed_while_it_takes_over_is_finished_by_the_next";
    let Some(former) = former(test) else { return };
    let mut site = Site::new("halfway", former);
    let mut held = site.hold();
    let at = site.pair.on_node(0, Family::V4, 30_080).unwrap();
    let Site { pair, world, .. } = &mut site;
    let node = &mut pair.nodes[0];
    let stopped = node.agent().unwrap().stop(PATIENCE).unwrap();
    assert!(stopped.success(), "{stopped}");
    node.options.agent = binary("weir-agent");
    let log = node.machine().dir().join("agent.log");
    let mut kills = 0;
    for pause in (0..60).step_by(4) {
        // What an agent before it has said must not be taken for its own words.
        std::fs::remove_file(&log).unwrap();
        node.start_agent().unwrap();
        let began = "conversations of an earlier agent's programs are ours";
        let agent = node.agent().unwrap();
        // Namespaces of other tests go meanwhile, and hold the kernel's one lock of all network devices for seconds.
        agent.wait_for_log(began, 4 * LONG).unwrap();
        thread::sleep(Duration::from_millis(pause));
        node.kill_agent().unwrap();
        let said = std::fs::read_to_string(&log).unwrap();
        if said.contains("our programs are on their hooks") {
            break;
        }
        kills += 1;
        // What stands there may be of both. Not every mixture lets anything begin; what begins goes on.
        if let Ok(mut open) = Conversation::open_in(world.netns(), at, PAUSE * 100)
            && open.ask().is_ok()
        {
            let name = format!("begun after {kills} kills (TCP)");
            held.push(Held::spawn(name, PAUSE, move || open.ask()));
        }
    }
    println!("{kills} were killed before they had ended");
    assert!(kills > 0);
    assert!(held.iter().any(|it| it.name.starts_with("begun")));
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(lost_of(held), [""; 0]);
    assert_eq!(site.escaped(), 0, "packets left with a pod's address");
    // And it ends at some time.
    let folder = site.node().machine().bpffs().path().join("weir");
    let is_left = || folder.join("FLOWS_v2").exists();
    eventually("the former tables are gone", 2 * LONG, is_left, |left| {
        !left
    })
    .unwrap();
}

/// Who comes back does not know our tables, and its own are empty.
#[test]
fn an_agent_that_comes_back_keeps_what_goes_as_it_is_and_opens_everything_anew() {
    let test = "an_agent_that_comes_back_keeps_what_goes_as_it_is_and_opens_everything_anew";
    let Some(former) = former(test) else { return };
    let mut site = Site::new("return", binary("weir-agent"));
    let held = site.hold();
    thread::sleep(Duration::from_secs(1));
    site.replace(former);
    thread::sleep(Duration::from_secs(1));
    let anew = site.hold();
    thread::sleep(Duration::from_secs(2));
    let lost = lost_of(held);
    println!("ended: {lost:?}; {} packets escaped", site.escaped());
    for goes_on in ["the node and a closed pod (TCP)", "a pod elsewhere (TCP)"] {
        assert!(!lost.iter().any(|name| name == goes_on), "{goes_on}");
    }
    assert_eq!(lost_of(anew), [""; 0]);
}
