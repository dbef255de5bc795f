//! Packets that meet one program after the other on their way through the node's uplink, with what must
//! become of each in the [`world`](crate::world). Both rings run them: the host alone, and the host
//! against the kernel.

use weir_common::DropReason;
use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::way::Mark;
use weir_datapath::refuse::refuse;
use weir_datapath::{Scratch, Tables as _, Verdict, from_net, from_pod, to_net, to_pod};

use crate::bytes::{Bytes, leaving, marked, translated};
use crate::edges::{tcp, udp};
use crate::fragments::{in_fragments, split};
use crate::frames::{ACK, Echo, Ip, L3, SYN, Transport};
use crate::refusals::refusal;
use crate::tables::Memory;
use crate::world::{
    BACKEND_PORT, EMPTY, FAMILIES, Family, Host, NAT_PORT, NEAR, OWN, REMOTE, SERVICE_PORT, UPLINK,
    node_port,
};

/// Packets in their order, in tables that are fresh before the first.
#[derive(Clone, Debug)]
pub struct Story {
    pub name: String,
    pub steps: Vec<Step>,
}

/// One packet at one program.
#[derive(Clone, Debug)]
pub struct Step {
    pub hook: Hook,
    pub packet: Bytes,
    pub verdict: Verdict,
    /// The packet as it must be afterwards; `None` where it must be as it was.
    pub after: Option<Vec<u8>>,
    /// What it must tell the next program; `None` where that is what it was told.
    pub says: Option<Mark>,
}

/// What the program of a hook decides. A packet that is refused becomes the answer to it, or else is dropped.
pub fn decide(hook: Hook, packet: &mut Bytes, memory: &Memory, scratch: &mut Scratch) -> Verdict {
    let verdict = match hook {
        Hook::FROM_POD => from_pod(packet, memory, scratch),
        Hook::TO_POD => to_pod(packet, memory, scratch),
        Hook::TO_NET => to_net(packet, memory, scratch),
        _ => from_net(packet, memory, scratch),
    };
    let Verdict::Refuse(reason) = verdict else {
        return verdict;
    };
    if refuse(packet, scratch).is_err() {
        return Verdict::Drop(reason);
    }
    memory.count(Counter::Refusals);
    verdict
}

/// One end of a conversation.
type End = (Host, u16);

/// Makes packets of a protocol between two ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Talk {
    Tcp,
    Udp,
    /// UDP without a checksum, which only IPv4 allows.
    Bare,
    Echo,
    /// With a hundred bytes behind the header, to be sent in fragments.
    LongTcp,
    LongUdp,
    LongEcho,
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    There,
    Back,
}

impl Talk {
    fn ip(family: Family, from: Host, to: Host) -> Ip {
        let mut ip = Ip::between(from.ip(family), to.ip(family));
        ip.source_mac = from.mac();
        ip
    }

    fn frame(self, family: Family, way: Way, from: End, to: End) -> Vec<u8> {
        let payload = || (0..100).collect::<Vec<u8>>();
        let transport = match (self, way) {
            (Self::LongTcp, _) => Transport::Tcp {
                ports: (from.1, to.1),
                flags: if way == Way::There { SYN } else { SYN | ACK },
                payload: payload(),
            },
            (Self::LongUdp, _) => Transport::Udp {
                ports: (from.1, to.1),
                payload: payload(),
            },
            (Self::Tcp, Way::There) => tcp(from.1, to.1, SYN),
            (Self::Tcp, Way::Back) => tcp(from.1, to.1, SYN | ACK),
            (Self::Udp | Self::Bare, _) => udp(from.1, to.1),
            (Self::Echo | Self::LongEcho, Way::There) => Transport::Echo {
                way: Echo::Request,
                identifier: from.1,
            },
            (Self::Echo | Self::LongEcho, Way::Back) => Transport::Echo {
                way: Echo::Reply,
                identifier: to.1,
            },
        };
        let ip = Self::ip(family, from.0, to.0);
        let mut frame = ip.frame(&transport);
        if self == Self::LongEcho {
            frame = ip.with_more(frame, &payload());
        }
        if self == Self::Bare {
            frame[L3 + 26..L3 + 28].fill(0);
        }
        frame
    }
}

fn step(hook: Hook, packet: Bytes, verdict: Verdict) -> Step {
    Step {
        hook,
        packet,
        verdict,
        after: None,
        says: None,
    }
}

fn says(mark: Mark, step: Step) -> Step {
    Step {
        says: Some(mark),
        ..step
    }
}

