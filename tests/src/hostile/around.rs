//! Ways around a policy: protocols, extension headers, options, fragments, tags, answers that nobody asked for.

use std::net::IpAddr;

use super::attacks::{Both, Control, Dropped, FRIENDLY, Fate, HONEST, PADDING, Row, V4, V6};
use super::scene::{Attacker, Friend, Mute, Near, Scene, Shut, Who, echo};
use crate::fragments::{DESTINATION_OPTIONS, HOP_BY_HOP, ROUTING, part};
use crate::frames::{ACK, Echo, L3, SYN, Transport};

pub(super) fn all() -> Vec<Row> {
    const DENIED: Fate = Dropped("ingress_denied");
    const HEADER: Fate = Dropped("extension_header");
    const RECORDED: Control = (
        Friend,
        |it| it.with_options(it.address(Shut), &[7, 7, 4, 0, 0, 0, 0, 0]),
        Shut,
    );
    const TAGGED: Fate = Dropped("vlan_tagged");
    vec![
        (
            "nothing special",
            Both,
            DENIED,
            Attacker,
            |it| it.udp(it.speaker, Shut),
            FRIENDLY,
        ),
        (
            "a SYN with data",
            Both,
            DENIED,
            Attacker,
            |it| it.tcp(Shut, (4000, 80), SYN),
            (Friend, |it| it.tcp(Shut, (4100, 80), SYN), Shut),
        ),
        (
            "the middle of a connection",
            Both,
            DENIED,
            Attacker,
            |it| it.tcp(Shut, (4000, 80), ACK),
            FRIENDLY,
        ),
        (
            "an echo",
            Both,
            DENIED,
            Attacker,
            |it| echo(it, it.speaker, Echo::Request),
            (Friend, |it| echo(it, Friend, Echo::Request), Shut),
        ),
        (
            "an unknown protocol",
            Both,
            DENIED,
            Attacker,
            |it| it.other(it.address(Shut), 99, &[]),
            (Friend, |it| it.other(it.address(Shut), 99, &[]), Shut),
        ),
        (
            "hop-by-hop options",
            V6,
            DENIED,
            Attacker,
            |it| it.behind(Shut, &[(HOP_BY_HOP, &PADDING)]),
            (
                Friend,
                |it| it.behind(Shut, &[(HOP_BY_HOP, &PADDING)]),
                Shut,
            ),
        ),
        (
            "destination options",
            V6,
            DENIED,
            Attacker,
            |it| it.behind(Shut, &[(DESTINATION_OPTIONS, &PADDING)]),
            (
                Friend,
                |it| it.behind(Shut, &[(DESTINATION_OPTIONS, &PADDING)]),
                Shut,
            ),
        ),
        (
            "options twice",
            V6,
            DENIED,
            Attacker,
            |it| {
                it.behind(
                    Shut,
                    &[(HOP_BY_HOP, &PADDING), (DESTINATION_OPTIONS, &PADDING)],
                )
            },
            (
                Friend,
                |it| {
                    it.behind(
                        Shut,
                        &[(HOP_BY_HOP, &PADDING), (DESTINATION_OPTIONS, &PADDING)],
                    )
                },
                Shut,
            ),
        ),
        (
            "a fragment that is all",
            V6,
            DENIED,
            Attacker,
            |it| whole_fragment(it, it.speaker),
            (Friend, |it| whole_fragment(it, Friend), Shut),
        ),
        (
            "a route by way of a friend",
            V6,
            HEADER,
            Attacker,
            |it| routed(it, 4, 1),
            (Friend, |it| routed(it, 4, 0), Shut),
        ),
        (
            "a route of the first kind, at its end",
            V6,
            HEADER,
            Attacker,
            |it| routed(it, 0, 0),
            (Friend, |it| routed(it, 4, 0), Shut),
        ),
        (
            "five headers",
            V6,
            HEADER,
            Attacker,
            |it| it.behind(Near, &[(DESTINATION_OPTIONS, &PADDING[..]); 5]),
            HONEST,
        ),
        (
            "an authentication header",
            V6,
            HEADER,
            Attacker,
            |it| {
                it.behind(
                    Near,
                    &[(
                        51,
                        &[
                            4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                        ],
                    )],
                )
            },
            HONEST,
        ),
        (
            "options that say nothing",
            V4,
            DENIED,
            Attacker,
            |it| it.with_options(it.address(Shut), &[1; 8]),
            (
                Friend,
                |it| it.with_options(it.address(Shut), &[1; 8]),
                Shut,
            ),
        ),
        (
            "a recorded route",
            V4,
            DENIED,
            Attacker,
            |it| it.with_options(it.address(Shut), &[7, 7, 4, 0, 0, 0, 0, 0]),
            RECORDED,
        ),
        (
            "a loose route by way of the node",
            V4,
            HEADER,
            Attacker,
            |it| sourced(it, 131),
            RECORDED,
        ),
        (
            "a strict route by way of the node",
            V4,
            HEADER,
            Attacker,
            |it| sourced(it, 137),
            RECORDED,
        ),
        (
            "a fragment without its first",
            Both,
            Dropped("fragment"),
            Attacker,
            |it| last_fragment(it, Attacker),
            HONEST,
        ),
        (
            "a first fragment without ports",
            Both,
            Dropped("malformed"),
            Attacker,
            |it| part(&it.tcp(Near, (4000, 80), SYN), 78, 0, 8, true),
            HONEST,
        ),
        (
            "a tag",
            Both,
            TAGGED,
            Attacker,
            |it| it.tagged(Near, &[0x81, 0, 0, 5]),
            HONEST,
        ),
        // A tag without a network is none (IEEE 802.1Q, 9.6), and changes nothing.
        (
            "a tag of priority alone",
            Both,
            DENIED,
            Attacker,
            |it| it.tagged(Shut, &[0x81, 0, 0xe0, 0]),
            (Friend, |it| it.tagged(Shut, &[0x81, 0, 0xe0, 0]), Shut),
        ),
        (
            "two tags",
            Both,
            TAGGED,
            Attacker,
            |it| it.tagged(Near, &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6]),
            HONEST,
        ),
        (
            "a tag that hides an address",
            Both,
            TAGGED,
            Attacker,
            |it| {
                [
                    &it.udp(Friend, Shut)[..12],
                    &[0x81, 0, 0, 5],
                    &it.udp(Friend, Shut)[12..],
                ]
                .concat()
            },
            FRIENDLY,
        ),
        (
            "an answer of TCP that nobody asked for",
            Both,
            Dropped("no_flow"),
            Mute,
            |it| it.tcp(Near, (80, 40_000), SYN | ACK),
            asked(),
        ),
        (
            "an answer of DNS that nobody asked for",
            Both,
            Dropped("egress_denied"),
            Mute,
            |it| {
                it.between(Mute, Near).frame(&Transport::Udp {
                    ports: (53, 40_000),
                    payload: it.says.clone(),
                })
            },
            asked(),
        ),
    ]
}

