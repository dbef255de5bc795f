//! Ring 4: a pod that sends before it has a network gets nothing past a policy that denies it, and a pod
//! whose program somebody removed is closed. With `broken-open-first` (`agent/Cargo.toml`) the first
//! was seen failing: of 1,505,046 datagrams of 1,000 starts 211,141 arrived.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use weir_tests::node::{Family, Node, NodeOptions, Pod};
use weir_tests::traffic::{PATIENCE, SILENCE, any, drops, eventually, udp_socket};
use weir_tests::workloads::Workload;

/// Pods that are started one after the other in each namespace, and such namespaces.
const STARTS: u64 = 250;
const NAMESPACES: usize = 4;
/// What each start sends at least, after its network is there.
const SENT: u64 = 20;
const SINK: u16 = 9;

const MUTED: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: muted, namespace: muted}
spec: {podSelector: {}, policyTypes: [Egress]}
";

/// Counts what arrives, by the first byte of each datagram.
struct Sink {
    sockets: Vec<UdpSocket>,
    counts: [AtomicU64; 256],
    stop: AtomicBool,
}

impl Sink {
    fn open(pod: &Pod) -> Self {
        let sockets = [Family::V4, Family::V6].map(|family| {
            let local = SocketAddr::new(pod.address(family).unwrap(), SINK);
            udp_socket(pod.netns(), local, Duration::from_millis(20)).unwrap()
        });
        Self {
            sockets: sockets.into(),
            counts: [const { AtomicU64::new(0) }; 256],
            stop: AtomicBool::new(false),
        }
    }

    /// Until it is stopped and nothing more comes.
    fn count(&self, socket: &UdpSocket) {
        let mut buffer = [0; 16];
        loop {
            match socket.recv(&mut buffer) {
                Ok(_) => drop(self.counts[usize::from(buffer[0])].fetch_add(1, Ordering::Relaxed)),
                Err(_) if self.stop.load(Ordering::Relaxed) => return,
                Err(_) => {}
            }
        }
    }

    fn received(&self, mark: u8) -> u64 {
        self.counts[usize::from(mark)].load(Ordering::Relaxed)
    }
}

const MUTED_MARK: u8 = b'm';
const FREE_MARK: u8 = b'f';

/// Sends every few dozen microseconds until so many were taken by the kernel after `is_up`, from before there is any
/// address. Returns how many it took in all.
fn send_from_the_start(sockets: &[(UdpSocket, SocketAddr)], mark: u8, is_up: &AtomicBool) -> u64 {
    let (mut sent, mut after) = (0, 0);
    let deadline = Instant::now() + Duration::from_secs(5);
    while after < SENT && Instant::now() < deadline {
        for (socket, target) in sockets {
            let was_up = is_up.load(Ordering::Relaxed);
            if socket.send_to(&[mark], target).is_ok() {
                sent += 1;
                after += u64::from(was_up);
            }
        }
        // There are few cores, and the agent needs one.
        std::thread::sleep(Duration::from_micros(20));
    }
    assert!(after >= SENT, "the pod's network came: {after} sent");
    sent
}

/// So many starts of one pod, each with the sender first, then its object, ADD and DEL. Returns how many
/// datagrams the pod's kernel took.
fn starts(node: &Node, mut pod: Pod, targets: [SocketAddr; 2], mark: u8, count: u64) -> u64 {
    let manifest = node.manifests().join(format!(
        "pods/{}.{}.yaml",
        pod.workload.namespace, pod.workload.name
    ));
    let aside = node.machine().dir().join(&pod.container_id);
    let mut sent = 0;
    for n in 0..count {
        // Every second start the node hears of the pod only now.
        let is_news = n % 2 == 0;
        if is_news {
            fs::rename(&manifest, &aside).unwrap();
        }
        let sockets: Vec<_> = targets
            .iter()
            .map(|target| {
                (
                    udp_socket(pod.netns(), any(*target), SILENCE).unwrap(),
                    *target,
                )
            })
            .collect();
        let is_up = AtomicBool::new(false);
        sent += std::thread::scope(|scope| {
            let sender = scope.spawn(|| send_from_the_start(&sockets, mark, &is_up));
            if is_news {
                fs::rename(&aside, &manifest).unwrap();
            }
            let added = node.add_pod(&mut pod);
            is_up.store(true, Ordering::Relaxed);
            let sent = sender.join().unwrap();
            added.unwrap();
            sent
        });
        let env = pod.cni_env();
        let env: Vec<_> = env.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let released = node.cni("DEL", &env, &node.cni_config("1.1.0")).unwrap();
        assert!(released.status.success(), "{released:?}");
    }
    sent
}

