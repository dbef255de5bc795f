//! Ring 4: a pod whose kernel has no neighbour entry for its gateway, as one of its own inside (a virtual machine) has none,
//! asks for it, and is answered; nobody else is.
//!
//! Seen failing: `weir_pod_drop` of `ebpf/src/neighbours.rs` without its question to `weir_neighbour`; `requests` of
//! `datapath/src/neighbour.rs` without its last line, which answers for everybody.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use weir_tests::node::{Family, Node, NodeOptions, Pod};
use weir_tests::traffic::{PATIENCE, SILENCE, drops, eventually, is_echoed, udp_socket};
use weir_tests::workloads::Workload;

/// A family, how `ip` and the kernel call it, the gateway, and an address of the node.
struct Side {
    family: Family,
    option: &'static str,
    folder: &'static str,
    gateway: &'static str,
    node: &'static str,
    /// Somebody who is not there, and an address that the pod has not been given; the reason for which questions of either are
    /// dropped.
    stranger: &'static str,
    stolen: &'static str,
    nodad: &'static str,
    reason: &'static str,
}

const SIDES: [Side; 2] = [
    Side {
        family: Family::V4,
        option: "-4",
        folder: "ipv4",
        gateway: "169.254.1.1",
        node: "192.0.2.1",
        stranger: "10.9.9.9",
        stolen: "10.9.9.8/32",
        nodad: "",
        reason: "not_ip",
    },
    Side {
        family: Family::V6,
        option: "-6",
        folder: "ipv6",
        gateway: "fe80::1",
        node: "2001:db8::1",
        stranger: "fd00:9::9",
        stolen: "fd00:9::8/128",
        nodad: "nodad",
        reason: "martian",
    },
];

impl Side {
    /// What the pod's kernel says of a neighbour: its Ethernet address, if it knows it, and the state of the entry.
    fn entry(&self, pod: &Pod, address: &str) -> (Option<String>, String) {
        let words = format!("{} neigh show {address} dev eth0", self.option);
        let shown = pod.netns().ip(&words).unwrap();
        let words: Vec<&str> = shown.split_whitespace().collect();
        let mut after = words.iter().skip_while(|word| **word != "lladdr");
        let mac = after.nth(1).map(ToString::to_string);
        (mac, words.last().copied().unwrap_or("NONE").to_owned())
    }

    fn forget(&self, pod: &Pod) {
        let words = format!("{} neigh del {} dev eth0", self.option, self.gateway);
        pod.netns().ip(&words).unwrap();
    }

    fn is_reached(&self, pod: &Pod) -> bool {
        is_echoed(pod.netns(), self.node.parse().unwrap(), PATIENCE).unwrap()
    }
}

#[test]
fn a_pod_that_asks_for_its_gateway_is_answered_and_for_nobody_else() {
    let node = Node::start(NodeOptions::named("asks")).unwrap();
    let pod = node.run_pod(Workload::named("shop", "own")).unwrap();
    let listed = node.machine().netns().ip("-o link").unwrap();
    let of_host = listed.lines().find(|it| it.contains(" weir")).unwrap();
    let mut words = of_host
        .split_whitespace()
        .skip_while(|it| *it != "link/ether");
    let host = words.nth(1).unwrap().to_owned();
    for side in &SIDES {
        let known = |state: &str| (Some(host.clone()), state.to_owned());
        assert_eq!(side.entry(&pod, side.gateway), known("PERMANENT"));
        for (key, value) in [
            ("base_reachable_time_ms", "2000"),
            ("delay_first_probe_time", "1"),
            ("retrans_time_ms", "100"),
        ] {
            let key = format!("net.{}.neigh.eth0.{key}", side.folder);
            pod.netns().set_sysctl(&key, value).unwrap();
        }
        side.forget(&pod);
        assert!(side.is_reached(&pod), "{:?}", side.family);
        assert_eq!(side.entry(&pod, side.gateway), known("REACHABLE"));

        // An entry that is old is asked for again, the gateway itself now. Who is silent is forgotten after a second.
        let state = || side.entry(&pod, side.gateway).1;
        eventually("it is old", 4 * PATIENCE, state, |it| it == "STALE").unwrap();
        assert!(side.is_reached(&pod), "{:?}", side.family);
        assert_eq!(state(), "DELAY");
        let states = || {
            std::thread::sleep(Duration::from_millis(10));
            state()
        };
        let is_probed = |it: &String| it != "DELAY" && it != "PROBE";
        let said = eventually("it is asked for", 2 * PATIENCE, states, is_probed).unwrap();
        match side.family {
            // By a question to the gateway alone.
            Family::V4 => {
                assert!(said == "REACHABLE" || said == "STALE", "{said}");
                assert_eq!(drops(&node, side.reason).unwrap(), 0);
            }
            // Linux asks such a question with an address of the link, of which the pod has none, and the next packet asks all.
            Family::V6 => {
                assert_eq!(said, "FAILED");
                assert!(side.is_reached(&pod));
                assert_eq!(side.entry(&pod, side.gateway), known("REACHABLE"));
            }
        }

        // Nobody is at another address, and nobody else may ask.
        let before = drops(&node, side.reason).unwrap();
        for words in [
            format!("route add {} dev eth0", side.stranger),
            format!("addr add {} dev eth0 {}", side.stolen, side.nodad),
        ] {
            pod.netns().ip(&format!("{} {words}", side.option)).unwrap();
        }
        let stranger: IpAddr = side.stranger.parse().unwrap();
        assert!(!is_echoed(pod.netns(), stranger, SILENCE).unwrap());
        let lost = || side.entry(&pod, side.stranger);
        eventually("nobody answers", 2 * PATIENCE, lost, |it| {
            *it == (None, "FAILED".into())
        })
        .unwrap();
        side.forget(&pod);
        let stolen = side.stolen.split('/').next().unwrap();
        let stolen = SocketAddr::new(stolen.parse().unwrap(), 0);
        let socket = udp_socket(pod.netns(), stolen, PATIENCE).unwrap();
        socket
            .send_to(b"who", SocketAddr::new(side.node.parse().unwrap(), 9))
            .unwrap();
        let lost = || side.entry(&pod, side.gateway);
        eventually("it is not answered", 2 * PATIENCE, lost, |it| {
            *it == (None, "FAILED".into())
        })
        .unwrap();
        let words = format!("{} addr del {} dev eth0", side.option, side.stolen);
        pod.netns().ip(&words).unwrap();
        let asked = drops(&node, side.reason).unwrap() - before;
        assert!(asked >= 6, "{asked}: three questions each");
        assert!(side.is_reached(&pod), "{:?}: as before", side.family);
    }
}
