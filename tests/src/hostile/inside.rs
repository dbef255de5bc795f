//! What somebody would have to unpack (of the own node's tunnels a test with real ones is in `netns_hostile`), and errors about others' conversations.

use std::net::IpAddr;

use super::attacks::{Both, Control, Dropped, FRIENDLY, Fate, HONEST, Row, V4, V6};
use super::scene::{Attacker, Far, Near, Scene, Shut, icmp};
use crate::frames::{Ip, L3, Transport};

pub(super) fn all() -> Vec<Row> {
    const VXLAN: [u8; 8] = [8, 0, 0, 0, 0, 0, 1, 0];
    const GENEVE: [u8; 8] = [0, 0, 0x65, 0x58, 0, 0, 1, 0];
    const TUNNEL: Fate = Dropped("tunnel");
    const NO_FLOW: Fate = Dropped("no_flow");
    vec![
        (
            "VXLAN to another node, as Linux first had it",
            Both,
            TUNNEL,
            Attacker,
            |it| it.in_udp(it.node(1), 8472, &VXLAN),
            HONEST,
        ),
        (
            "VXLAN to another node",
            Both,
            TUNNEL,
            Attacker,
            |it| it.in_udp(it.node(1), 4789, &VXLAN),
            HONEST,
        ),
        (
            "Geneve to another node",
            Both,
            TUNNEL,
            Attacker,
            |it| it.in_udp(it.node(1), 6081, &GENEVE),
            HONEST,
        ),
        (
            "IP in IP to another node",
            Both,
            TUNNEL,
            Attacker,
            |it| in_ip(it, it.node(1)),
            HONEST,
        ),
        (
            "GRE to another node",
            Both,
            TUNNEL,
            Attacker,
            |it| in_gre(it, it.node(1)),
            HONEST,
        ),
        (
            "IP in IP to who is shut",
            Both,
            Dropped("ingress_denied"),
            Attacker,
            |it| in_ip(it, it.address(Shut)),
            FRIENDLY,
        ),
        (
            "GRE to who is shut",
            Both,
            Dropped("ingress_denied"),
            Attacker,
            |it| in_gre(it, it.address(Shut)),
            FRIENDLY,
        ),
        (
            "an error: no such port",
            V4,
            NO_FLOW,
            Attacker,
            |it| it.error(3, 3, [0; 4]),
            refused(),
        ),
        (
            "an error: no such port",
            V6,
            NO_FLOW,
            Attacker,
            |it| it.error(1, 4, [0; 4]),
            refused(),
        ),
        (
            "an error: no such host",
            V4,
            NO_FLOW,
            Attacker,
            |it| it.error(3, 1, [0; 4]),
            refused(),
        ),
        (
            "an error: too big",
            V4,
            NO_FLOW,
            Attacker,
            |it| it.error(3, 4, [0, 0, 2, 0]),
            refused(),
        ),
        (
            "an error: too big",
            V6,
            NO_FLOW,
            Attacker,
            |it| it.error(2, 0, [0, 0, 5, 0]),
            refused(),
        ),
        (
            "an error: too many hops",
            V4,
            NO_FLOW,
            Attacker,
            |it| it.error(11, 0, [0; 4]),
            refused(),
        ),
        (
            "an error of somebody else",
            Both,
            Dropped("spoofed_address"),
            Attacker,
            |it| with_source(it, it.address(Far)),
            refused(),
        ),
        (
            "a redirect by way of the attacker",
            V4,
            NO_FLOW,
            Attacker,
            |it| redirect(it),
            HONEST,
        ),
        (
            "a redirect by way of the attacker",
            V6,
            NO_FLOW,
            Attacker,
            |it| redirect(it),
            HONEST,
        ),
        // Only a router of the link is believed.
        (
            "a redirect by way of the attacker, as if by the gateway",
            V6,
            Dropped("spoofed_address"),
            Attacker,
            |it| {
                let to = it.between(Attacker, Near);
                let source = it.of("", "fe80::1");
                let body = [&[137, 0, 0, 0, 0, 0, 0, 0][..], &[0; 32], &it.says].concat();
                on_link(icmp(&Ip { source, ..to }, body))
            },
            HONEST,
        ),
        (
            "an error about nobody, to a pod of another node",
            V4,
            NO_FLOW,
            Attacker,
            |it| it.error_to(it.address(Far), 3, 3),
            refused(),
        ),
        (
            "an error about nobody, to a pod of another node",
            V6,
            NO_FLOW,
            Attacker,
            |it| it.error_to(it.address(Far), 1, 4),
            refused(),
        ),
        (
            "an error about nobody, to another node",
            V4,
            NO_FLOW,
            Attacker,
            |it| it.error_to(it.node(1), 3, 3),
            refused(),
        ),
    ]
}

/// The attacker's kernel says of its own port that nobody listens, and it is heard.
fn refused() -> Control {
    (Near, |it| it.udp(Near, Attacker), Near)
}

fn in_ip(it: &Scene<'_>, to: IpAddr) -> Vec<u8> {
    it.other(to, if it.is_v4() { 4 } else { 41 }, &it.inner()[L3..])
}

fn in_gre(it: &Scene<'_>, to: IpAddr) -> Vec<u8> {
    let kind: [u8; 4] = if it.is_v4() {
        [0, 0, 8, 0]
    } else {
        [0, 0, 0x86, 0xdd]
    };
    it.other(to, 47, &[&kind, &it.inner()[L3..]].concat())
}

fn with_source(it: &Scene<'_>, source: IpAddr) -> Vec<u8> {
    let quoted = it.between(Near, Far).packet(&it.datagram());
    it.ip(source, it.address(Near))
        .frame(&Transport::Unreachable { quoted })
}

/// As if no router had passed it on (RFC 4861, 8.1).
fn on_link(mut frame: Vec<u8>) -> Vec<u8> {
    frame[L3 + 7] = 255;
    frame
}

fn redirect(it: &Scene<'_>) -> Vec<u8> {
    match (it.address(Attacker), it.address(Far)) {
        (IpAddr::V4(by), _) => it.error(5, 1, by.octets()),
        (IpAddr::V6(by), IpAddr::V6(of)) => {
            let body = [
                &[137, 0, 0, 0, 0, 0, 0, 0],
                &by.octets()[..],
                &of.octets(),
                &it.says,
            ]
            .concat();
            on_link(icmp(&it.between(Attacker, Near), body))
        }
        _ => unreachable!(),
    }
}
