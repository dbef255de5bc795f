//! Conversations as the sweep finds them, counted: by kind and state, by table, and the node's ports by whom they lead
//! to. Of a row it looks at nothing but that row; when a row goes is `flows.rs`'s.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use weir_common::event::Hook;
use weir_common::way::{Mark, Peer, Plan, Step, Way, WayKey, WayState};
use weir_common::{Addr, Protocol, limits};

use super::clock;
use super::heaviest::Heaviest;

/// The protocol of a conversation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    Tcp,
    Udp,
    /// Of both families.
    Icmp,
    Other,
}

/// What this node does for a conversation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// It goes as it is; also one whose service was replaced by a backend at the socket.
    Direct,
    /// A pod asks a service packet by packet.
    Service,
    /// Somebody outside asks a service: external traffic.
    External,
    /// A pod asks somebody outside of the cluster, by a service or not, and gets the node's address.
    Masquerade,
}

/// How far a conversation is: states of `nf_conntrack` where they are the same.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum State {
    /// TCP, not answered.
    SynSent,
    /// TCP from elsewhere: answered, and its opener has not acknowledged that.
    SynRecv,
    Established,
    /// One side has said goodbye: `FIN_WAIT` and `CLOSE_WAIT`, which one way alone does not tell apart.
    HalfClosed,
    /// Both sides have, and the last acknowledgement has not passed.
    LastAck,
    /// Broken off by a RST, or refused with one.
    Close,
    /// Not TCP, a plan: not answered.
    Unreplied,
    /// Likewise, answered.
    Replied,
    /// Not TCP: it has had its third packet, and has ways.
    Stream,
}

impl Transport {
    pub const ALL: [Self; 4] = [Self::Tcp, Self::Udp, Self::Icmp, Self::Other];

    fn of(protocol: Protocol) -> Self {
        match protocol {
            Protocol::TCP => Self::Tcp,
            Protocol::UDP => Self::Udp,
            Protocol::ICMP | Protocol::ICMPV6 => Self::Icmp,
            _ => Self::Other,
        }
    }

    pub const fn label(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
            Self::Other => "other",
        }
    }
}

impl Kind {
    pub const ALL: [Self; 4] = [
        Self::Direct,
        Self::Service,
        Self::External,
        Self::Masquerade,
    ];

    pub const fn label(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Service => "service",
            Self::External => "external",
            Self::Masquerade => "masquerade",
        }
    }

    /// What the opener's way says. Nothing of what leaves with the node's address, which is counted where it came in; nor
    /// of what comes to a pod, of which [`Self::back`] tells.
    fn there(key: &WayKey, step: &Step) -> Option<Self> {
        match key.hook {
            Hook::FROM_POD if step.mark == Mark::LEAVING => Some(Self::Masquerade),
            Hook::FROM_POD if step.rewrite.is_destination() => Some(Self::Service),
            Hook::FROM_POD => Some(Self::Direct),
            Hook::FROM_NET => Some(Self::External),
            _ => None,
        }
    }

    /// What the way of the answers says of a conversation that comes to a pod from elsewhere: if they are to be translated
    /// where they leave, it was counted where it came in.
    fn back(step: &Step) -> Option<Self> {
        (step.other == Hook::TO_POD && step.mark != Mark::REPLY).then_some(Self::Direct)
    }
}

impl State {
    pub const ALL: [Self; 9] = [
        Self::SynSent,
        Self::SynRecv,
        Self::Established,
        Self::HalfClosed,
        Self::LastAck,
        Self::Close,
        Self::Unreplied,
        Self::Replied,
        Self::Stream,
    ];

