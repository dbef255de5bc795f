//! Addresses that are not the pod's, and such as no packet may have.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::net::IpAddr;

use super::attacks::{Both, Dropped, FRIENDLY, Fate, HONEST, Row, V4, V6};
use super::scene::{Attacker, Far, Friend, Near, Scene, Shut, echo};
use crate::frames::{Echo, Ip};
use crate::node::Family;

pub(super) fn all() -> Vec<Row> {
    const ADDRESS: Fate = Dropped("spoofed_address");
    const MAC: Fate = Dropped("spoofed_mac");
    const MARTIAN: Fate = Dropped("martian");
    const MAPPED: Fate = Dropped("mapped_address");
    vec![
        (
            "the address of a friend",
            Both,
            ADDRESS,
            Attacker,
            |it| it.udp(Friend, Shut),
            FRIENDLY,
        ),
        (
            "the address of a pod of another node",
            Both,
            ADDRESS,
            Attacker,
            |it| it.udp(Far, Near),
            (Far, |it| it.udp(Far, Near), Near),
        ),
        (
            "the address of the node",
            Both,
            ADDRESS,
            Attacker,
            |it| it.udp_from(it.node(0), Shut),
            FRIENDLY,
        ),
        (
            "the address of another node",
            Both,
            ADDRESS,
            Attacker,
            |it| it.udp_from(it.node(1), Near),
            HONEST,
        ),
        (
            "an address of the world",
            Both,
            ADDRESS,
            Attacker,
            |it| it.udp_from(it.of("198.51.100.7", "2001:db8:9::7"), Near),
            HONEST,
        ),
        (
            "an address that no pod has",
            Both,
            ADDRESS,
            Attacker,
            |it| it.udp_from(it.of("10.244.1.250", "fd00:10:244:1::fa"), Near),
            HONEST,
        ),
        (
            "the address of the node's DNS",
            Both,
            ADDRESS,
            Attacker,
            |it| it.udp_from(it.of("169.254.53.53", "fd57:6569:7200::53"), Near),
            HONEST,
        ),
        (
            "the address of the gateway",
            V4,
            ADDRESS,
            Attacker,
            |it| it.udp_from(it.of("169.254.1.1", ""), Near),
            HONEST,
        ),
        (
            "the address of the gateway",
            V6,
            ADDRESS,
            Attacker,
            |it| it.udp_from(it.of("", "fe80::1"), Near),
            HONEST,
        ),
        (
            "a cluster IP",
            Both,
            ADDRESS,
            Attacker,
            |it| it.udp_from(it.of("10.96.0.10", "fd00:10:96::a"), Near),
            HONEST,
        ),
        (
            "loopback",
            Both,
            MARTIAN,
            Attacker,
            |it| it.udp_from(it.of("127.0.0.1", "::1"), Near),
            HONEST,
        ),
        (
            "no address",
            Both,
            MARTIAN,
            Attacker,
            |it| it.udp_from(it.of("0.0.0.0", "::"), Near),
            HONEST,
        ),
        (
            "multicast",
            Both,
            MARTIAN,
            Attacker,
            |it| it.udp_from(it.of("224.0.0.1", "ff02::1"), Near),
            HONEST,
        ),
        (
            "broadcast",
            V4,
            MARTIAN,
            Attacker,
            |it| it.udp_from(it.of("255.255.255.255", ""), Near),
            HONEST,
        ),
        (
            "a friend's IPv4 address in IPv6",
            V6,
            MAPPED,
            Attacker,
            |it| it.udp_from(mapped(it), Near),
            HONEST,
        ),
        (
            "an echo as a friend",
            Both,
            ADDRESS,
            Attacker,
            |it| echo(it, Friend, Echo::Request),
            (Friend, |it| echo(it, Friend, Echo::Request), Shut),
        ),
        (
            "the Ethernet address of a friend",
            Both,
            MAC,
            Attacker,
            |it| with_mac(it, it.site.mouths[Friend as usize].own),
            HONEST,
        ),
        (
            "the Ethernet address of the gateway",
            Both,
            MAC,
            Attacker,
            |it| with_mac(it, it.site.mouths[0].gateway),
            HONEST,
        ),
        (
            "an Ethernet address of many",
            Both,
            MAC,
            Attacker,
            |it| with_mac(it, [0xff; 6]),
            HONEST,
        ),
        (
            "to loopback",
            Both,
            MARTIAN,
            Attacker,
            |it| it.udp_to(it.of("127.0.0.1", "::1")),
            HONEST,
        ),
        (
            "to no address",
            Both,
            MARTIAN,
            Attacker,
            |it| it.udp_to(it.of("0.0.0.0", "::")),
            HONEST,
        ),
        (
            "to everybody",
            Both,
            MARTIAN,
            Attacker,
            |it| it.udp_to(it.of("255.255.255.255", "ff02::1")),
            HONEST,
        ),
        (
            "to many",
            Both,
            MARTIAN,
            Attacker,
            |it| it.udp_to(it.of("224.0.0.251", "ff05::fb")),
            HONEST,
        ),
        (
            "to an IPv4 address in IPv6",
            V6,
            MAPPED,
            Attacker,
            |it| it.udp_to(mapped(it)),
            HONEST,
        ),
    ]
}

fn mapped(it: &Scene<'_>) -> IpAddr {
    match it.site.pods[Friend as usize].address(Family::V4).unwrap() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(_) => unreachable!(),
    }
}

fn with_mac(it: &Scene<'_>, source_mac: [u8; 6]) -> Vec<u8> {
    let ip = it.between(Attacker, Near);
    Ip { source_mac, ..ip }.frame(&it.datagram())
}
