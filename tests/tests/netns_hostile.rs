//! Ring 4: what a hostile pod sends by a packet socket reaches nobody that it should not, and the same packet made honest does
//! arrive: the attacks of `weir_tests::hostile`, each with its control, in both families. An attack is over when its control has
//! arrived, which was sent behind it, and as many packets were dropped for the named reason as it sent.
//!
//! Elsewhere: second addresses and MACs by the pod's own kernel, one tag (`netns_policy`), questions for neighbours
//! (`netns_neighbours`), fragments out of order (`netns_fragments`), what claims the node's or a pod's address on the wire
//! (`netns_outside`), Services that claim addresses (`netns_claims`), the first packets of a pod (`netns_first_packet`).
//!
//! Seen failing, with a datapath that did not look at a pod's source address (22 attacks of 109), at its Ethernet address (6), for
//! martians (15, and four claims), at tags that the kernel has taken off (4), whether a route is at its end (2), whether an answer
//! was asked for (2), whether an error is about the pod's own conversation (6), whether a fragment overlaps; and with an agent
//! with `broken-open-first` (the stream).

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use weir_agent::kernel::second_lock;
use weir_tests::fragments::part;
use weir_tests::frames::{Ip, L3, SYN, Transport};
use weir_tests::hostile::Ear;
use weir_tests::hostile::attacks::{
    Both, Dropped, FRIENDLY, Fate, Frame, HONEST, TIMES, V4, V6, all, attempt,
};
use weir_tests::hostile::scene::{
    Attacker, EVERYBODY, Far, Friend, Near, Scene, Shut, Site, Who, icmp,
};
use weir_tests::node::{Family, Pod};
use weir_tests::traffic::{PATIENCE, any, eventually, udp_socket};
use weir_tests::workloads::Workload;

/// Whom `near` has spoken to.
const SPOKEN: [(Who, Frame); 2] = [
    (Friend, |it| it.udp(Near, Friend)),
    (Far, |it| it.udp(Near, Far)),
];

#[test]
fn no_attack_of_a_pod_succeeds_and_every_control_does() {
    let site = Site::start("hostile");
    let start = Instant::now();
    let rows = all();
    let (mut made, mut wrong) = (0, Vec::new());
    for is_tracking in [false, true] {
        if is_tracking {
            site.track_connections();
        }
        for (family, only) in [(Family::V4, V4), (Family::V6, V6)] {
            // What errors are forged about is there.
            for (to, frame) in SPOKEN {
                let scene = site.scene(family, Near);
                scene.send(&frame(&scene));
                assert!(site.is_heard(to, &scene.says), "{family:?}");
            }
            for row in rows.iter().filter(|row| row.1 == Both || row.1 == only) {
                made += 1;
                wrong.extend(attempt(&site, family, row, None));
                // What the receiver's policy is to stop, it stops from another node, too.
                if row.2 == Dropped("ingress_denied") {
                    made += 1;
                    wrong.extend(attempt(&site, family, row, Some(Far)));
                }
            }
        }
    }
    let many = wrong.len();
    println!(
        "{made} attacks of {TIMES} packets, {many} wrong, {:.1?}",
        start.elapsed()
    );
    assert!(wrong.is_empty(), "{many} of {made}:\n{}", wrong.join("\n"));
}

/// How many of each are sent that claim or ask for others' addresses.
const FLOOD: u64 = 500;

/// ARP for IPv4 over Ethernet (RFC 826): of this operation, about this address.
fn arp(it: &Scene<'_>, to: [u8; 6], operation: u8, about: [u8; 4]) -> Vec<u8> {
    arp_of(it, to, operation, about, about)
}

/// In the name of an address.
fn arp_of(it: &Scene<'_>, to: [u8; 6], operation: u8, of: [u8; 4], about: [u8; 4]) -> Vec<u8> {
    let own = it.site.mouths[Attacker as usize].own;
    let says = [
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation],
        &own[..],
        &of,
        &to,
        &about,
    ]
    .concat();
    [&to[..], &own, &says].concat()
}

/// A neighbour message (RFC 4861), as from a link: no router has passed it on.
fn neighbour(it: &Scene<'_>, to: IpAddr, kind: u8, target: IpAddr) -> Vec<u8> {
    neighbour_of(it, it.address(Attacker), to, kind, target)
}