#[test]
fn the_first_packets_of_1000_pods_meet_their_policy() {
    let node = Node::start(NodeOptions::named("first")).unwrap();
    node.write_manifest("muted.yaml", MUTED).unwrap();
    let sink_pod = node.run_pod(Workload::named("sink", "sink")).unwrap();
    let targets = [Family::V4, Family::V6]
        .map(|family| SocketAddr::new(sink_pod.address(family).unwrap(), SINK));
    let muted: Vec<Pod> = (0..NAMESPACES)
        .map(|n| {
            let workload = Workload::named("muted", &format!("m{n}"));
            node.declare_pod(workload).unwrap()
        })
        .collect();
    let free = node.declare_pod(Workload::named("free", "f")).unwrap();
    let sink = Sink::open(&sink_pod);
    let denied_before = drops(&node, "egress_denied").unwrap();

    let (sent, sent_freely) = std::thread::scope(|scope| {
        for socket in &sink.sockets {
            scope.spawn(|| sink.count(socket));
        }
        let (node, sink) = (&node, &sink);
        let running: Vec<_> = muted
            .into_iter()
            .map(|pod| scope.spawn(move || starts(node, pod, targets, MUTED_MARK, STARTS)))
            .collect();
        let sent: u64 = running.into_iter().map(|r| r.join().unwrap()).sum();
        // The instrument measures: without the policy the same packets arrive.
        let sent_freely = starts(node, free, targets, FREE_MARK, 10);
        eventually(
            "what was sent freely arrives",
            PATIENCE,
            || sink.received(FREE_MARK),
            |n| *n >= 10 * SENT,
        )
        .unwrap();
        sink.stop.store(true, Ordering::Relaxed);
        (sent, sent_freely)
    });
    let denied = drops(&node, "egress_denied").unwrap() - denied_before;
    let leaked = sink.received(MUTED_MARK);
    println!(
        "{} starts: {leaked} of {sent} datagrams arrived, {denied} dropped as egress_denied; \
         without the policy {} of {sent_freely}",
        STARTS * NAMESPACES as u64,
        sink.received(FREE_MARK),
    );
    assert_eq!(leaked, 0, "of {sent}");
    assert!(sent >= STARTS * NAMESPACES as u64 * SENT);
}

/// The second lock: netfilter drops what a pod's device brings without the mark of our program.
#[test]
fn a_pod_whose_program_is_removed_is_closed_and_repaired() {
    let mut node = Node::start(NodeOptions::named("lock")).unwrap();
    let sink_pod = node.run_pod(Workload::named("sink", "sink")).unwrap();
    let pod = node.run_pod(Workload::named("free", "free")).unwrap();
    let sink = Sink::open(&sink_pod);
    const BURST: u64 = 200;
    for (family, mark) in [(Family::V4, 4), (Family::V6, 6)] {
        let to: IpAddr = sink_pod.address(family).unwrap();
        let target = SocketAddr::new(to, SINK);
        let socket = udp_socket(pod.netns(), any(target), SILENCE).unwrap();
        let burst = |mark| {
            for _ in 0..BURST {
                socket.send_to(&[mark], target).unwrap();
            }
        };
        std::thread::scope(|scope| {
            for socket in &sink.sockets {
                scope.spawn(|| sink.count(socket));
            }
            let check = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                burst(mark);
                let arrived = || sink.received(mark);
                eventually("before, all arrive", PATIENCE, arrived, |n| *n == BURST).unwrap();

                // The agent sleeps, so that nobody puts the program back.
                node.agent().unwrap().signal(Signal::SIGSTOP).unwrap();
                let netns = node.machine().netns();
                let mut removed = 0;
                let devices = netns.ip("-br link show type veth").unwrap();
                for line in devices.lines() {
                    let device = line.split(['@', ' ']).next().unwrap();
                    let mut tc = netns.command("tc");
                    let gone = tc.args(["qdisc", "del", "dev", device, "clsact"]).status();
                    assert!(gone.unwrap().success(), "{device}");
                    removed += 1;
                }
                assert_eq!(removed, 2, "one for each pod");
                burst(mark + 100);
                // What would come has come: a datagram between two pods takes microseconds.
                std::thread::sleep(SILENCE);
                let leaked = sink.received(mark + 100);
                println!("{family:?}: {leaked} of {BURST} passed without our program");
                assert_eq!(leaked, 0, "of {BURST}");

                node.agent().unwrap().signal(Signal::SIGCONT).unwrap();
                let again = || {
                    socket.send_to(&[mark + 200], target).unwrap();
                    sink.received(mark + 200)
                };
                eventually(
                    "the agent puts it back",
                    Duration::from_secs(8),
                    again,
                    |n| *n > 0,
                )
                .unwrap();
            }));
            sink.stop.store(true, Ordering::Relaxed);
            if let Err(panic) = check {
                std::panic::resume_unwind(panic);
            }
        });
        sink.stop.store(false, Ordering::Relaxed);
    }
}
