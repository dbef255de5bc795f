//! Frames at the edges of what the datapath accepts, with what must become of each in the
//! [`world`](crate::world). Both rings run them: the host alone, and the host against the kernel.

mod tunnels;

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_datapath::Verdict;

use crate::bytes::Bytes;
use crate::fragments;
use crate::frames::{ACK, Echo, Ip, L3, RST, SYN, Transport};
use crate::mix::Arrival;
use crate::world::{
    BACKEND_PORT, EMPTY, FAMILIES, Family, Host, NEAR, OWN, REMOTE, SERVICE_PORT, UPLINK,
};

/// One frame and its fate, in fresh tables.
#[derive(Clone, Debug)]
pub struct Edge {
    pub name: String,
    pub arrival: Arrival,
    pub verdict: Verdict,
}

/// A TCP header without payload.
pub fn tcp(source: u16, destination: u16, flags: u8) -> Transport {
    Transport::Tcp {
        ports: (source, destination),
        flags,
        payload: Vec::new(),
    }
}

/// A datagram with a few bytes.
pub fn udp(source: u16, destination: u16) -> Transport {
    Transport::Udp {
        ports: (source, destination),
        payload: b"weir".to_vec(),
    }
}

/// A frame that a pod sends.
pub fn sent(pod: Host, to: Host, family: Family, transport: &Transport) -> Arrival {
    let mut ip = Ip::between(pod.ip(family), to.ip(family));
    ip.source_mac = pod.mac();
    Arrival {
        hook: Hook::FROM_POD,
        packet: Bytes::new(pod.ifindex().unwrap_or(0), ip.frame(transport)),
    }
}

/// A frame that comes to a pod's device.
pub fn received(from: Host, pod: Host, family: Family, transport: &Transport) -> Arrival {
    let ip = Ip::between(from.ip(family), pod.ip(family));
    let packet = Bytes::new(pod.ifindex().unwrap_or(0), ip.frame(transport));
    Arrival {
        hook: Hook::TO_POD,
        packet: Bytes {
            received_by: if from == Host::Node { 0 } else { UPLINK },
            ..packet
        },
    }
}

/// Every edge.
pub fn edges() -> Vec<Edge> {
    let mut edges = Vec::new();
    for family in FAMILIES {
        let mut push = |name: &str, arrival, verdict| {
            edges.push(Edge {
                name: format!("{name} ({family:?})"),
                arrival,
                verdict,
            });
        };
        plain(family, &mut push);
        tunnels::edges(family, &mut push);
        headers(family, &mut push);
        checksums(family, &mut push);
        match family {
            Family::V4 => only_v4(&mut push),
            Family::V6 => only_v6(&mut push),
        }
        edges.extend(fragments::edges(family));
    }
    edges
}

type Push<'a> = &'a mut dyn FnMut(&str, Arrival, Verdict);

fn spoiled(mut arrival: Arrival, spoil: impl FnOnce(&mut Vec<u8>)) -> Arrival {
    spoil(&mut arrival.packet.frame);
    arrival
}