fn neighbour_of(it: &Scene<'_>, of: IpAddr, to: IpAddr, kind: u8, target: IpAddr) -> Vec<u8> {
    let IpAddr::V6(target) = target else {
        unreachable!()
    };
    let own = it.site.mouths[Attacker as usize].own;
    // Solicited nobody, overrides everybody; or a router for an hour.
    let says = match kind {
        134 => [
            &[134, 0, 0, 0, 64, 0, 14, 16, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
            &own[..],
        ]
        .concat(),
        _ => [
            &[kind, 0, 0, 0, 0x20, 0, 0, 0],
            &target.octets()[..],
            &[2, 1],
            &own,
        ]
        .concat(),
    };
    let mut frame = icmp(&it.ip(of, to), says);
    frame[L3 + 7] = 255;
    frame
}

fn dhcp(it: &Scene<'_>, source: &str, ports: (u16, u16)) -> Vec<u8> {
    let ip = it.ip(source.parse().unwrap(), "255.255.255.255".parse().unwrap());
    let payload = [
        &[2, 1, 6, 0][..],
        &[0; 232],
        &[0x63, 0x82, 0x53, 0x63, 53, 1, 2, 255],
    ]
    .concat();
    ip.frame(&Transport::Udp { ports, payload })
}

/// Who is where, and which way leads where, as a node and the pods know it.
fn known(site: &Site) -> Vec<String> {
    let nodes = site.pair.nodes.iter().map(|it| it.machine().netns());
    let all = nodes.chain(site.pods.iter().map(Pod::netns));
    all.flat_map(|netns| {
        let neighbours = ["-4", "-6"].map(|it| netns.ip(&format!("{it} neigh show")).unwrap());
        let neighbours: Vec<String> = neighbours
            .iter()
            .flat_map(|it| it.lines())
            .filter_map(with_address)
            .collect();
        let routes =
            ["-4", "-6"].map(|it| netns.ip(&format!("{it} route show table all")).unwrap());
        neighbours
            .into_iter()
            .chain(routes)
            .map(|it| format!("{}: {it}", netns.name()))
    })
    .collect()
}

/// A neighbour whose Ethernet address is known, without the state of the entry, which time changes. Machines of the LAN learn each
/// other's link-local addresses, and forget them, by themselves.
fn with_address(line: &str) -> Option<String> {
    let (before, state) = line.trim().rsplit_once(' ')?;
    let is_passing = line.starts_with("fe80::") && state != "PERMANENT";
    let is_known = before.contains("lladdr") && state != "FAILED";
    (is_known && !is_passing).then(|| before.replace(" router", ""))
}

type Claim = (&'static str, Family, Fate, fn(&Scene<'_>, u64) -> Vec<u8>);

