//! Ring 4: `ipBlock` and named ports of egress rules, between pods of two nodes, the nodes and a machine outside, in both families. A
//! block means the address, whosever it is (Kubernetes API, `IPBlock`; the specs "should … in CIDR block" of sig-network).

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use weir_tests::lan::{Pair, Place};
use weir_tests::machine::Machine;
use weir_tests::netns::Netns;
use weir_tests::node::{Family, Node, NodeOptions, Pod, binary};
use weir_tests::process::Process;
use weir_tests::traffic::{Answer, SILENCE, ask_tcp, ask_udp, eventually};
use weir_tests::workloads::{Transport, Workload};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const PORT: u16 = 8081;
/// Of the machines outside.
const WORLD: [[&str; 2]; 2] = [
    ["10.210.0.200", "fd00:210::200"],
    ["10.210.0.201", "fd00:210::201"],
];
/// How long a change of a manifest may take until packets meet it.
const SOON: Duration = Duration::from_secs(1);

fn of(family: Family, both: [&str; 2]) -> IpAddr {
    both[usize::from(family == Family::V6)].parse().unwrap()
}

/// A pod, and whoever else there is; each answers, and may ask.
struct Site {
    pod: Pod,
    near: Pod,
    far: Pod,
    world: [Machine; 2],
    pair: Pair,
    _echoes: [Process; 4],
}

/// Who is asked, or asks, in this order, with a letter for each.
const OTHERS: [(&str, char); 6] = [
    ("a pod of the same node", 'n'),
    ("a pod of the other node", 'f'),
    ("the same node", 's'),
    ("the other node", 'o'),
    ("outside", 'a'),
    ("another one outside", 'b'),
];

impl Site {
    fn start() -> Self {
        let pair = Pair::start("blocks").unwrap();
        let place = &pair.places[0];
        let outside = |[v4, v6]: [&str; 2]| {
            let world = Machine::new("world").unwrap();
            let addresses = [format!("{v4}/24"), format!("{v6}/64")];
            let addresses = addresses.each_ref().map(String::as_str);
            pair.lan.plug(&world, &addresses).unwrap();
            for (family, range) in FAMILIES.into_iter().zip(&place.pod_cidrs) {
                let words = if family == Family::V6 { "-6 " } else { "" };
                let via = place.address(family).unwrap();
                let route = format!("{words}route add {range} via {via}");
                world.netns().ip(&route).unwrap();
            }
            let mut echo = world
                .launch("echo", binary("weir-echo"))
                .args(["--name", "world", "--tcp", &PORT.to_string()])
                .spawn()
                .unwrap();
            echo.wait_for_log("ready", Duration::from_secs(10)).unwrap();
            (world, echo)
        };
        let [(world, echo), (other, other_echo)] = WORLD.map(outside);
        let run = |on, name| {
            let pod = Workload::named("shop", name).port(Transport::Tcp, PORT);
            pair.run_pod(on, pod).unwrap()
        };
        let (pod, near, far) = (run(0, "pod"), run(0, "near"), run(1, "far"));
        let on_node = |on| pair.serve_on_node(on, PORT).unwrap();
        Self {
            pod,
            near,
            far,
            world: [world, other],
            _echoes: [echo, other_echo, on_node(0), on_node(1)],
            pair,
        }
    }

    fn other(&self, who: char, family: Family) -> (&Netns, IpAddr) {
        let node = |on: usize| {
            let place: &Place = &self.pair.places[on];
            let netns = self.pair.nodes[on].machine().netns();
            (netns, place.address(family).unwrap())
        };
        match who {
            'n' => (self.near.netns(), self.near.address(family).unwrap()),
            'f' => (self.far.netns(), self.far.address(family).unwrap()),
            's' => node(0),
            'o' => node(1),
            'a' => (self.world[0].netns(), of(family, WORLD[0])),
            _ => (self.world[1].netns(), of(family, WORLD[1])),
        }
    }

    /// Whom the pod reaches, or who reaches it: their letters.
    fn reach(&self, direction: &str, family: Family) -> String {
        let own = self.pod.address(family).unwrap();
        let asked = OTHERS.map(|(_, who)| {
            let (netns, address) = self.other(who, family);
            if direction == "Egress" {
                (who, self.pod.netns(), SocketAddr::new(address, PORT))
            } else {
                (who, netns, SocketAddr::new(own, PORT))
            }
        });
        thread::scope(|scope| {
            let asked = asked.map(|(who, netns, to)| {
                let ask = move || matches!(ask_tcp(netns, to, SILENCE), Answer::By(_));
                (who, scope.spawn(ask))
            });
            let answered = asked.map(|(who, asked)| asked.join().unwrap().then_some(who));
            answered.into_iter().flatten().collect()
        })
    }
}

