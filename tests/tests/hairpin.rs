//! Ring 1: a pod that is its own backend, packet by packet, on the host.

use weir_common::event::Hook;
use weir_datapath::{Scratch, Verdict, from_pod};
use weir_tests::bytes::Bytes;
use weir_tests::edges::{sent, tcp, udp};
use weir_tests::frames::{ACK, Ip, L3, SYN, Transport};
use weir_tests::mix::Arrival;
use weir_tests::tables::Memory;
use weir_tests::world::{BACKEND_PORT, FAMILIES, Family, Host, OWN, SERVICE_PORT, world};

const TO_A: Verdict = Verdict::Redirect(1001);

fn run(memory: &Memory, arrival: &Arrival) -> (Verdict, Bytes) {
    assert_eq!(arrival.hook, Hook::FROM_POD);
    let mut packet = arrival.packet.clone();
    let verdict = from_pod(&mut packet, memory, &mut Scratch::default());
    (verdict, packet)
}

/// Hairpin: kube-proxy leaves no endpoint out either. The pod is sent what it sends, from the address that it asked, and its
/// policy has nothing to say ("a pod cannot block access to itself").
#[test]
fn a_pod_may_be_its_own_backend() {
    for family in FAMILIES {
        for (question, arrives, answer, returns) in [
            (
                tcp(1000, SERVICE_PORT, SYN),
                tcp(1000, BACKEND_PORT, SYN),
                tcp(BACKEND_PORT, 1000, SYN | ACK),
                tcp(SERVICE_PORT, 1000, SYN | ACK),
            ),
            (
                udp(1000, SERVICE_PORT),
                udp(1000, BACKEND_PORT),
                udp(BACKEND_PORT, 1000),
                udp(SERVICE_PORT, 1000),
            ),
        ] {
            let mut memory = world();
            memory.verdicts.clear();
            let mut turned = Ip::between(OWN.ip(family), Host::A.ip(family));
            turned.source_mac = Host::A.mac();
            // The plan, the ways, and a change of policy.
            for epoch in [1, 1, 1, 2, 2] {
                memory.epoch = epoch;
                let (verdict, after) = run(&memory, &sent(Host::A, OWN, family, &question));
                assert_eq!(verdict, TO_A, "{family:?}");
                assert_eq!(after.frame, turned.frame(&arrives), "{family:?}");
                let (verdict, after) = run(&memory, &sent(Host::A, OWN, family, &answer));
                assert_eq!(verdict, TO_A, "{family:?}");
                assert_eq!(after.frame, turned.frame(&returns), "{family:?}");
            }
            // An error about what has arrived becomes one about what was sent. The quoted transport's checksum stays.
            let quoted = &turned.frame(&arrives)[L3..];
            let error = Transport::Unreachable {
                quoted: quoted.to_vec(),
            };
            let (verdict, after) = run(&memory, &sent(Host::A, OWN, family, &error));
            assert_eq!(verdict, TO_A, "{family:?}");
            let asked = Ip::between(Host::A.ip(family), OWN.ip(family));
            let mut asked = asked.frame(&question)[L3..].to_vec();
            let at = checksum_at(&question, family);
            asked[at..at + 2].copy_from_slice(&quoted[at..at + 2]);
            let wanted = turned.frame(&Transport::Unreachable { quoted: asked });
            assert_eq!(after.frame, wanted, "{family:?}");
        }
    }
}

/// Where a transport's checksum is in an IP packet.
fn checksum_at(transport: &Transport, family: Family) -> usize {
    let header = if family == Family::V4 { 20 } else { 40 };
    header
        + match transport {
            Transport::Tcp { .. } => 16,
            _ => 6,
        }
}