#[test]
fn no_pod_changes_what_others_know_of_neighbours_and_routers() {
    const ARP: Fate = Dropped("not_ip");
    const MARTIAN: Fate = Dropped("martian");
    let site = Site::start("claims");
    let claims: Vec<Claim> = vec![
        (
            "a friend's address, to everybody",
            Family::V4,
            ARP,
            |it, _| arp(it, [0xff; 6], 2, octets(it.address(Friend))),
        ),
        (
            "a friend's address, to the gateway",
            Family::V4,
            ARP,
            |it, _| arp(it, it.site.mouths[0].gateway, 2, octets(it.address(Friend))),
        ),
        ("the gateway's address", Family::V4, ARP, |it, _| {
            arp(it, [0xff; 6], 2, [169, 254, 1, 1])
        }),
        ("who is everybody?", Family::V4, ARP, |it, n| {
            let of = octets(it.address(Attacker));
            arp_of(it, [0xff; 6], 1, of, [10, 244, (n >> 8) as u8, n as u8])
        }),
        (
            "a friend's address, as its neighbour",
            Family::V6,
            MARTIAN,
            |it, _| neighbour(it, it.of("", "ff02::1"), 136, it.address(Friend)),
        ),
        (
            "a friend's address, to the node",
            Family::V6,
            Dropped("no_flow"),
            |it, _| neighbour(it, it.node(0), 136, it.address(Friend)),
        ),
        (
            "who is everybody? as a neighbour",
            Family::V6,
            MARTIAN,
            |it, n| {
                neighbour(
                    it,
                    it.of("", "ff02::1:ff00:1"),
                    135,
                    format!("fd00::{n:x}").parse().unwrap(),
                )
            },
        ),
        ("a router", Family::V6, MARTIAN, |it, _| {
            neighbour(it, it.of("", "ff02::1"), 134, it.address(Attacker))
        }),
        (
            "a router, to the node",
            Family::V6,
            Dropped("no_flow"),
            |it, _| neighbour(it, it.node(0), 134, it.address(Attacker)),
        ),
        (
            "a router, to a pod",
            Family::V6,
            Dropped("no_flow"),
            |it, _| neighbour(it, it.address(Near), 134, it.address(Attacker)),
        ),
        // Only from a link-local address is it believed (RFC 4861, 6.1.2).
        (
            "a router, to the node, as a router would",
            Family::V6,
            Dropped("spoofed_address"),
            |it, _| {
                let of = it.of("", "fe80::bad");
                neighbour_of(it, of, it.node(0), 134, it.address(Attacker))
            },
        ),
        (
            "a router, to a pod, as a router would",
            Family::V6,
            Dropped("spoofed_address"),
            |it, _| {
                let of = it.of("", "fe80::bad");
                neighbour_of(it, of, it.address(Near), 134, it.address(Attacker))
            },
        ),
        ("an offer of an address", Family::V4, MARTIAN, |it, _| {
            dhcp(it, &it.address(Attacker).to_string(), (67, 68))
        }),
        ("a wish for an address", Family::V4, MARTIAN, |it, _| {
            dhcp(it, "0.0.0.0", (68, 67))
        }),
    ];
    // Whoever will know of each other does.
    let speak = || {
        for family in [Family::V4, Family::V6] {
            for (speaker, frame, hears) in [HONEST, FRIENDLY, (Near, |it| it.udp(Near, Far), Far)] {
                let scene = site.scene(family, speaker);
                scene.send(&frame(&scene));
                assert!(site.is_heard(hears, &scene.says), "{family:?} {speaker:?}");
            }
        }
    };
    speak();
    let before = known(&site);
    let mut wrong = Vec::new();
    for (name, family, fate, frame) in claims {
        let Dropped(reason) = fate;
        let had = site.dropped(reason);
        let scene = site.scene(family, Attacker);
        for number in 0..FLOOD {
            scene.send(&frame(&scene, number));
        }
        let dropped = || site.dropped(reason) - had;
        if eventually("dropped", PATIENCE, dropped, |it| *it >= FLOOD).is_err() {
            wrong.push(format!("{name}: {} of {FLOOD} as {reason}", dropped()));
        }
        speak();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(known(&site), before);
}

fn octets(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(it) => it.octets(),
        IpAddr::V6(_) => unreachable!(),
    }
}

/// Pods that start under a stream to their addresses, and how many addresses the stream is for.
const STARTS: usize = 20;
const AHEAD: u8 = 40;

