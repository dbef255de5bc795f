//! Ring 1: docs/datapath.md says what the source does: its tables of drops, look-ups, limits and tables are compared.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use weir_common::event::Hook;
use weir_common::table::{Owner, TABLES};
use weir_common::way::Mark;
use weir_common::{DropReason, limits};
use weir_datapath::{Scratch, Verdict};
use weir_tests::bytes::{Bytes, marked};
use weir_tests::edges::{received, sent, tcp};
use weir_tests::frames::{ACK, Ip, SYN};
use weir_tests::mix::Arrival;
use weir_tests::stories::decide;
use weir_tests::tables::Memory;
use weir_tests::world::{
    BACKEND_PORT, FAMILIES, Family, Host, NEAR, REMOTE, SERVICE_PORT, UPLINK, node_port, world,
};

fn document() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/datapath.md");
    fs::read_to_string(path).unwrap()
}

/// The first two cells of every row below a heading of the document.
fn rows(heading: &str) -> Vec<(String, String)> {
    let document = document();
    let (_, section) = document.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|line| {
        let mut cells = line.trim_matches('|').split(" | ").map(str::trim);
        let mut next = || cells.next().unwrap_or_default().to_owned();
        (next(), next())
    })
    .collect()
}

#[test]
fn every_reason_is_listed_as_the_source_has_it() {
    let mut wanted = String::new();
    for reason in DropReason::ALL {
        let (number, label) = (*reason as u8, reason.label());
        writeln!(wanted, "| {number} | `{label}` | {} |", reason.help()).unwrap();
    }
    let document = document();
    let (_, listed) = document
        .split_once("| number | reason | |\n|---|---|---|\n")
        .unwrap();
    assert_eq!(listed, wanted, "docs/datapath.md should end with\n{wanted}");
}

#[test]
fn every_table_is_listed_with_who_writes_it() {
    let listed: BTreeMap<_, _> = rows("Tables").into_iter().collect();
    assert_eq!(listed.len(), TABLES.len());
    let document = document();
    for table in TABLES {
        let name = format!("`{}`", table.name);
        assert!(listed.contains_key(&name), "{name}");
        let row = document.lines().find(|line| {
            line.starts_with(&format!("| {name} |")) && line.matches(" | ").count() == 3
        });
        let writer = row.unwrap().split(" | ").nth(2).unwrap();
        let expected = match table.owner {
            Owner::Agent => "agent",
            Owner::Kernel => "programs",
        };
        assert!(writer.starts_with(expected), "{name}: {writer}");
    }
}

#[test]
fn every_limit_is_the_one_of_the_source() {
    let limits: BTreeMap<&str, u32> = BTreeMap::from([
        ("TCP_WAYS", limits::TCP_WAYS),
        ("OTHER_WAYS", limits::OTHER_WAYS),
        ("PLANS", limits::PLANS),
        ("CHOICES", limits::CHOICES),
        ("POD_OPENINGS", limits::POD_OPENINGS),
        ("POD_OPENINGS_PER_SECOND", limits::POD_OPENINGS_PER_SECOND),
        ("POD_TCP_WAYS", limits::POD_TCP_WAYS),
        ("POD_STREAMS", limits::POD_STREAMS),
        ("FRAGMENTS", limits::FRAGMENTS),
        ("REFUSALS_PER_SECOND", limits::REFUSALS_PER_SECOND),
    ]);
    let listed = rows("Limits");
    assert_eq!(listed.len(), limits.len());
    for (name, said) in listed {
        let digits = said.split([' ', ':']).next().unwrap().replace(',', "");
        let number: u32 = digits.trim_end_matches(',').parse().unwrap();
        assert_eq!(limits.get(name.trim_matches('`')), Some(&number), "{name}");
    }
}

/// What a packet meets, and how it looks there.
type Walk = Vec<Arrival>;

fn pod(from: Host, to: Host, ports: (u16, u16), flags: u8, family: Family) -> Arrival {
    sent(from, to, family, &tcp(ports.0, ports.1, flags))
}

fn to_pod(from: Host, to: Host, ports: (u16, u16), flags: u8, family: Family) -> Arrival {
    received(from, to, family, &tcp(ports.0, ports.1, flags))
}

fn at_uplink(
    hook: Hook,
    from: Host,
    to: Host,
    ports: (u16, u16),
    flags: u8,
    mark: Mark,
    family: Family,
) -> Arrival {
    let ip = Ip::between(from.ip(family), to.ip(family));
    let packet = marked(UPLINK, ip.frame(&tcp(ports.0, ports.1, flags)), mark);
    Arrival { hook, packet }
}