/// An answer that somebody has asked for: of `mute`'s kernel, that nobody listens there, with the question in it.
fn asked() -> Control {
    (Near, |it| it.udp(Near, Mute), Near)
}

fn whole_fragment(it: &Scene<'_>, from: Who) -> Vec<u8> {
    let frame = it.udp(from, Shut);
    let length = frame.len() - L3 - 40;
    part(&frame, 79, 0, length, false)
}

fn last_fragment(it: &Scene<'_>, from: Who) -> Vec<u8> {
    let frame = it.udp(from, Near);
    let header = if it.is_v4() { 20 } else { 40 };
    part(&frame, 77, 8, frame.len() - L3 - header - 8, false)
}

/// To `friend`, and from there to `shut` if so many segments are left; to `shut` if none is.
fn routed(it: &Scene<'_>, kind: u8, left: u8) -> Vec<u8> {
    let (to, then) = if left == 0 {
        (Shut, Friend)
    } else {
        (Friend, Shut)
    };
    let IpAddr::V6(then) = it.address(then) else {
        unreachable!()
    };
    let says = [&[2, kind, left, 0, 0, 0, 0], &then.octets()[..]].concat();
    it.behind(to, &[(ROUTING, &says)])
}

/// To the node, and from there to `shut` (RFC 791, 3.1).
fn sourced(it: &Scene<'_>, option: u8) -> Vec<u8> {
    let IpAddr::V4(then) = it.address(Shut) else {
        unreachable!()
    };
    it.with_options(
        it.node(0),
        &[&[option, 7, 4], &then.octets()[..], &[0]].concat(),
    )
}