#[test]
fn a_stream_to_an_address_before_its_pod_is_there_meets_the_policy_from_the_first_packet() {
    let site = Site::start("stream");
    let next = site.pods[Shut as usize].address(Family::V4).unwrap();
    let last = octets(next)[3];
    let speakers = [Attacker, Far];
    let stream: Vec<(Scene<'_>, Vec<Vec<u8>>)> = speakers
        .map(|speaker| {
            [Family::V4, Family::V6].map(|family| {
                let scene = site.scene(family, speaker);
                let frames = (last + 1..last + AHEAD).flat_map(|host| {
                    let to = scene.of(
                        &format!("10.244.1.{host}"),
                        &format!("fd00:10:244:1::{host:x}"),
                    );
                    let ip = scene.ip(scene.address(speaker), to);
                    let syn = Transport::Tcp {
                        ports: (4000, 80),
                        flags: SYN,
                        payload: scene.says.clone(),
                    };
                    [ip.frame(&scene.datagram()), ip.frame(&syn)]
                });
                let frames = frames.collect();
                (scene, frames)
            })
        })
        .into_iter()
        .flatten()
        .collect();
    let node = &site.pair.nodes[0];
    // Sends all of it once, and returns whether the ear has heard the stream of each speaker and family.
    let once = |ear: &Ear| -> Vec<bool> {
        for (scene, frames) in &stream {
            frames.iter().for_each(|frame| scene.send(frame));
        }
        stream
            .iter()
            .map(|(scene, _)| ear.has_heard(&scene.says))
            .collect()
    };
    let mut streamed = 0;
    for number in 0..STARTS + 3 {
        let is_shut = number < STARTS;
        let app = if is_shut { "shut" } else { "open" };
        let workload = Workload::named("shop", &format!("late{number}")).label("app", app);
        let mut pod = node.declare_pod(workload).unwrap();
        let ear = Ear::open(pod.netns()).unwrap();
        // The other node hears of it only afterwards, as it does of a real one.
        let runtime = node.runtime();
        std::thread::scope(|scope| {
            let start = scope.spawn(|| runtime.add_pod(&mut pod).map(drop));
            while !start.is_finished() {
                once(&ear);
                streamed += 1;
            }
            start.join().unwrap().unwrap();
        });
        let host = octets(pod.address(Family::V4).unwrap())[3];
        assert!(
            (last + 1..last + AHEAD).contains(&host),
            "the stream was for it: {host}"
        );
        if is_shut {
            let before = site.dropped("ingress_denied");
            // Of each speaker one datagram and one SYN, in each family.
            for _ in 0..5 {
                once(&ear);
            }
            let dropped = || site.dropped("ingress_denied") - before;
            eventually("denied", PATIENCE, dropped, |it| *it >= 5 * 8).unwrap();
            assert_eq!(once(&ear), [false; 4], "start {number}");
        } else {
            eventually(
                "one without a policy hears it",
                PATIENCE,
                || once(&ear),
                |it| *it == [true; 4],
            )
            .unwrap();
        }
        node.delete_pod(pod).unwrap();
    }
    println!("{STARTS} starts under a stream, repeated {streamed} times");
    assert!(streamed as usize >= STARTS, "{streamed}");
}

#[test]
fn a_fragment_that_overlaps_is_dropped_and_its_datagram_never_is_whole() {
    let site = Site::start("overlap");
    for (family, name) in [(Family::V4, "fragments"), (Family::V6, "fragments of IPv6")] {
        let scene = site.scene(family, Attacker);
        let datagram = |byte: u8| {
            let payload = vec![byte; 40];
            let ports = (4000, 80);
            scene
                .between(Attacker, Near)
                .frame(&Transport::Udp { ports, payload })
        };
        let (honest, other) = (datagram(b'h'), datagram(b'o'));
        let at = SocketAddr::new(scene.address(Near), 80);
        let socket = udp_socket(site.pods[Near as usize].netns(), at, PATIENCE).unwrap();
        let before = site.dropped("fragment");
        for number in 0..TIMES as u32 {
            // What has the ports comes first; what follows begins within it.
            scene.send(&part(&honest, number, 0, 24, true));
            scene.send(&part(&other, number, 8, 40, false));
        }
        let number = TIMES as u32;
        scene.send(&part(&honest, number, 0, 24, true));
        scene.send(&part(&honest, number, 24, 24, false));
        let mut received = [0; 64];
        let length = socket.recv(&mut received).unwrap();
        assert_eq!(received[..length], [b'h'; 40], "{name}: the control alone");
        assert_eq!(site.dropped("fragment") - before, TIMES, "{name}");
    }
}

/// A VXLAN device's Ethernet address.
const TUNNELS: [u8; 6] = [2, 0, 0, 0, 0, 0x99];
/// Ports of VXLAN: IANA's, and Linux's of before.
const PORTS: [u16; 2] = [4789, 8472];

/// A frame inside of VXLAN (RFC 7348).
fn in_vxlan(inner: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0, 0, 0, 1, 0], inner].concat()
}