fn plain(family: Family, push: Push<'_>) {
    let b = Verdict::Redirect(1002);
    let drop = Verdict::Drop;
    let syn = tcp(1000, BACKEND_PORT, SYN);
    let to_service = tcp(1000, SERVICE_PORT, SYN);
    for (name, arrival, verdict) in [
        (
            "to a pod of the node",
            sent(Host::A, Host::B, family, &syn),
            b,
        ),
        (
            "to a pod elsewhere",
            sent(Host::A, Host::Far, family, &syn),
            Verdict::Pass,
        ),
        ("to a service", sent(Host::A, NEAR, family, &to_service), b),
        (
            "to a service elsewhere",
            sent(Host::A, REMOTE, family, &udp(1, SERVICE_PORT)),
            Verdict::Pass,
        ),
        (
            "to a service without backends",
            sent(Host::A, EMPTY, family, &to_service),
            Verdict::Refuse(DropReason::NoBackend),
        ),
        (
            "a datagram to a service without backends",
            sent(Host::A, EMPTY, family, &udp(1000, SERVICE_PORT)),
            Verdict::Refuse(DropReason::NoBackend),
        ),
        (
            "to itself through a service",
            sent(Host::A, OWN, family, &to_service),
            Verdict::Redirect(1001),
        ),
        (
            "to a service's other port",
            sent(Host::B, NEAR, family, &tcp(1000, 81, SYN)),
            Verdict::Refuse(DropReason::NoService),
        ),
        (
            "port 0",
            sent(Host::B, Host::Far, family, &tcp(0, 0, SYN)),
            Verdict::Pass,
        ),
        (
            "to itself",
            sent(Host::C, Host::C, family, &syn),
            Verdict::Redirect(1003),
        ),
        (
            "to a pod being set up",
            sent(Host::B, Host::D, family, &syn),
            drop(DropReason::NoLease),
        ),
        (
            "to the node",
            sent(Host::C, Host::Node, family, &syn),
            Verdict::Pass,
        ),
        (
            "from the node",
            received(Host::Node, Host::C, family, &syn),
            Verdict::Pass,
        ),
        (
            "egress closed",
            sent(Host::C, Host::B, family, &syn),
            drop(DropReason::EgressDenied),
        ),
        (
            "egress without a row",
            sent(Host::C, Host::World, family, &syn),
            drop(DropReason::NoVerdict),
        ),
        (
            "ingress closed",
            received(Host::World, Host::A, family, &syn),
            drop(DropReason::IngressDenied),
        ),
        (
            "ingress of the receiver",
            sent(Host::A, Host::C, family, &tcp(1, 9, SYN)),
            drop(DropReason::EgressDenied),
        ),
        (
            "port allowed",
            sent(Host::A, Host::C, family, &syn),
            Verdict::Redirect(1003),
        ),
        (
            "port in a range",
            sent(Host::A, Host::C, family, &tcp(1, 1007, SYN)),
            Verdict::Redirect(1003),
        ),
        (
            "port behind the range",
            sent(Host::A, Host::C, family, &tcp(1, 1008, SYN)),
            drop(DropReason::EgressDenied),
        ),
        (
            "port of an allowed protocol denied",
            sent(Host::A, Host::C, family, &udp(1, 53)),
            drop(DropReason::EgressDenied),
        ),
        (
            "answer to nobody",
            sent(Host::B, Host::Far, family, &tcp(80, 1, SYN | ACK)),
            drop(DropReason::NoFlow),
        ),
        (
            "reset of nothing",
            received(Host::Far, Host::B, family, &tcp(80, 1, RST)),
            drop(DropReason::NoFlow),
        ),
        (
            "midstream",
            sent(Host::B, Host::Far, family, &tcp(80, 1, ACK)),
            Verdict::Pass,
        ),
        (
            "not for the pod",
            {
                let mut arrival = received(Host::Far, Host::A, family, &syn);
                arrival.packet.ifindex = 1002;
                arrival
            },
            drop(DropReason::NotForPod),
        ),
        (
            "without a lease",
            {
                let mut arrival = sent(Host::A, Host::B, family, &syn);
                arrival.packet.ifindex = 1;
                arrival
            },
            drop(DropReason::NoLease),
        ),
        (
            "another's address",
            {
                let mut arrival = sent(Host::A, Host::B, family, &syn);
                arrival.packet.ifindex = 1003;
                arrival
            },
            drop(DropReason::SpoofedAddress),
        ),
        (
            "an echo",
            sent(
                Host::A,
                Host::B,
                family,
                &Transport::Echo {
                    way: Echo::Request,
                    identifier: 7,
                },
            ),
            b,
        ),
        (
            "an echo's answer unasked",
            sent(
                Host::A,
                Host::B,
                family,
                &Transport::Echo {
                    way: Echo::Reply,
                    identifier: 7,
                },
            ),
            drop(DropReason::NoFlow),
        ),
        (
            "an error about nothing",
            sent(
                Host::A,
                Host::B,
                family,
                &Transport::Unreachable {
                    quoted: Ip::between(Host::B.ip(family), Host::A.ip(family)).packet(&udp(5, 6)),
                },
            ),
            drop(DropReason::NoFlow),
        ),
        (
            "a tunnel",
            sent(
                Host::B,
                Host::Far,
                family,
                &Transport::Other {
                    protocol: 47,
                    payload: vec![0; 8],
                },
            ),
            Verdict::Pass,
        ),
        (
            "the other family's ICMP",
            sent(
                Host::B,
                Host::Far,
                family,
                &Transport::Other {
                    protocol: if family == Family::V4 { 58 } else { 1 },
                    payload: vec![8, 0, 0, 0, 0, 0, 0, 0],
                },
            ),
            drop(DropReason::Malformed),
        ),
    ] {
        push(name, arrival, verdict);
    }
}

