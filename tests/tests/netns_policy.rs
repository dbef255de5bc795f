//! Ring 4: NetworkPolicy between real pods, in both families, packet by packet.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, sendto};
use serde_json::Value;
use weir_tests::netns::Netns;
use weir_tests::node::{Family, Node, NodeOptions, Pod};
use weir_tests::traffic::{
    Answer, Conversation, PATIENCE, SILENCE, any, ask_tcp, ask_udp, drops, eventually, exchange,
    is_echoed, recent_drops, udp_socket,
};
use weir_tests::workloads::{Transport, Workload};

/// How long a change of a manifest may take until packets meet it.
const SOON: Duration = Duration::from_secs(1);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

const DENY_SERVER: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server, namespace: a}
spec:
  podSelector: {matchLabels: {app: server}}
  policyTypes: [Ingress]
";

/// A policy of the server with these ingress rules, in YAML's flow style.
fn allow(ingress: &str) -> String {
    format!("{DENY_SERVER}  ingress: {ingress}\n")
}

/// A server with two TCP ports and a UDP port, and three clients in two namespaces.
struct Town {
    node: Node,
    server: Pod,
    clients: Vec<Pod>,
}

impl Town {
    fn start(name: &str) -> Self {
        let node = Node::start(NodeOptions::named(name)).unwrap();
        let namespaces = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {team: a}}\n---\n\
                          apiVersion: v1\nkind: Namespace\nmetadata: {name: b, labels: {team: b}}\n";
        node.write_manifest("namespaces.yaml", namespaces).unwrap();
        let server = Workload::named("a", "server")
            .port(Transport::Tcp, 80)
            .port(Transport::Tcp, 81)
            .port(Transport::Udp, 80);
        let server = node.run_pod(server).unwrap();
        let clients = [("a", "friend"), ("b", "friend"), ("b", "stranger")];
        let clients = clients.map(|(ns, app)| node.run_pod(Workload::named(ns, app)).unwrap());
        Self {
            node,
            server,
            clients: clients.into(),
        }
    }

    fn policy(&self, text: &str) {
        self.node.write_manifest("policy.yaml", text).unwrap();
    }

    fn server(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.server.address(family).unwrap(), port)
    }

    /// Who reaches TCP 80, TCP 81 and UDP 80 of the server; a letter for each, a dash for silence.
    fn reach(&self, family: Family) -> Vec<String> {
        type Ask = fn(&Netns, SocketAddr, Duration) -> Answer;
        let asks: [(Ask, u16, char); 3] =
            [(ask_tcp, 80, 't'), (ask_tcp, 81, 'T'), (ask_udp, 80, 'u')];
        let reach = |client: &Pod| {
            let letters = asks.map(|(ask, port, letter)| {
                match ask(client.netns(), self.server(family, port), SILENCE) {
                    Answer::By(name) if name == "server" => letter,
                    Answer::Silence => '-',
                    other => panic!("{}: {other:?}", client.workload.id()),
                }
            });
            letters.iter().collect()
        };
        std::thread::scope(|scope| {
            let reach = &reach;
            let running: Vec<_> = self
                .clients
                .iter()
                .map(|c| scope.spawn(move || reach(c)))
                .collect();
            running.into_iter().map(|r| r.join().unwrap()).collect()
        })
    }

    fn expect(&self, what: &str, expected: [&str; 3]) {
        for family in FAMILIES {
            // One look takes up to three silences, and may have begun before the change.
            let patience = SOON + 3 * SILENCE;
            eventually(what, patience, || self.reach(family), |r| *r == expected).unwrap();
            assert_eq!(self.reach(family), expected, "{what}, and it stays so");
        }
    }
}