    pub const fn label(self) -> &'static str {
        match self {
            Self::SynSent => "syn_sent",
            Self::SynRecv => "syn_recv",
            Self::Established => "established",
            Self::HalfClosed => "half_closed",
            Self::LastAck => "last_ack",
            Self::Close => "close",
            Self::Unreplied => "unreplied",
            Self::Replied => "replied",
            Self::Stream => "stream",
        }
    }

    const fn is_of_tcp(self) -> bool {
        !matches!(self, Self::Unreplied | Self::Replied | Self::Stream)
    }

    fn of_way(protocol: Protocol, bits: u32) -> Self {
        match protocol {
            Protocol::TCP => Self::of_answered(bits).unwrap_or(Self::Established),
            _ => Self::Stream,
        }
    }

    fn of_plan(plan: &Plan) -> Self {
        let (there, back) = (&plan.way, &plan.back);
        if plan.key.protocol != Protocol::TCP {
            return match back.packets.load(Relaxed) {
                0 => Self::Unreplied,
                _ => Self::Replied,
            };
        }
        let bits = there.state.load(Relaxed) | back.state.load(Relaxed) & WayState::RESET;
        let is_proven = bits & WayState::PROVEN != 0;
        if bits & WayState::RESET != 0 {
            Self::Close
        } else if !is_proven && there.others_end.load(Relaxed) == 0 {
            Self::SynSent
        } else {
            let open = if is_proven {
                Self::Established
            } else {
                Self::SynRecv
            };
            Self::of_answered(bits).unwrap_or(open)
        }
    }

    /// What goodbyes and RSTs have made of a connection; nothing if there were none.
    fn of_answered(bits: u32) -> Option<Self> {
        if bits & WayState::RESET != 0 {
            Some(Self::Close)
        } else if WayState::is_closed(bits) {
            Some(Self::LastAck)
        } else {
            WayState::is_half_closed(bits).then_some(Self::HalfClosed)
        }
    }
}

/// Tables of conversations, with their capacities in rows.
const TABLES: [(&str, u32); 4] = [
    ("TCP_PLANS", limits::PLANS),
    ("OTHER_PLANS", limits::PLANS),
    ("TCP_WAYS", limits::TCP_WAYS),
    ("OTHER_WAYS", limits::OTHER_WAYS),
];

/// How many peers are named.
const NAMED: usize = 10;

/// Whom a port of the node leads to. The same port serves for another protocol, peer or address of the node.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct Towards {
    node: Addr,
    peer: Peer,
    protocol: Protocol,
}

/// What is counted while the tables are walked.
#[derive(Debug, Default)]
pub(super) struct Counting {
    conversations: [[[u64; State::ALL.len()]; Kind::ALL.len()]; Transport::ALL.len()],
    evictable: u64,
    rows: [usize; TABLES.len()],
    ports: u64,
    peers: Heaviest<Towards>,
    /// Of pods of this node alone, by their addresses.
    pods: Heaviest<(Towards, Addr)>,
}

impl Counting {
    /// A row that stays.
    pub(super) fn plan(&mut self, plan: &Plan) {
        let is_other = plan.key.protocol != Protocol::TCP;
        self.rows[usize::from(is_other)] += 1;
        let kind = Kind::there(&plan.key, &plan.way.step).or_else(|| Kind::back(&plan.back.step));
        let state = State::of_plan(plan);
        self.count(plan.key.protocol, kind, state);
        let is_proven = plan.way.state.load(Relaxed) & WayState::PROVEN != 0;
        let is_open = !matches!(state, State::Close | State::LastAck);
        if !is_other && is_proven && is_open {
            self.evictable += 1;
        }
        self.port(&plan.key, &plan.way);
    }

    /// A row that stays.
    pub(super) fn way(&mut self, key: &WayKey, way: &Way) {
        self.rows[2 + usize::from(key.protocol != Protocol::TCP)] += 1;
        let bits = way.state.load(Relaxed);
        let state = State::of_way(key.protocol, bits);
        if bits & WayState::OPENER != 0 {
            self.count(key.protocol, Kind::there(key, &way.step), state);
            self.port(key, way);
        } else {
            self.count(key.protocol, Kind::back(&way.step), state);
        }
    }

    fn count(&mut self, protocol: Protocol, kind: Option<Kind>, state: State) {
        if let Some(kind) = kind {
            let transport = Transport::of(protocol);
            self.conversations[transport as usize][kind as usize][state as usize] += 1;
        }
    }

