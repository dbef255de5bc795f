//! Ring 4: connected UDP sockets of the node's own processes, whose backend goes. They were translated once, when they were
//! connected.
//!
//! Seen failing: let `Connected::end` (agent/src/kernel/connected.rs) return 0 at once.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use weir_tests::node::{Family, Node, NodeOptions, Pod};
use weir_tests::process::Process;
use weir_tests::traffic::{PATIENCE, any};
use weir_tests::workloads::{Transport, Workload};

const V4: &str = "10.96.0.80";
const V6: &str = "fd00:10:96::80";
const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: clock, namespace: shop}\n\
     spec:\n  clusterIPs: ['10.96.0.80', 'fd00:10:96::80']\n  \
     ipFamilyPolicy: RequireDualStack\n  selector: {role: clock}\n  ports:\n  \
     - {port: 80, targetPort: 8081, protocol: UDP}\n";
/// How long a socket may stay: the agent sees the manifest, and looks at sockets every second.
const SOON: Duration = Duration::from_secs(4);
/// And then again after a second, for those that were connected meanwhile.
const AGAIN: Duration = Duration::from_millis(2500);

fn clock(name: &str) -> Workload {
    Workload::named("shop", name)
        .label("role", "clock")
        .port(Transport::Udp, 8081)
}

/// A process of the node with a connected socket, which asks all the time.
struct Asker {
    process: Process,
    target: SocketAddr,
}

impl Asker {
    fn start(node: &Node, name: &str, target: SocketAddr) -> Self {
        let program = weir_tests::node::binary("weir-datagrams");
        let mut launch = node.machine().launch(name, program).arg("--connect");
        launch = launch.args(["--from", &any(target).to_string()]);
        let process = launch
            .args(["--count", "5000", "--target", &target.to_string()])
            .spawn()
            .unwrap();
        Self { process, target }
    }

    /// Waits until it is answered by this one.
    fn wait_for(&mut self, by: &str, within: Duration) {
        let said = format!(" {by} {}\n", self.target);
        self.process.wait_for_log(&said, within).unwrap();
    }

    fn errors(&self) -> usize {
        let log = self.process.log();
        let of = |line: &&str| line.split(' ').nth(1) == Some("error");
        log.lines().filter(of).count()
    }

    /// The name of who answers now.
    fn now(&self) -> String {
        let from = self.process.log().len();
        let start = Instant::now();
        loop {
            let log = self.process.log();
            let lines = log[from..].split_inclusive('\n');
            let mut whole = lines.filter(|line| line.ends_with('\n')).skip(1);
            if let Some(line) = whole.next() {
                return line.split(' ').nth(1).unwrap().to_owned();
            }
            assert!(start.elapsed() < PATIENCE, "silence: {log}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Sockets that were connected to the Service, and sockets that were connected to its first pod itself: of IPv4, of IPv6, and of IPv6
/// to an IPv4 address.
struct Askers {
    translated: Vec<Asker>,
    straight: Vec<Asker>,
}

impl Askers {
    fn start(node: &Node, pod: &Pod) -> Self {
        let mapped = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
            IpAddr::V6(_) => ip,
        };
        let [v4, v6]: [IpAddr; 2] = [V4, V6].map(|it| it.parse().unwrap());
        let start = |(name, ip, port): (&str, IpAddr, u16)| {
            Asker::start(node, name, SocketAddr::new(ip, port))
        };
        let services = [("v4", v4, 80), ("v6", v6, 80), ("mapped", mapped(v4), 80)];
        let [v4, v6] = [Family::V4, Family::V6].map(|it| pod.address(it).unwrap());
        let pods = [
            ("v4-itself", v4, 8081),
            ("v6-itself", v6, 8081),
            ("mapped-itself", mapped(v4), 8081),
        ];
        let mut started = Self {
            translated: services.map(start).into(),
            straight: pods.map(start).into(),
        };
        for asker in started.translated.iter_mut().chain(&mut started.straight) {
            asker.wait_for("clock-a", PATIENCE);
        }
        started
    }

    /// Each has heard of the end of its connection once and has gone on to the other one, for good, and those that asked for
    /// the pod itself have it still.
    fn assert_moved(&mut self) {
        for asker in &mut self.translated {
            asker.wait_for("clock-b", SOON);
        }
        std::thread::sleep(AGAIN);
        for asker in &self.translated {
            let log = asker.process.log();
            // Who sends hears first that the socket has no peer, and only then why.
            let aborted = log.matches("abort").count();
            assert_eq!(aborted, 1, "{}: {log}", asker.target);
            assert!(asker.errors() <= 2, "{}: {log}", asker.target);
            // An answer that had come before the end is still read, after the error.
            let after = log.split_once(" error ").unwrap().1;
            let mut after = after.lines().skip(2);
            let is_back = after.any(|line| line.contains("clock-a"));
            assert!(!is_back, "{}: {log}", asker.target);
            assert_eq!(asker.now(), "clock-b", "{}", asker.target);
        }
        for asker in &self.straight {
            assert_eq!(asker.errors(), 0, "{}", asker.target);
            assert_eq!(asker.now(), "clock-a", "{}", asker.target);
        }
    }
}

/// A node with the Service and a pod of it, those who ask, and then another pod of it.
fn shop(name: &str) -> (Node, Askers, [Pod; 2]) {
    let node = Node::start(NodeOptions::named(name)).unwrap();
    node.write_manifest("clock.yaml", SERVICE).unwrap();
    let a = node.run_pod(clock("clock-a")).unwrap();
    node.wait_for_service("shop/clock", 1, PATIENCE).unwrap();
    let askers = Askers::start(&node, &a);
    let b = node.run_pod(clock("clock-b")).unwrap();
    node.wait_for_service("shop/clock", 2, PATIENCE).unwrap();
    (node, askers, [a, b])
}

/// Its object goes and its server stays: what is sent to it is answered.
fn remove(node: &Node, pod: &str) -> PathBuf {
    let manifest = node.manifests().join(format!("pods/shop.{pod}.yaml"));
    let away = node.machine().dir().join(pod);
    std::fs::rename(manifest, &away).unwrap();
    away
}

#[test]
fn a_connected_socket_of_the_node_leaves_a_backend_that_goes_and_one_connected_to_the_pod_stays() {
    let (node, mut askers, _pods) = shop("leaves");
    // While the backend is there nobody is disturbed.
    for asker in &askers.translated {
        assert_eq!((asker.errors(), asker.now()), (0, "clock-a".into()));
    }
    remove(&node, "clock-a");
    askers.assert_moved();
}

#[test]
fn a_backend_that_went_while_no_agent_ran_is_left_at_the_start() {
    let (mut node, mut askers, _pods) = shop("meanwhile");
    node.kill_agent().unwrap();
    remove(&node, "clock-a");
    std::thread::sleep(Duration::from_millis(500));
    for asker in &askers.translated {
        assert_eq!((asker.errors(), asker.now()), (0, "clock-a".into()));
    }
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    askers.assert_moved();
}

#[test]
fn a_start_ends_no_socket_whose_backend_is_there() {
    let (mut node, askers, _pods) = shop("still");
    node.kill_agent().unwrap();
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    std::thread::sleep(AGAIN);
    for asker in askers.translated.iter().chain(&askers.straight) {
        assert_eq!((asker.errors(), asker.now()), (0, "clock-a".into()));
    }
}