#[test]
fn each_kind_of_peer_and_port_admits_whom_it_names() {
    let town = Town::start("peers");
    let friend = "podSelector: {matchLabels: {app: friend}}";
    let team_b = "namespaceSelector: {matchLabels: {team: b}}";
    // Clients: a/friend, b/friend, b/stranger.
    let cases = [
        ("no policy", String::new(), ["tTu", "tTu", "tTu"]),
        (
            "default deny",
            DENY_SERVER.to_owned(),
            ["---", "---", "---"],
        ),
        (
            "pods of the namespace",
            allow(&format!("[{{from: [{{{friend}}}]}}]")),
            ["tTu", "---", "---"],
        ),
        (
            "a namespace",
            allow(&format!("[{{from: [{{{team_b}}}]}}]")),
            ["---", "tTu", "tTu"],
        ),
        (
            "pods of a namespace",
            allow(&format!("[{{from: [{{{team_b}, {friend}}}]}}]")),
            ["---", "tTu", "---"],
        ),
        (
            "either",
            allow(&format!("[{{from: [{{{team_b}}}, {{{friend}}}]}}]")),
            ["tTu", "tTu", "tTu"],
        ),
        (
            "a port for all",
            allow("[{ports: [{port: 81}]}]"),
            ["-T-", "-T-", "-T-"],
        ),
        (
            "ports by peer",
            allow(&format!(
                "[{{from: [{{{friend}}}], ports: [{{port: 80, protocol: UDP}}]}}, {{from: [{{{team_b}}}], ports: [{{port: 80}}]}}]"
            )),
            ["--u", "t--", "t--"],
        ),
        ("an empty rule", allow("[{}]"), ["tTu", "tTu", "tTu"]),
    ];
    for (what, policy, expected) in cases {
        town.policy(&policy);
        town.expect(what, expected);
    }
}

#[test]
fn egress_is_judged_too_and_replies_are_not() {
    let town = Town::start("egress");
    // Nobody of b may send, but to the server's port 80.
    town.policy(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: out, namespace: b}\n\
         spec:\n  podSelector: {}\n  policyTypes: [Egress]\n  egress:\n  - to:\n    \
         - {namespaceSelector: {}, podSelector: {matchLabels: {app: server}}}\n    ports: [{port: 80}]\n",
    );
    town.expect("egress of b", ["tTu", "t--", "t--"]);
    // The server may send nothing of its own, and its answers go out.
    town.policy(&DENY_SERVER.replace("Ingress", "Egress"));
    town.expect("replies", ["tTu", "tTu", "tTu"]);
    for family in FAMILIES {
        let client = SocketAddr::new(town.clients[0].address(family).unwrap(), 9);
        let sent = ask_udp(town.server.netns(), client, SILENCE);
        assert_eq!(sent, Answer::Silence, "what the server opens itself");
    }
}

#[test]
fn a_policy_cuts_what_is_established_and_its_removal_lets_new_through() {
    let town = Town::start("cuts");
    let client = town.clients[0].netns();
    for family in FAMILIES {
        let target = town.server(family, 80);
        let mut tcp = Conversation::open_in(client, target, SILENCE).unwrap();
        let udp = udp_socket(client, any(target), SILENCE).unwrap();
        udp.connect(target).unwrap();
        for _ in 0..10 {
            assert_eq!(tcp.ask().unwrap(), "server");
            assert_eq!(exchange(&udp).unwrap(), "server");
        }
        town.policy(DENY_SERVER);
        let cut = eventually(
            "cut",
            SOON + 2 * SILENCE,
            || [tcp.ask(), exchange(&udp)],
            |both| {
                let is_silent = |r: &std::io::Result<String>| {
                    r.as_ref().is_err_and(|e| e.kind() == ErrorKind::WouldBlock)
                };
                both.iter().all(is_silent)
            },
        )
        .unwrap();
        assert!(cut.iter().all(Result::is_err));
        assert!(exchange(&udp).is_err(), "and it stays cut");
        town.policy("");
        eventually(
            "open again",
            SOON + SILENCE,
            || ask_tcp(client, target, SILENCE),
            |a| *a == Answer::By("server".into()),
        )
        .unwrap();
        eventually(
            "the old socket too",
            SOON + SILENCE,
            || exchange(&udp).ok(),
            |a| a.is_some(),
        )
        .unwrap();
    }
}

