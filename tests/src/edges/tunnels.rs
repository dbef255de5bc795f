//! What pods send through tunnels, and what comes out of them, with the mark of the packet that it was in.

use weir_common::DropReason;
use weir_common::way::Mark;
use weir_datapath::Verdict;

use super::{Push, received, sent, tcp, udp};
use crate::frames::{SYN, Transport};
use crate::mix::Arrival;
use crate::world::{BACKEND_PORT, Family, Host, UPLINK};

/// A packet at a pod's device, with the mark of what pods have sent, by the device of a pod or by another one.
fn marked_as_pods(from: Host, pod: Host, family: Family, by: u32) -> Arrival {
    let mut arrival = received(from, pod, family, &tcp(1000, BACKEND_PORT, SYN));
    arrival.packet.mark = Mark::PASSED.bits();
    arrival.packet.received_by = by;
    arrival
}

/// Tunnels to nodes, and what comes out of them.
pub(super) fn edges(family: Family, push: Push<'_>) {
    let tunnel = Verdict::Drop(DropReason::Tunnel);
    let spoofed = Verdict::Drop(DropReason::SpoofedAddress);
    for port in [4789, 6081, 8472] {
        for (to, fate) in [
            // The second lock sees to what comes out of the node's own.
            (Host::Node, Verdict::Pass),
            (Host::OtherNode, tunnel),
            (Host::B, Verdict::Redirect(1002)),
        ] {
            let arrival = sent(Host::A, to, family, &udp(1000, port));
            push(&format!("UDP {port} to {to:?}"), arrival, fate);
        }
        let arrival = sent(Host::A, Host::Node, family, &tcp(1000, port, SYN));
        push(&format!("TCP {port} to the node"), arrival, Verdict::Pass);
    }
    for protocol in [4, 41, 47] {
        for (to, fate) in [(Host::Node, Verdict::Pass), (Host::OtherNode, tunnel)] {
            let payload = vec![0x45; 40];
            let inner = Transport::Other { protocol, payload };
            let arrival = sent(Host::B, to, family, &inner);
            push(&format!("protocol {protocol} to {to:?}"), arrival, fate);
        }
    }
    for (name, from, by, fate) in [
        (
            "a pod of this node, by its device",
            Host::C,
            1003,
            Verdict::Drop(DropReason::EgressDenied),
        ),
        (
            "a pod of this node, by the uplink",
            Host::C,
            UPLINK,
            spoofed,
        ),
        (
            "a pod of this node, by another's device",
            Host::C,
            1001,
            spoofed,
        ),
        ("the receiver, by another's device", Host::B, 1001, spoofed),
        ("a pod elsewhere", Host::Far, 1001, spoofed),
        ("the world", Host::World, 1001, spoofed),
        ("the node, for a pod", Host::Node, 1001, Verdict::Pass),
    ] {
        let arrival = marked_as_pods(from, Host::B, family, by);
        push(&format!("what a pod has sent as {name}"), arrival, fate);
    }
}