fn headers(family: Family, push: Push<'_>) {
    let syn = tcp(1000, BACKEND_PORT, SYN);
    let good = || sent(Host::B, Host::Far, family, &syn);
    let l4 = L3 + if family == Family::V4 { 20 } else { 40 };
    let drop = Verdict::Drop;
    push(
        "wrong source MAC",
        spoiled(good(), |f| f[11] ^= 1),
        drop(DropReason::SpoofedMac),
    );
    for ethertype in [[0x81, 0], [0x88, 0xa8], [0x91, 0]] {
        let tagged = spoiled(good(), |f| f[12..14].copy_from_slice(&ethertype));
        push(
            "VLAN tag in the frame",
            tagged,
            drop(DropReason::VlanTagged),
        );
    }
    push(
        "ARP",
        spoiled(good(), |f| f[12..14].copy_from_slice(&[8, 6])),
        drop(DropReason::NotIp),
    );
    push(
        "wrong version",
        spoiled(good(), |f| f[L3] ^= 0x10),
        drop(DropReason::Malformed),
    );
    push(
        "TCP header of 16 bytes",
        spoiled(good(), |f| f[l4 + 12] = 0x40),
        drop(DropReason::Malformed),
    );
    push(
        "TCP header beyond the end",
        spoiled(good(), |f| f[l4 + 12] = 0x60),
        drop(DropReason::Malformed),
    );
    push(
        "padded frame",
        spoiled(good(), |f| f.extend([0; 10])),
        Verdict::Pass,
    );
    let datagram = || sent(Host::B, Host::Far, family, &udp(1, 2));
    push(
        "UDP length 7",
        spoiled(datagram(), |f| f[l4 + 5] = 7),
        drop(DropReason::Malformed),
    );
    push(
        "UDP length beyond the end",
        spoiled(datagram(), |f| f[l4 + 5] = 13),
        drop(DropReason::Malformed),
    );
    push(
        "TCP cut short",
        spoiled(good(), |f| f.truncate(l4 + 19)),
        drop(DropReason::Malformed),
    );
}

fn checksums(family: Family, push: Push<'_>) {
    let l4 = L3 + if family == Family::V4 { 20 } else { 40 };
    let to_b = Verdict::Redirect(1002);
    for value in [0, 0xff] {
        let segment = sent(Host::A, NEAR, family, &tcp(1000, SERVICE_PORT, SYN));
        let spoil = |frame: &mut Vec<u8>| frame[l4 + 16..l4 + 18].fill(value);
        push(
            &format!("TCP checksum {value:#x}"),
            spoiled(segment, spoil),
            to_b,
        );
        let datagram = sent(Host::A, NEAR, family, &udp(1000, SERVICE_PORT));
        let spoil = |frame: &mut Vec<u8>| frame[l4 + 6..l4 + 8].fill(value);
        push(
            &format!("UDP checksum {value:#x}"),
            spoiled(datagram, spoil),
            to_b,
        );
    }
}

/// Options by name, in a SYN to a pod of the node.
fn only_v4_options(push: Push<'_>) {
    let to_b = Verdict::Redirect(1002);
    let refused = Verdict::Drop(DropReason::ExtensionHeader);
    let malformed = Verdict::Drop(DropReason::Malformed);
    let route = |kind| [kind, 7, 4, 10, 9, 9, 9, 0];
    for (name, options, fate) in [
        ("record route", route(7), to_b),
        ("timestamps", [68, 8, 5, 0, 0, 0, 0, 0], to_b),
        ("router alert", [148, 4, 0, 0, 0, 0, 0, 0], to_b),
        ("a loose source route", route(131), refused),
        ("a strict source route", route(137), refused),
        (
            "a source route after another option",
            [1, 7, 3, 4, 131, 3, 4, 0],
            refused,
        ),
        (
            "a source route after the end",
            [0, 131, 7, 4, 10, 9, 9, 9],
            to_b,
        ),
        ("an option of no bytes", [7, 0, 0, 0, 0, 0, 0, 0], malformed),
        ("an option of one byte", [7, 1, 0, 0, 0, 0, 0, 0], malformed),
    ] {
        let mut ip = Ip::between(Host::A.ip(Family::V4), NEAR.ip(Family::V4));
        ip.source_mac = Host::A.mac();
        ip.options = options.len();
        let frame = ip.frame(&tcp(1000, SERVICE_PORT, SYN));
        let arrival = Arrival {
            hook: Hook::FROM_POD,
            packet: Bytes::new(1001, frame),
        };
        // With no sum of the header: programs do not look at it, and correct no bytes but those that they change.
        let write = |frame: &mut Vec<u8>| frame[L3 + 20..L3 + 28].copy_from_slice(&options);
        push(name, spoiled(arrival, write), fate);
    }
}