fn becomes(hook: Hook, packet: Bytes, after: Vec<u8>) -> Step {
    Step {
        after: Some(after),
        ..step(hook, packet, Verdict::Pass)
    }
}

/// An ICMP error from somebody to somebody about a packet, whose first bytes it quotes.
fn unreachable(family: Family, from: Host, to: Host, about: &[u8]) -> Vec<u8> {
    let header = if family == Family::V4 { 20 } else { 40 };
    let quoted = about[L3..L3 + header + 8].to_vec();
    Talk::ip(family, from, to).frame(&Transport::Unreachable { quoted })
}

/// Copies the checksum of the quoted transport header, which translation leaves as it is.
fn with_quoted_checksum(mut error: Vec<u8>, of: &[u8], family: Family) -> Vec<u8> {
    let header = if family == Family::V4 { 20 } else { 40 };
    let (outer, at) = (L3 + header, L3 + header + 8 + header + 6);
    let was = [error[at], error[at + 1]];
    error[at..at + 2].copy_from_slice(&of[at..at + 2]);
    // One's complement: what the error's own sum has to give up and take on.
    let word = |bytes: [u8; 2]| u32::from(u16::from_be_bytes(bytes));
    let sum = word([error[outer + 2], error[outer + 3]]);
    let now = word([error[at], error[at + 1]]);
    let mut sum = (!sum & 0xffff) + (!word(was) & 0xffff) + now;
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    error[outer + 2..outer + 4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    error
}

/// Every story.
pub fn stories() -> Vec<Story> {
    let mut stories = Vec::new();
    for family in FAMILIES {
        for talk in [Talk::Tcp, Talk::Udp, Talk::Bare, Talk::Echo] {
            if talk != Talk::Bare || family == Family::V4 {
                stories.push(masqueraded(family, talk));
            }
        }
        stories.extend(others(family));
        stories.extend(from_outside(family, [Talk::Tcp, Talk::Udp]));
        for talk in [Talk::LongTcp, Talk::LongUdp, Talk::LongEcho] {
            stories.push(in_fragments(masqueraded(family, talk), 40));
        }
        let long = from_outside(family, [Talk::LongTcp, Talk::LongUdp]);
        stories.extend(long.into_iter().map(|story| in_fragments(story, 24)));
    }
    stories
}

fn masqueraded(family: Family, talk: Talk) -> Story {
    let (pod, node) = ((Host::B, 4000), (Host::Node, NAT_PORT));
    let is_echo = matches!(talk, Talk::Echo | Talk::LongEcho);
    let there = if is_echo { 0 } else { 443 };
    let world = (Host::World, there);
    let asked = talk.frame(family, Way::There, pod, world);
    let mut left = talk.frame(family, Way::There, node, world);
    left[6..12].copy_from_slice(&Host::B.mac());
    let reply = talk.frame(family, Way::Back, world, node);
    let answer = talk.frame(family, Way::Back, world, pod);
    let b = Host::B.ifindex().unwrap_or(0);
    let mut steps = vec![
        says(
            Mark::LEAVING,
            step(Hook::FROM_POD, Bytes::new(b, asked.clone()), Verdict::Pass),
        ),
        becomes(Hook::TO_NET, leaving(UPLINK, asked.clone()), left.clone()),
        // The second packet of the flow has the port of the first.
        says(
            Mark::LEAVING,
            step(Hook::FROM_POD, Bytes::new(b, asked.clone()), Verdict::Pass),
        ),
        becomes(Hook::TO_NET, leaving(UPLINK, asked.clone()), left.clone()),
        becomes(
            Hook::FROM_NET,
            Bytes::new(UPLINK, reply.clone()),
            answer.clone(),
        ),
        step(Hook::TO_POD, Bytes::new(b, answer.clone()), Verdict::Pass),
        // From anybody else the port means nothing.
        step(
            Hook::FROM_NET,
            Bytes::new(
                UPLINK,
                talk.frame(family, Way::Back, (Host::Farther, there), node),
            ),
            Verdict::Pass,
        ),
    ];
    if talk == Talk::Udp {
        // A router's error about what left reaches the pod and names it; the pod's own leaves with the
        // node's address inside and outside.
        let error = unreachable(family, Host::Farther, Host::Node, &left);
        let translated = unreachable(family, Host::Farther, Host::B, &asked);
        let translated = with_quoted_checksum(translated, &error, family);
        steps.push(becomes(
            Hook::FROM_NET,
            Bytes::new(UPLINK, error),
            translated.clone(),
        ));
        steps.push(step(Hook::TO_POD, Bytes::new(b, translated), Verdict::Pass));
        let error = unreachable(family, Host::B, Host::World, &answer);
        steps.push(says(
            Mark::LEAVING,
            step(Hook::FROM_POD, Bytes::new(b, error.clone()), Verdict::Pass),
        ));
        let mut translated = unreachable(family, Host::Node, Host::World, &reply);
        translated[6..12].copy_from_slice(&Host::B.mac());
        let translated = with_quoted_checksum(translated, &error, family);
        steps.push(becomes(Hook::TO_NET, leaving(UPLINK, error), translated));
    }
    Story {
        name: format!("{talk:?} of a pod leaves with the node's address ({family:?})"),
        steps,
    }
}

fn others(family: Family) -> Vec<Story> {
    let b = Host::B.ifindex().unwrap_or(0);
    let talk = |from: End, to: End| Talk::Udp.frame(family, Way::There, from, to);
    let sent = |frame: &[u8], mark| {
        let step = step(Hook::FROM_POD, Bytes::new(b, frame.to_vec()), Verdict::Pass);
        says(mark, step)
    };
    let leaves =
        |frame: &[u8], verdict| step(Hook::TO_NET, leaving(UPLINK, frame.to_vec()), verdict);
    let drop = Verdict::Drop;
    let world = (Host::World, 53);
    let to_far = talk((Host::B, 4000), (Host::Far, 53));
    let first = talk((Host::B, 4000), world);
    let second = talk((Host::B, 4001), world);
    let mut left = talk((Host::Node, NAT_PORT), world);
    left[6..12].copy_from_slice(&Host::B.mac());
    let sctp = Transport::Sctp { ports: (1, 2) };
    let sctp = Talk::ip(family, Host::B, Host::World).frame(&sctp);
    let from_node = talk((Host::Node, 4000), world);
    let fragment = |from: Host| split(&talk((from, 4000), world), 7, 8).swap_remove(1);
    let (of_pod, of_node) = (fragment(Host::B), fragment(Host::Node));
    let unknown = talk((Host::C, 1), world);
    let mut hidden = talk((Host::Node, NAT_PORT), world);
    hidden[6..12].copy_from_slice(&Host::C.mac());
    let stories = [
        (
            "what stays in the cluster keeps its source",
            vec![
                sent(&to_far, Mark::PASSED),
                step(
                    Hook::TO_NET,
                    marked(UPLINK, to_far.clone(), Mark::PASSED),
                    Verdict::Pass,
                ),
            ],
        ),
        (
            "no port is left towards a peer",
            vec![
                sent(&first, Mark::LEAVING),
                becomes(Hook::TO_NET, leaving(UPLINK, first), left),
                sent(&second, Mark::LEAVING),
                leaves(&second, drop(DropReason::NoNatPort)),
            ],
        ),
        (
            "a protocol that cannot be translated",
            vec![
                sent(&sctp, Mark::LEAVING),
                leaves(&sctp, drop(DropReason::NotTranslatable)),
            ],
        ),
        (
            "the node's own traffic is not looked at",
            vec![
                step(
                    Hook::TO_NET,
                    Bytes::new(UPLINK, from_node.clone()),
                    Verdict::Pass,
                ),
                step(
                    Hook::TO_NET,
                    Bytes::new(UPLINK, of_node.clone()),
                    Verdict::Pass,
                ),
                step(
                    Hook::TO_NET,
                    Bytes::new(UPLINK, vec![0xff; 60]),
                    Verdict::Pass,
                ),
                step(
                    Hook::FROM_NET,
                    Bytes::new(UPLINK, vec![0xff; 60]),
                    Verdict::Pass,
                ),
                step(
                    Hook::FROM_NET,
                    Bytes::new(UPLINK, of_node.clone()),
                    Verdict::Pass,
                ),
                // As the kernel marks what answers a marked packet (net.ipv4.fwmark_reflect).
                leaves(&from_node, Verdict::Pass),
                leaves(&of_node, Verdict::Pass),
            ],
        ),
        (
            "a pod's fragment that nothing came before does not leave with the pod's address",
            vec![leaves(&of_pod, drop(DropReason::Fragment))],
        ),
        (
            "a pod's packet that nothing came before leaves with the node's address",
            vec![becomes(Hook::TO_NET, leaving(UPLINK, unknown), hidden)],
        ),
    ];
    stories
        .into_iter()
        .map(|(name, steps)| Story {
            name: format!("{name} ({family:?})"),
            steps,
        })
        .collect()
}

/// Node ports, asked from outside.
fn from_outside(family: Family, talks: [Talk; 2]) -> Vec<Story> {
    let client = (Host::World, 5000);
    let b = Host::B.ifindex().unwrap_or(0);
    let drop = Verdict::Drop;
    let enters = |mark, frame: &[u8], after: Vec<u8>| {
        let step = becomes(Hook::FROM_NET, Bytes::new(UPLINK, frame.to_vec()), after);
        says(mark, step)
    };
    let arrives = |frame: &[u8], after: Vec<u8>| enters(Mark::TRANSLATED, frame, after);
    let goes_on = |frame: Vec<u8>| translated(UPLINK, frame);
    let replies = |frame: Vec<u8>| marked(UPLINK, frame, Mark::REPLY);
    let mut stories = Vec::new();
    for talk in talks {
        let there = |from, to| talk.frame(family, Way::There, from, to);
        let back = |from, to| talk.frame(family, Way::Back, from, to);
        let near = (Host::Node, node_port(NEAR));
        let pod = (Host::B, BACKEND_PORT);
        let mut answered = back(near, client);
        answered[6..12].copy_from_slice(&Host::B.mac());
        let local = vec![
            arrives(&there(client, near), there(client, pod)),
            step(
                Hook::TO_POD,
                translated(b, there(client, pod)),
                Verdict::Pass,
            ),
            // The source is replaced where the answer leaves.
            says(
                Mark::REPLY,
                step(
                    Hook::FROM_POD,
                    Bytes::new(b, back(pod, client)),
                    Verdict::Pass,
                ),
            ),
            becomes(Hook::TO_NET, replies(back(pod, client)), answered),
            arrives(&there(client, near), there(client, pod)),
        ];
        let port = (Host::Node, node_port(REMOTE));
        let (far, node) = ((Host::Far, BACKEND_PORT), (Host::Node, NAT_PORT));
        let remote = vec![
            arrives(&there(client, port), there(client, far)),
            becomes(Hook::TO_NET, goes_on(there(client, far)), there(node, far)),
            enters(Mark::REPLY, &back(far, node), back(far, client)),
            becomes(Hook::TO_NET, replies(back(far, client)), back(port, client)),
            arrives(&there(client, port), there(client, far)),
            becomes(Hook::TO_NET, goes_on(there(client, far)), there(node, far)),
        ];
        // A device behind the node takes less: the node's own error names what the client knows, and one about anybody else's
        // packet goes as it is.
        let says_so = |about: &[u8]| Bytes {
            received_by: 0,
            ..Bytes::new(UPLINK, unreachable(family, Host::Node, Host::World, about))
        };
        let error = says_so(&there(client, far));
        let wanted = says_so(&there(client, port)).frame;
        let wanted = with_quoted_checksum(wanted, &error.frame, family);
        let own = says_so(&there(client, (Host::Node, 7)));
        let too_big = vec![
            arrives(&there(client, port), there(client, far)),
            becomes(Hook::TO_NET, error, wanted),
            step(Hook::TO_NET, own, Verdict::Pass),
        ];
        let asks = there(client, (Host::Node, node_port(EMPTY)));
        let empty = step(
            Hook::FROM_NET,
            Bytes::new(UPLINK, asks.clone()),
            Verdict::Refuse(DropReason::NoBackend),
        );
        let empty = Step {
            after: Some(refusal(&asks)),
            ..empty
        };
        // A isolates itself from strangers.
        let (closed, a) = ((Host::Node, node_port(OWN)), (Host::A, BACKEND_PORT));
        let ifindex = Host::A.ifindex().unwrap_or(0);
        let denied = vec![
            arrives(&there(client, closed), there(client, a)),
            step(
                Hook::TO_POD,
                translated(ifindex, there(client, a)),
                drop(DropReason::IngressDenied),
            ),
        ];
        let cluster_ip = there(client, (NEAR, SERVICE_PORT));
        let cluster_ip = step(
            Hook::FROM_NET,
            Bytes::new(UPLINK, cluster_ip),
            Verdict::Pass,
        );
        for (name, steps) in [
            ("a node port with its backend here", local),
            ("a node port with its backend elsewhere", remote),
            ("the node's own error about a node port", too_big),
            ("a node port without a backend", vec![empty]),
            ("a node port of a pod that takes no strangers", denied),
            ("a cluster IP is nothing to those outside", vec![cluster_ip]),
        ] {
            // What an error quotes may be cut where it is split.
            if name.contains("error") && matches!(talk, Talk::LongTcp | Talk::LongUdp) {
                continue;
            }
            stories.push(Story {
                name: format!("{name}, {talk:?} ({family:?})"),
                steps,
            });
        }
    }
    stories
}