#[test]
fn what_is_in_a_tunnel_comes_out_in_nobodys_name() {
    let site = Site::start("tunnel");
    for node in &site.pair.nodes {
        let netns = node.machine().netns();
        for port in PORTS {
            // Of both families and every network, as that of a CNI plugin.
            let device = format!("vxlan{port}");
            let words = format!(
                "link add {device} address 02:00:00:00:00:99 type vxlan external dstport {port}"
            );
            netns.ip(&words).unwrap();
            netns.ip(&format!("link set {device} up")).unwrap();
            let key = format!("net.ipv4.conf.{device}.rp_filter");
            netns.set_sysctl(&key, "0").unwrap();
        }
        // As a cache of DNS on every node has.
        for address in ["169.254.20.10/32", "fd00:169::10/128"] {
            netns.ip(&format!("address add {address} dev lo")).unwrap();
        }
    }
    let elsewhere = site.pair.nodes[1].machine().netns();
    for family in [Family::V4, Family::V6] {
        for port in PORTS {
            let inner = |scene: &Scene<'_>, source: IpAddr, to: Who| {
                let destination_mac = TUNNELS;
                let ip = scene.ip(source, scene.address(to));
                let inner = Ip {
                    destination_mac,
                    ..ip
                };
                in_vxlan(&inner.frame(&scene.datagram()))
            };
            let node = |scene: &Scene<'_>, on| SocketAddr::new(scene.node(on), port);
            // The control: what a machine of the network sends through it comes out.
            let scene = site.scene(family, Attacker);
            let outside = scene.of("198.51.100.7", "2001:db8:9::7");
            let socket = udp_socket(elsewhere, any(node(&scene, 0)), PATIENCE).unwrap();
            socket
                .send_to(&inner(&scene, outside, Near), node(&scene, 0))
                .unwrap();
            assert!(
                site.is_heard(Near, &scene.says),
                "{family:?} {port}: the control"
            );
            // But not in the name of a pod of this node.
            let before = site.dropped("spoofed_address");
            let scene = site.scene(family, Attacker);
            for _ in 0..TIMES {
                let bytes = inner(&scene, scene.address(Friend), Shut);
                socket.send_to(&bytes, node(&scene, 0)).unwrap();
            }
            let dropped = || site.dropped("spoofed_address") - before;
            eventually("dropped", PATIENCE, dropped, |it| *it >= TIMES).unwrap();
            assert!(!site.ears[Shut as usize].has_heard(&scene.says));
            // And a pod sends nothing through it, in whoever's name, to whoever: not to another node, and what it sends its own, at
            // whichever of its addresses, does not come out.
            let own = ["169.254.53.53", "fd57:6569:7200::53"];
            let second = ["169.254.20.10", "fd00:169::10"];
            let side = usize::from(family == Family::V6);
            let at = |text: &str| text.parse().unwrap();
            let there: [(IpAddr, bool); 4] = [
                (site.pair.places[0].address(family).unwrap(), true),
                (at(own[side]), true),
                (at(second[side]), true),
                (site.pair.places[1].address(family).unwrap(), false),
            ];
            for (node, is_own) in there {
                for (of, to) in [(Friend, Shut), (Attacker, Near), (Far, Near), (Friend, Far)] {
                    let before = (site.dropped("tunnel"), locked(&site));
                    let scene = site.scene(family, Attacker);
                    let payload = inner(&scene, scene.address(of), to);
                    let ports = (4000, port);
                    let frame = scene.ip(scene.address(Attacker), node);
                    let frame = frame.frame(&Transport::Udp { ports, payload });
                    for _ in 0..TIMES {
                        scene.send(&frame);
                    }
                    let dropped = || match is_own {
                        true => locked(&site) - before.1,
                        false => site.dropped("tunnel") - before.0,
                    };
                    let done = eventually("dropped", PATIENCE, dropped, |it| *it >= TIMES);
                    let what = format!("port {port} of {node}, as {of:?} to {to:?}");
                    assert!(done.is_ok(), "{what}: {}", dropped());
                    for ear in EVERYBODY {
                        let has_heard = site.ears[ear as usize].has_heard(&scene.says);
                        assert!(ear == Attacker || !has_heard, "{what}: {ear:?} heard it");
                    }
                }
            }
        }
    }
}

/// How much the second lock of the first node has dropped.
fn locked(site: &Site) -> u64 {
    let netns = site.pair.nodes[0].machine().netns();
    netns.run(second_lock::drops).unwrap().unwrap().unwrap()
}