    /// The port of the node that a conversation takes where it leaves, if it takes one.
    fn port(&mut self, key: &WayKey, way: &Way) {
        if key.hook != Hook::TO_NET || way.state.load(Relaxed) & WayState::MASQUERADE == 0 {
            return;
        }
        let towards = Towards {
            node: way.step.addr,
            peer: key.destination(),
            protocol: key.protocol,
        };
        self.ports += 1;
        self.peers.see(towards);
        if way.owner != 0 {
            self.pods.see((towards, key.source));
        }
    }

    /// What was counted until now.
    pub(super) fn end(self) -> Tally {
        let pods = self.pods.all();
        let named = self.peers.first(NAMED).into_iter();
        let peers = named.map(|(towards, ports)| PeerPorts {
            peer: towards.peer,
            protocol: towards.protocol,
            ports,
            pod: pods
                .iter()
                .filter(|((of, _), _)| *of == towards)
                .map(|((_, pod), ports)| (*ports, *pod))
                .max(),
        });
        Tally {
            at: clock::monotonic(),
            evictable: self.evictable,
            rows: self.rows,
            ports: Ports {
                used: self.ports,
                peer_max: self.peers.most(),
                pod_max: self.pods.most(),
                error: self.peers.error().max(self.pods.error()),
                peers: peers.collect(),
            },
            conversations: self.conversations,
        }
    }
}

/// What a sweep has left. Programs go on meanwhile: a conversation that was answered while it was under way may be counted twice,
/// as a plan and as ways.
#[derive(Debug)]
pub struct Tally {
    /// When it ended.
    at: Duration,
    conversations: [[[u64; State::ALL.len()]; Kind::ALL.len()]; Transport::ALL.len()],
    /// Rows of open connections that live in the table of plans, which pushes out: `TCP_WAYS` had no room. One that is translated
    /// at an uplink, too, has two.
    pub evictable: u64,
    rows: [usize; TABLES.len()],
    pub ports: Ports,
}

/// Ports of the node's addresses that stand for others.
#[derive(Debug, Default)]
pub struct Ports {
    /// Of all protocols; a port that leads to two peers counts for each.
    pub used: u64,
    /// The most towards one peer; and those of one pod of this node towards one. Too high by `error` at most.
    pub peer_max: u64,
    pub pod_max: u64,
    /// 0 while there are no more than 1,024 peers, and as many pairs of a pod and a peer; else at most a 1,025th of `used`.
    pub error: u64,
    /// The ten with the most ports, the first first.
    pub peers: Vec<PeerPorts>,
}

/// Ports of the node that lead to one peer.
#[derive(Clone, Copy, Debug)]
pub struct PeerPorts {
    pub peer: Peer,
    pub protocol: Protocol,
    /// Too low by [`Ports::error`] at most.
    pub ports: u64,
    /// How many of them the pod of this node has that has the most, and its address.
    pub pod: Option<(u64, Addr)>,
}

impl Tally {
    /// When it was made, by the monotonic clock.
    pub(super) const fn at(&self) -> Duration {
        self.at
    }

    /// Every number of conversations that may be other than 0: each counted once, however many rows it takes.
    pub fn conversations(&self) -> impl Iterator<Item = (Transport, Kind, State, u64)> {
        Transport::ALL.into_iter().flat_map(move |transport| {
            Kind::ALL.into_iter().flat_map(move |kind| {
                let states = State::ALL.into_iter();
                states.filter_map(move |state| {
                    let count =
                        self.conversations[transport as usize][kind as usize][state as usize];
                    (count > 0 || can_be(transport, kind, state))
                        .then_some((transport, kind, state, count))
                })
            })
        })
    }

    /// The tables of conversations, their rows and capacities.
    pub fn tables(&self) -> impl Iterator<Item = (&'static str, usize, usize)> {
        let tables = TABLES.into_iter().zip(self.rows);
        tables.map(|((name, capacity), rows)| (name, rows, capacity as usize))
    }
}

/// Does any conversation of this kind get there? A service has ports, and what comes in for it too.
fn can_be(transport: Transport, kind: Kind, state: State) -> bool {
    let is_tcp = transport == Transport::Tcp;
    let has_ports = is_tcp || transport == Transport::Udp;
    is_tcp == state.is_of_tcp() && (has_ports || !matches!(kind, Kind::Service | Kind::External))
}

#[cfg(test)]
mod tests;