/// The hash look-ups of the last of three rounds of a conversation, in which everything is known: there, and back.
fn looked(
    memory: &Memory,
    there: impl Fn(u8) -> Walk,
    back: impl Fn(u8) -> Walk,
) -> (usize, usize) {
    let walk = |walk: Walk| {
        let before = memory.looked.get();
        for Arrival { hook, packet } in walk {
            let mut packet: Bytes = packet;
            let verdict = decide(hook, &mut packet, memory, &mut Scratch::default());
            assert!(
                !matches!(verdict, Verdict::Drop(_) | Verdict::Refuse(_)),
                "{hook:?} {verdict:?}"
            );
        }
        memory.looked.get() - before
    };
    walk(there(SYN));
    walk(back(SYN | ACK));
    walk(there(ACK));
    walk(back(ACK));
    (walk(there(ACK)), walk(back(ACK)))
}

#[test]
fn a_known_packet_is_looked_up_as_often_as_is_said() {
    let listed: BTreeMap<_, _> = rows("Look-ups").into_iter().collect();
    for family in FAMILIES {
        let nat = world().config.first_port;
        let (a, b, far, world_, node) = (Host::A, Host::B, Host::Far, Host::World, Host::Node);
        let (none, leaving) = (Mark::NONE, Mark::LEAVING);
        let uplink = |hook, from, to, ports, flags, mark| {
            at_uplink(hook, from, to, ports, flags, mark, family)
        };
        let mut found = BTreeMap::new();
        let mut say = |name: &str, count: usize| found.insert(name.to_owned(), count.to_string());

        let (there, back) = looked(
            &world(),
            |flags| vec![pod(a, b, (1000, BACKEND_PORT), flags, family)],
            |flags| vec![pod(b, a, (BACKEND_PORT, 1000), flags, family)],
        );
        assert_eq!(there, back);
        say("pod to pod here", there);

        let (there, back) = looked(
            &world(),
            |flags| vec![pod(a, NEAR, (1000, SERVICE_PORT), flags, family)],
            |flags| vec![pod(b, a, (BACKEND_PORT, 1000), flags, family)],
        );
        say("pod to a service, backend here", there);
        say("its answer", back);

        let (there, back) = looked(
            &world(),
            |flags| {
                vec![
                    pod(b, far, (1000, 80), flags, family),
                    uplink(Hook::TO_NET, b, far, (1000, 80), flags, Mark::PASSED),
                ]
            },
            |flags| {
                vec![
                    uplink(Hook::FROM_NET, far, b, (80, 1000), flags, none),
                    to_pod(far, b, (80, 1000), flags, family),
                ]
            },
        );
        say("pod to another node", there);
        say("from another node to a pod", back);

        let (there, back) = looked(
            &world(),
            |flags| {
                vec![
                    pod(b, world_, (1000, 443), flags, family),
                    uplink(Hook::TO_NET, b, world_, (1000, 443), flags, leaving),
                ]
            },
            |flags| {
                vec![
                    uplink(Hook::FROM_NET, world_, node, (443, nat), flags, none),
                    to_pod(world_, b, (443, 1000), flags, family),
                ]
            },
        );
        say("pod to the world", there);
        say("the world to the pod", back);

        let port = node_port(NEAR);
        let (there, back) = looked(
            &world(),
            |flags| {
                let mut at_pod = to_pod(world_, b, (5000, BACKEND_PORT), flags, family);
                at_pod.packet.mark = Mark::TRANSLATED.bits();
                vec![
                    uplink(Hook::FROM_NET, world_, node, (5000, port), flags, none),
                    at_pod,
                ]
            },
            |flags| {
                vec![
                    pod(b, world_, (BACKEND_PORT, 5000), flags, family),
                    uplink(
                        Hook::TO_NET,
                        b,
                        world_,
                        (BACKEND_PORT, 5000),
                        flags,
                        Mark::REPLY,
                    ),
                ]
            },
        );
        say("into a node port, pod here", there);
        say("its answer out", back);

        let port = node_port(REMOTE);
        let (there, back) = looked(
            &world(),
            |flags| {
                vec![
                    uplink(Hook::FROM_NET, world_, node, (5000, port), flags, none),
                    uplink(
                        Hook::TO_NET,
                        world_,
                        far,
                        (5000, BACKEND_PORT),
                        flags,
                        Mark::TRANSLATED,
                    ),
                ]
            },
            |flags| {
                vec![
                    uplink(Hook::FROM_NET, far, node, (BACKEND_PORT, nat), flags, none),
                    uplink(
                        Hook::TO_NET,
                        far,
                        world_,
                        (BACKEND_PORT, 5000),
                        flags,
                        Mark::REPLY,
                    ),
                ]
            },
        );
        say("into a node port, pod elsewhere", there);
        say("its answer in and out", back);

        let (there, back) = looked(
            &world(),
            |flags| vec![pod(b, node, (1000, 7), flags, family)],
            |flags| vec![to_pod(node, b, (7, 1000), flags, family)],
        );
        say("pod to its own node", there);
        say("own node to a pod", back);

        let (there, _) = looked(
            &world(),
            |flags| vec![uplink(Hook::FROM_NET, world_, node, (5000, 7), flags, none)],
            |_| Vec::new(),
        );
        say("into the node itself", there);
        assert_eq!(found, listed, "{family:?}");
    }
}
