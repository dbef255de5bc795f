//! Packets in fragments and behind extension headers: made out of whole frames, and what must become of
//! them in the [`world`](crate::world).

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_datapath::Verdict;

use crate::edges::{Edge, sent, tcp, udp};
use crate::frames::{ACK, L3, SYN, Transport, checksum};
use crate::mix::Arrival;
use crate::stories::{Step, Story};
use crate::world::{Family, Host, NEAR, SERVICE_PORT};

/// Extension headers by number.
pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const DESTINATION_OPTIONS: u8 = 60;

/// How long an IP header is that has nothing behind it.
const fn header(frame: &[u8]) -> usize {
    match frame[L3] >> 4 {
        4 => (frame[L3] & 0xf) as usize * 4,
        _ => 40,
    }
}

/// A part of a whole frame: so many bytes of what follows the IP header, from `start` on, with a flag that says whether
/// more follow.
pub fn part(
    frame: &[u8],
    identification: u32,
    start: usize,
    length: usize,
    has_more: bool,
) -> Vec<u8> {
    let body = L3 + header(frame);
    let field = start as u16 | u16::from(has_more);
    let mut part = frame[..body].to_vec();
    let bytes = &frame[body + start..body + start + length];
    if frame[L3] >> 4 == 4 {
        part.extend(bytes);
        let total = (part.len() - L3) as u16;
        let field = field >> 3 | u16::from(has_more) << 13;
        part[L3 + 2..L3 + 4].copy_from_slice(&total.to_be_bytes());
        part[L3 + 4..L3 + 6].copy_from_slice(&(identification as u16).to_be_bytes());
        part[L3 + 6..L3 + 8].copy_from_slice(&field.to_be_bytes());
        part[L3 + 10..L3 + 12].fill(0);
        let sum = checksum(&[&part[L3..body]]);
        part[L3 + 10..L3 + 12].copy_from_slice(&sum.to_be_bytes());
    } else {
        part.extend([frame[L3 + 6], 0]);
        part.extend(field.to_be_bytes());
        part.extend(identification.to_be_bytes());
        part.extend(bytes);
        part[L3 + 6] = FRAGMENT;
        set_length(&mut part);
    }
    part
}

/// A whole frame in fragments of so many bytes, a multiple of eight.
pub fn split(frame: &[u8], identification: u32, size: usize) -> Vec<Vec<u8>> {
    let length = frame.len() - L3 - header(frame);
    (0..length)
        .step_by(size)
        .map(|start| {
            let rest = length - start;
            part(frame, identification, start, rest.min(size), rest > size)
        })
        .collect()
}

/// An IPv6 frame with headers, each a number and what it says, between the IP header and the rest.
pub fn extend(frame: &[u8], headers: &[(u8, &[u8])]) -> Vec<u8> {
    let body = L3 + 40;
    let mut extended = frame[..body].to_vec();
    let mut numbers = headers.iter().map(|(number, _)| *number);
    let transport = frame[L3 + 6];
    extended[L3 + 6] = numbers.next().unwrap_or(transport);
    for (_, says) in headers {
        extended.push(numbers.next().unwrap_or(transport));
        extended.extend(*says);
    }
    extended.extend(&frame[body..]);
    set_length(&mut extended);
    extended
}

fn set_length(frame: &mut [u8]) {
    let length = (frame.len() - L3 - 40) as u16;
    frame[L3 + 4..L3 + 6].copy_from_slice(&length.to_be_bytes());
}

/// Is it a fragment, or behind extension headers?
pub fn is_folded(frame: &[u8]) -> bool {
    match frame.get(12..L3) {
        Some([0x08, 0x00]) => frame
            .get(L3 + 6..L3 + 8)
            .is_some_and(|field| field[0] & 0x3f != 0 || field[1] != 0),
        Some([0x86, 0xdd]) => matches!(
            frame.get(L3 + 6),
            Some(&HOP_BY_HOP | &ROUTING | &FRAGMENT | &DESTINATION_OPTIONS)
        ),
        _ => false,
    }
}

/// A story whose packets all come in fragments of so many bytes.
pub fn in_fragments(story: Story, size: usize) -> Story {
    let steps = story.steps.into_iter().zip(1..).flat_map(|(step, number)| {
        let packets = split(&step.packet.frame, number, size);
        // A part of a packet is not refused with an answer.
        let after = step
            .after
            .filter(|_| !matches!(step.verdict, Verdict::Refuse(_)));
        let mut after = after.map(|after| split(&after, number, size).into_iter());
        packets.into_iter().zip(0..).map(move |(frame, place)| {
            let mut packet = step.packet.clone();
            packet.frame = frame;
            // What does not follow anything is the kernel's at an uplink.
            let verdict = match step.verdict {
                Verdict::Refuse(reason) if place == 0 => Verdict::Drop(reason),
                Verdict::Drop(_) | Verdict::Refuse(_)
                    if place > 0 && step.hook == Hook::FROM_NET =>
                {
                    Verdict::Pass
                }
                Verdict::Drop(_) | Verdict::Refuse(_) if place > 0 => {
                    Verdict::Drop(DropReason::Fragment)
                }
                verdict => verdict,
            };
            Step {
                hook: step.hook,
                packet,
                verdict,
                after: after.as_mut().and_then(Iterator::next),
                says: step.says,
            }
        })
    });
    Story {
        name: format!("{} in fragments of {size}", story.name),
        steps: steps.collect(),
    }
}