/// A policy of the pod with these blocks as the only peers.
fn policy(direction: &str, blocks: &[String]) -> String {
    let (rules, peers) = match direction {
        "Egress" => ("egress", "to"),
        _ => ("ingress", "from"),
    };
    let blocks: Vec<String> = blocks
        .iter()
        .map(|it| format!("{{ipBlock: {it}}}"))
        .collect();
    let blocks = blocks.join(", ");
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: blocks, namespace: shop}}\n\
         spec:\n  podSelector: {{matchLabels: {{app: pod}}}}\n  policyTypes: [{direction}]\n  \
         {rules}: [{{{peers}: [{blocks}]}}]\n"
    )
}

#[test]
fn a_block_means_addresses_whosever_they_are() {
    let site = Site::start();
    let one = |who| {
        FAMILIES.map(|family| {
            let (_, address) = site.other(who, family);
            let bits = if address.is_ipv4() { 32 } else { 128 };
            format!("{address}/{bits}")
        })
    };
    let within = |cidr: &str, except: &[&String]| {
        let except: Vec<String> = except.iter().map(|net| format!("\"{net}\"")).collect();
        format!("{{cidr: \"{cidr}\", except: [{}]}}", except.join(", "))
    };
    let all = |except: &[&[String; 2]]| {
        let of = |family: usize| -> Vec<&String> { except.iter().map(|it| &it[family]).collect() };
        vec![within("0.0.0.0/0", &of(0)), within("::/0", &of(1))]
    };
    let just = |who| one(who).map(|net| within(&net, &[])).to_vec();
    let ranges = |on: usize| {
        let [v4, v6] = &site.pair.places[on].pod_cidrs;
        [v4.clone(), v6.clone()]
    };
    let lan = ["10.210.0.0/24".to_owned(), "fd00:210::/64".to_owned()];
    let (here, there) = (ranges(0), ranges(1));
    // Both families at once; the own node is always allowed.
    let cases: Vec<(&str, Vec<String>, &str)> = vec![
        ("every address", all(&[]), "nfsoab"),
        ("one outside", just('a'), "sa"),
        ("a pod of the same node", just('n'), "ns"),
        ("a pod of the other node", just('f'), "fs"),
        ("the other node", just('o'), "so"),
        ("all but pods", all(&[&here, &there]), "soab"),
        ("all but one outside", all(&[&one('a')]), "nfsob"),
        ("all but the wire", all(&[&lan]), "nfs"),
        (
            "an except narrows its own block only",
            [all(&[&lan]), just('b')].concat(),
            "nfsb",
        ),
        (
            "an except of a whole block leaves nothing",
            vec![within(&lan[0], &[&lan[0]]), within(&lan[1], &[&lan[1]])],
            "s",
        ),
    ];
    for direction in ["Egress", "Ingress"] {
        for (what, blocks, expected) in &cases {
            let policy = policy(direction, blocks);
            site.pair.write_manifest("policy.yaml", &policy).unwrap();
            for family in FAMILIES {
                let what = format!("{direction} {family:?}: {what}");
                let reach = || site.reach(direction, family);
                eventually(&what, SOON + 3 * SILENCE, reach, |it| it == expected).unwrap();
                assert_eq!(reach(), *expected, "{what}, and it stays so");
            }
        }
        // A block of one family says nothing about the other.
        let half = policy(direction, &all(&[])[1..]);
        site.pair.write_manifest("policy.yaml", &half).unwrap();
        for (family, expected) in [(Family::V6, "nfsoab"), (Family::V4, "s")] {
            let reach = || site.reach(direction, family);
            let what = format!("{direction} {family:?}: all of IPv6");
            eventually(&what, SOON + 3 * SILENCE, reach, |it| it == expected).unwrap();
        }
    }
}

#[test]
fn a_named_port_of_egress_is_what_each_destination_calls_so() {
    let node = Node::start(NodeOptions::named("names")).unwrap();
    let server = |name: &str, web: u16, other: u16| {
        let pod = Workload::named("shop", name).port(Transport::Tcp, other);
        let pod = pod.named_port(Transport::Tcp, web, "web");
        node.run_pod(pod.port(Transport::Udp, web)).unwrap()
    };
    let (one, two) = (server("one", 80, 81), server("two", 81, 80));
    let client = node.run_pod(Workload::named("shop", "client")).unwrap();
    let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: web, namespace: shop}\n\
                  spec:\n  podSelector: {matchLabels: {app: client}}\n  policyTypes: [Egress]\n  \
                  egress: [{ports: [{port: web}]}]\n";
    node.write_manifest("policy.yaml", policy).unwrap();
    for family in FAMILIES {
        for (server, name, open) in [(&one, "one", 80), (&two, "two", 81)] {
            // The closed one first: it shows when the policy is in force.
            for port in [161 - open, open] {
                let target = SocketAddr::new(server.address(family).unwrap(), port);
                let what = format!("{name} {port} {family:?}");
                let expected = match port == open {
                    true => Answer::By(name.into()),
                    false => Answer::Silence,
                };
                let ask = || ask_tcp(client.netns(), target, SILENCE);
                eventually(&what, SOON + SILENCE, ask, |it| *it == expected).unwrap();
                // The same number of another protocol is another port.
                let sent = ask_udp(client.netns(), target, SILENCE);
                assert_eq!(sent, Answer::Silence, "{what} by UDP");
            }
        }
    }
}