#[test]
fn a_change_of_a_pods_labels_changes_what_it_may() {
    let town = Town::start("labels");
    town.policy(&allow(
        "[{from: [{podSelector: {matchLabels: {vip: 'yes'}}}]}]",
    ));
    town.expect("nobody is a vip", ["---", "---", "---"]);
    let file = "pods/a.friend.yaml";
    let text = std::fs::read_to_string(town.node.manifests().join(file)).unwrap();
    let mut object: Value = serde_json::from_str(&text).unwrap();
    object["metadata"]["labels"]["vip"] = "yes".into();
    town.node.write_manifest(file, &object.to_string()).unwrap();
    town.expect("a/friend is", ["tTu", "---", "---"]);
    town.node.write_manifest(file, &text).unwrap();
    town.expect("and no more", ["---", "---", "---"]);
}

#[test]
fn the_node_always_reaches_its_isolated_pods() {
    let town = Town::start("node");
    town.policy(&DENY_SERVER.replace("[Ingress]", "[Ingress, Egress]"));
    town.expect("isolated", ["---", "---", "---"]);
    for family in FAMILIES {
        for (ask, port) in [
            (ask_tcp as fn(&_, _, _) -> _, 80),
            (ask_tcp, 81),
            (ask_udp, 80),
        ] {
            let answer = ask(
                town.node.machine().netns(),
                town.server(family, port),
                PATIENCE,
            );
            assert_eq!(answer, Answer::By("server".into()), "{family:?} {port}");
        }
    }
}

#[test]
fn an_echo_request_needs_a_rule_without_ports() {
    let town = Town::start("echo");
    for (what, policy, expected) in [
        ("not isolated", String::new(), true),
        ("isolated", DENY_SERVER.to_owned(), false),
        ("ports", allow("[{ports: [{port: 80}]}]"), false),
        ("any port", allow("[{}]"), true),
    ] {
        town.policy(&policy);
        for family in FAMILIES {
            let address = town.server(family, 0).ip();
            let echoed = || is_echoed(town.clients[0].netns(), address, SILENCE).unwrap();
            eventually(what, SOON + SILENCE, echoed, |e| *e == expected)
                .unwrap_or_else(|e| panic!("{what} {family:?}: {e}"));
        }
    }
}

/// Sends so many datagrams to a port of the server, and returns how many the kernel took.
fn burst(
    town: &Town,
    netns: &weir_tests::netns::Netns,
    from: IpAddr,
    family: Family,
    count: u64,
) -> u64 {
    let socket = udp_socket(netns, SocketAddr::new(from, 0), SILENCE).unwrap();
    let target = town.server(family, 80);
    (0..count)
        .filter(|_| socket.send_to(b"x", target).is_ok())
        .count() as u64
}

#[test]
fn every_denied_datagram_is_counted_and_explained() {
    let town = Town::start("counted");
    town.policy(DENY_SERVER);
    town.expect("isolated", ["---", "---", "---"]);
    const BURST: u64 = 1_000;
    for family in FAMILIES {
        let client = &town.clients[2];
        let before = drops(&town.node, "ingress_denied").unwrap();
        let from = client.address(family).unwrap();
        let sent = burst(&town, client.netns(), from, family, BURST);
        assert_eq!(sent, BURST);
        let dropped = drops(&town.node, "ingress_denied").unwrap() - before;
        assert_eq!(
            dropped, BURST,
            "{family:?}: {BURST} sent, {dropped} counted"
        );
    }
    let explained = recent_drops(&town.node, "ingress_denied").unwrap();
    let last = explained.last().unwrap();
    let why = last["why"].as_str().unwrap();
    assert!(why.contains("a/server"), "names the policy: {last}");
    let text = last.to_string();
    assert!(text.contains("stranger"), "names the sender: {text}");
    // The words of the command line carry the same.
    let said = town.node.weir("drops").output().unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.contains("ingress_denied") && said.contains("a/server"),
        "{said}"
    );
}