fn only_v4(push: Push<'_>) {
    let drop = Verdict::Drop;
    let syn = tcp(1000, SERVICE_PORT, SYN);
    for (options, fate) in [
        (4, Verdict::Redirect(1002)),
        (8, Verdict::Redirect(1002)),
        (40, drop(DropReason::ExtensionHeader)),
    ] {
        let mut ip = Ip::between(Host::A.ip(Family::V4), NEAR.ip(Family::V4));
        ip.source_mac = Host::A.mac();
        ip.options = options;
        let arrival = Arrival {
            hook: Hook::FROM_POD,
            packet: Bytes::new(1001, ip.frame(&syn)),
        };
        push(&format!("{options} bytes of options"), arrival, fate);
    }
    only_v4_options(push);
    let good = || sent(Host::A, NEAR, Family::V4, &syn);
    push(
        "IHL 4",
        spoiled(good(), |f| f[L3] = 0x44),
        drop(DropReason::Malformed),
    );
    push(
        "IHL 15 without the bytes",
        spoiled(good(), |f| f[L3] = 0x4f),
        drop(DropReason::Malformed),
    );
    push(
        "first fragment",
        spoiled(good(), |f| f[L3 + 6] = 0x20),
        Verdict::Redirect(1002),
    );
    push(
        "last fragment",
        spoiled(good(), |f| f[L3 + 7] = 1),
        drop(DropReason::Fragment),
    );
    push(
        "total length 0",
        spoiled(good(), |f| f[L3 + 2..L3 + 4].fill(0)),
        drop(DropReason::Malformed),
    );
    push(
        "total length 41",
        spoiled(good(), |f| f[L3 + 3] = 41),
        drop(DropReason::Malformed),
    );
    for (octet, side) in [
        (0, 12),
        (127, 12),
        (224, 16),
        (255, 16),
        (240, 12),
        (127, 16),
    ] {
        let martian = spoiled(good(), |f| f[L3 + side] = octet);
        push(
            &format!("{octet}/8 at {side}"),
            martian,
            drop(DropReason::Martian),
        );
    }
}

fn only_v6(push: Push<'_>) {
    let drop = Verdict::Drop;
    let syn = tcp(1000, SERVICE_PORT, SYN);
    let good = || sent(Host::A, NEAR, Family::V6, &syn);
    // An IPv6 packet that names an IPv4 service must not reach it.
    let mapped = |side: usize, v4: [u8; 4]| {
        spoiled(good(), |f| {
            f[L3 + side..L3 + side + 10].fill(0);
            f[L3 + side + 10..L3 + side + 12].fill(0xff);
            f[L3 + side + 12..L3 + side + 16].copy_from_slice(&v4);
        })
    };
    push(
        "mapped destination",
        mapped(24, [10, 96, 0, 1]),
        drop(DropReason::MappedAddress),
    );
    push(
        "mapped source",
        mapped(8, [10, 0, 0, 1]),
        drop(DropReason::MappedAddress),
    );
    for header in [0, 43, 50, 51, 59, 60, 135, 139, 140, 253, 254] {
        let extended = spoiled(good(), |f| f[L3 + 6] = header);
        push(
            &format!("next header {header}"),
            extended,
            drop(DropReason::ExtensionHeader),
        );
    }
    push(
        "fragment header",
        spoiled(good(), |f| f[L3 + 6] = 44),
        drop(DropReason::Fragment),
    );
    push(
        "payload length 0",
        spoiled(good(), |f| f[L3 + 4..L3 + 6].fill(0)),
        drop(DropReason::Malformed),
    );
    push(
        "payload length 21",
        spoiled(good(), |f| f[L3 + 5] = 21),
        drop(DropReason::Malformed),
    );
    let replaced = |side: usize, last: u8, first: u8| {
        spoiled(good(), |f| {
            f[L3 + side..L3 + side + 16].fill(0);
            f[L3 + side] = first;
            f[L3 + side + 15] = last;
        })
    };
    push(
        "unspecified source",
        replaced(8, 0, 0),
        drop(DropReason::Martian),
    );
    push(
        "loopback source",
        replaced(8, 1, 0),
        drop(DropReason::Martian),
    );
    push(
        "loopback destination",
        replaced(24, 1, 0),
        drop(DropReason::Martian),
    );
    push(
        "multicast",
        replaced(24, 2, 0xff),
        drop(DropReason::Martian),
    );
}