/// What a pod sends at the edges of what is passed on.
pub fn edges(family: Family) -> Vec<Edge> {
    let b = Verdict::Redirect(1002);
    let syn = sent(Host::A, NEAR, family, &tcp(1000, SERVICE_PORT, SYN));
    let datagram = sent(Host::A, NEAR, family, &udp(1000, SERVICE_PORT));
    let mut edges = Vec::new();
    let mut push = |name: String, like: &Arrival, frame: Vec<u8>, verdict| {
        let mut arrival = like.clone();
        arrival.packet.frame = frame;
        let name = format!("{name} ({family:?})");
        edges.push(Edge {
            name,
            arrival,
            verdict,
        });
    };
    let long = sent(
        Host::A,
        NEAR,
        family,
        &Transport::Tcp {
            ports: (1000, SERVICE_PORT),
            flags: SYN | ACK,
            payload: Vec::new(),
        },
    );
    for length in [0, 1, 4, 8, 16, 19] {
        let frame = part(&syn.packet.frame, 1, 0, length, true);
        let name = format!("{length} bytes of a TCP header");
        push(name, &syn, frame, Verdict::Drop(DropReason::Malformed));
    }
    for length in [0, 1, 7] {
        let frame = part(&datagram.packet.frame, 1, 0, length, true);
        let name = format!("{length} bytes of a UDP header");
        push(name, &datagram, frame, Verdict::Drop(DropReason::Malformed));
    }
    for (length, arrival) in [(16, &syn), (4, &datagram)] {
        let mut frame = part(&arrival.packet.frame, 1, 0, length, true);
        frame.extend([0xff; 40]);
        let name = format!("{length} bytes of a header, and padding");
        push(name, arrival, frame, Verdict::Drop(DropReason::Malformed));
    }
    let frame = part(&syn.packet.frame, 1, 0, 20, true);
    push("a TCP header".to_owned(), &syn, frame, b);
    let frame = part(&datagram.packet.frame, 1, 0, 8, true);
    push("a UDP header".to_owned(), &datagram, frame, b);
    let frame = part(&long.packet.frame, 1, 0, 20, true);
    let nobody = Verdict::Drop(DropReason::NoFlow);
    push("an answer to nobody".to_owned(), &long, frame, nobody);
    for start in [8, 16] {
        let frame = part(&syn.packet.frame, 1, start, 4, false);
        let name = format!("a fragment at {start} that nothing came before");
        push(name, &syn, frame, Verdict::Drop(DropReason::Fragment));
    }
    if family == Family::V6 {
        for (name, headers, verdict) in extended() {
            let headers: Vec<_> = headers.iter().map(|(n, says)| (*n, &says[..])).collect();
            let frame = extend(&syn.packet.frame, &headers);
            push(name.to_owned(), &syn, frame, verdict);
        }
        let mut frame = part(&syn.packet.frame, 1, 0, 20, true);
        frame[L3 + 5] = 4;
        let cut = Verdict::Drop(DropReason::Malformed);
        push("half of the header".to_owned(), &syn, frame, cut);
        let payload = vec![7; 24];
        let other = sent(
            Host::B,
            Host::Far,
            family,
            &Transport::Other {
                protocol: 47,
                payload,
            },
        );
        for (length, wanted) in [
            (16, Verdict::Pass),
            (15, Verdict::Drop(DropReason::Malformed)),
        ] {
            let mut frame = extend(&other.packet.frame, &[(DESTINATION_OPTIONS, &[1; 15])]);
            frame[L3 + 5] = length;
            let name = format!("16 bytes of options in {length}");
            push(name, &other, frame, wanted);
        }
    }
    edges
}

type Headers = Vec<(u8, Vec<u8>)>;

/// Extension headers in front of a SYN to [`NEAR`], and its fate.
fn extended() -> Vec<(&'static str, Headers, Verdict)> {
    let b = Verdict::Redirect(1002);
    let refused = Verdict::Drop(DropReason::ExtensionHeader);
    let options = |number, words: u8| {
        let length = 8 * usize::from(words) + 7;
        let mut says = vec![words, 1, 0];
        says.resize(length, 0);
        (number, says)
    };
    let routing = |kind, left| (ROUTING, vec![0, kind, left, 0, 0, 0, 0]);
    let atomic = (FRAGMENT, vec![0, 0, 0, 0, 0, 0, 9]);
    let (hop, to) = (HOP_BY_HOP, DESTINATION_OPTIONS);
    vec![
        ("hop-by-hop options", vec![options(hop, 0)], b),
        ("destination options", vec![options(to, 0)], b),
        ("64 bytes of options", vec![options(to, 7)], b),
        ("72 bytes of options", vec![options(to, 8)], refused),
        (
            "64 bytes in two headers",
            vec![options(hop, 3), options(to, 3)],
            b,
        ),
        (
            "72 bytes in two headers",
            vec![options(hop, 4), options(to, 3)],
            refused,
        ),
        ("four headers", vec![options(to, 0); 4], b),
        ("five headers", vec![options(to, 0); 5], refused),
        (
            "hop-by-hop options in second place",
            vec![options(to, 0), options(hop, 0)],
            refused,
        ),
        ("a route that is at its end", vec![routing(4, 0)], b),
        ("a route that goes on", vec![routing(4, 1)], refused),
        ("a route of type 0", vec![routing(0, 0)], refused),
        ("an atomic fragment", vec![atomic.clone()], b),
        (
            "an atomic fragment between options",
            vec![options(hop, 0), atomic.clone(), options(to, 0)],
            b,
        ),
        (
            "a fragment of a fragment",
            vec![atomic.clone(), atomic],
            refused,
        ),
        (
            "ESP behind options",
            vec![options(hop, 0), (50, vec![0; 7])],
            refused,
        ),
    ]
}