#[test]
fn a_pod_cannot_send_as_another() {
    let town = Town::start("spoofs");
    const BURST: u64 = 100;
    let client = &town.clients[0];
    let netns = client.netns();
    for (family, stolen) in [
        (Family::V4, "10.244.1.200"),
        (Family::V6, "fd00:10:244:1::200"),
    ] {
        let length = if family == Family::V4 { 32 } else { 128 };
        let nodad = if family == Family::V6 { "nodad" } else { "" };
        netns
            .ip(&format!("addr add {stolen}/{length} dev eth0 {nodad}"))
            .unwrap();
        let before = drops(&town.node, "spoofed_address").unwrap();
        let sent = burst(&town, netns, stolen.parse().unwrap(), family, BURST);
        let dropped = drops(&town.node, "spoofed_address").unwrap() - before;
        assert_eq!(
            (sent, dropped),
            (BURST, BURST),
            "{family:?}: a second address"
        );
    }
    // The kernel forgets the gateway with the address of the device; the pod puts it back.
    let gateways: Vec<String> = ["-4", "-6"]
        .map(|f| netns.ip(&format!("{f} neigh show dev eth0")).unwrap())
        .iter()
        .flat_map(|shown| shown.lines().map(ToOwned::to_owned).collect::<Vec<_>>())
        .filter(|line| line.contains("PERMANENT"))
        .map(|line| {
            line.replace(" router", "")
                .replace("PERMANENT", "nud permanent")
        })
        .collect();
    assert_eq!(gateways.len(), 2, "{gateways:?}");
    netns.ip("link set eth0 address 02:00:00:00:00:99").unwrap();
    for gateway in gateways {
        netns
            .ip(&format!("neigh replace {gateway} dev eth0"))
            .unwrap();
    }
    for family in FAMILIES {
        let before = drops(&town.node, "spoofed_mac").unwrap();
        let sent = burst(&town, netns, client.address(family).unwrap(), family, BURST);
        let dropped = drops(&town.node, "spoofed_mac").unwrap() - before;
        // A changed device may announce itself too.
        assert_eq!(sent, BURST);
        assert!(
            dropped >= BURST,
            "{family:?}: another MAC: {dropped} of {sent}"
        );
    }
}

#[test]
fn frames_that_no_pod_may_send_are_dropped_with_their_reason() {
    let town = Town::start("frames");
    let netns = town.clients[1].netns();
    // Anything that a pod's root can write to a packet socket.
    let (socket, device) = netns
        .run(|| {
            let socket = nix::sys::socket::socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                None,
            );
            let mut devices = nix::ifaddrs::getifaddrs().unwrap();
            let device = devices
                .find_map(|d| (d.interface_name == "eth0").then_some(*d.address?.as_link_addr()?));
            (socket.unwrap(), device.unwrap())
        })
        .unwrap();
    let ipv4 = [
        0x45, 0, 0, 20, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 244, 1, 2, 10, 244, 1, 3,
    ];
    let tagged = [&[0x81, 0, 0, 5, 8, 0][..], &ipv4].concat();
    let arp = [&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1][..], &[0; 20]].concat();
    let unknown = [&[0x88, 0xb5][..], &[0; 46]].concat();
    let short = [&[8, 0][..], &ipv4[..12]].concat();
    for (reason, rest) in [
        ("vlan_tagged", tagged),
        ("not_ip", arp),
        ("not_ip", unknown),
        ("malformed", short),
    ] {
        let mut frame = vec![2, 0, 0, 0, 0, 1];
        frame.extend(device.addr().unwrap());
        frame.extend(rest);
        const BURST: u64 = 50;
        let before = drops(&town.node, reason).unwrap();
        for _ in 0..BURST {
            let sent = sendto(socket.as_raw_fd(), &frame, &device, MsgFlags::empty());
            assert_eq!(sent, Ok(frame.len()));
        }
        let dropped = drops(&town.node, reason).unwrap() - before;
        assert_eq!(dropped, BURST, "{reason}: {BURST} sent");
    }
}

#[test]
fn a_policy_in_audit_tells_what_it_would_deny_and_denies_nothing() {
    let town = Town::start("audit");
    let counted = || {
        let page = town.node.metrics().unwrap();
        let line = page
            .lines()
            .find(|it| it.starts_with("weir_policy_audit_denials_total "));
        let number = line.unwrap().rsplit(' ').next().unwrap();
        number.parse::<f64>().unwrap() as u64
    };
    let audited = || {
        let answer = town.node.ask("drops").unwrap();
        answer["audited"].as_array().unwrap().clone()
    };
    let from_friends = allow("[{from: [{podSelector: {matchLabels: {app: friend}}}]}]");
    let audit = from_friends.replace(
        "namespace: a}",
        "namespace: a, annotations: {weir.local/enforcement: audit}}",
    );
    assert_ne!(audit, from_friends);
    // Some of it is enforced: the audit is about what is left.
    let no_udp = "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: no-udp, namespace: a}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{ports: [{protocol: TCP}]}]
";
    town.policy(&audit);
    let of_policy = || {
        let rows = town.node.ask("policy").unwrap();
        rows.as_array()
            .unwrap()
            .first()
            .cloned()
            .unwrap_or_default()
    };
    let is_audit = |row: &Value| row["enforcement"] == "audit";
    let row = eventually("the policy is known", SOON, of_policy, is_audit).unwrap();
    assert_eq!(row["pods"], serde_json::json!(["a/server"]));
    let before = counted();
    town.expect("audited", ["tTu", "tTu", "tTu"]);
    // Nobody but the two of namespace b, who are asked for three times in each family at the least.
    assert!(counted() >= before + 12, "{} and {before}", counted());
    let stranger = town.clients[2].workload.id();
    let rows = audited();
    let by = "no rule allows it; ingress is isolated by a/server";
    assert!(
        rows.iter()
            .any(|row| row["source"]["name"] == stranger && row["why"] == by),
        "{rows:#?}"
    );
    let a_friend = town.clients[0].workload.id();
    assert!(
        rows.iter().all(|row| row["source"]["name"] != a_friend),
        "{rows:#?}"
    );
    assert_eq!(drops(&town.node, "ingress_denied").unwrap(), 0);
    let said = |words: &str| {
        let said = town.node.weir(words).output().unwrap();
        assert!(said.status.success(), "{said:?}");
        String::from_utf8(said.stdout).unwrap()
    };
    let table = said("drops");
    let (_, below) = table
        .split_once("if policies in audit were enforced")
        .unwrap();
    assert!(below.contains(&stranger) && below.contains(by), "{table}");
    let explained = said(&format!("policy explain {stranger} a/server:80"));
    let would = format!("audit: would be denied: {by}");
    assert!(explained.starts_with("ALLOWED"), "{explained}");
    assert!(explained.contains(&would), "{explained}");
    let explained = said(&format!("policy explain {a_friend} a/server:80"));
    assert!(!explained.contains("audit"), "{explained}");
    let listed = said("policy");
    assert!(
        listed.contains("a/server") && listed.contains("audit"),
        "{listed}"
    );
    // What nobody answers is counted once, not with each packet, and once more after a change, whoever's.
    let quiet = town.server(Family::V4, 9);
    let ear = udp_socket(town.server.netns(), quiet, SOON).unwrap();
    let stream = udp_socket(town.clients[2].netns(), any(quiet), SOON).unwrap();
    stream.connect(quiet).unwrap();
    let more = |heard: usize| {
        let before = counted();
        for _ in 0..100 {
            stream.send(b"more").unwrap();
        }
        for _ in 0..heard {
            ear.recv(&mut [0; 8]).unwrap();
        }
        counted() - before
    };
    assert_eq!([more(100), more(100)], [1, 0]);
    let other = "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friend, namespace: a}
spec: {podSelector: {matchLabels: {app: friend}}, ingress: [{}]}
";
    town.policy(&format!("{audit}{other}"));
    let known = || town.node.ask("policy").unwrap().as_array().unwrap().len();
    eventually("the other one is known", SOON, known, |it| *it == 2).unwrap();
    assert_eq!([more(100), more(100)], [1, 0], "after a change");
    town.policy(&format!("{audit}{no_udp}"));
    town.expect("what others deny is denied", ["tT-", "tT-", "tT-"]);
    let denied = drops(&town.node, "ingress_denied").unwrap();
    assert_eq!(more(0), 0, "what is denied is not audited");
    let denied = drops(&town.node, "ingress_denied").unwrap() - denied;
    assert_eq!(denied, 100);
    town.policy(&from_friends);
    town.expect("enforced", ["tTu", "---", "---"]);
}
