//! Ways: what is known of a conversation, one row for each of its directions *as its packets arrive*. A
//! way says whether it still holds, what becomes of a packet, and what has passed. How ways are made and
//! followed is `datapath`'s.

use core::sync::atomic::Ordering::Relaxed;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, transmute_mut, transmute_ref};

use crate::event::Hook;
use crate::service::{BackendId, Generation};
use crate::shared::{AtomicU32, AtomicU64};
use crate::{Addr, Port, Protocol};

/// One end of a conversation.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct Peer {
    pub addr: Addr,
    pub port: Port,
}

/// A packet as it arrives at a program: key of ways and plans. For ICMP echo the requester's port is the
/// identifier and the answerer's is absent, so that requests of both sides are two conversations. Aligned
/// so that addresses are compared in words.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C, align(8))]
pub struct WayKey {
    pub source: Addr,
    pub destination: Addr,
    pub source_port: Port,
    pub destination_port: Port,
    pub protocol: Protocol,
    /// The program that the packet meets: the same addresses mean something else on the other side of
    /// the node, and what was translated for those who leave is nothing to those who come in.
    pub hook: Hook,
    pub pad: [u8; 2],
}

/// Value of `TCP_WAYS` and `OTHER_WAYS`. Several CPUs may hold the same row, hence the atomics; relaxed
/// loads and stores of them are plain instructions.
#[derive(Debug, Default, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct Way {
    /// Monotonic time of creation in nanoseconds, to within a clock tick.
    pub created: u64,
    /// Monotonic time of the latest packet of this direction, likewise.
    pub seen: AtomicU64,
    /// Packets and bytes (of the IP packet, headers included) of this direction.
    pub packets: AtomicU64,
    pub bytes: AtomicU64,
    /// The policy epoch in which it was last found right.
    pub epoch: AtomicU32,
    /// Bits of [`WayState`].
    pub state: AtomicU32,
    /// The backend that it leads to, and the generation that had when it was chosen; 0 for none.
    pub backend: BackendId,
    pub generation: Generation,
    /// Interface index: of the pod of this node that packets are handed to, or 0 for the kernel's stack;
    /// where packets leave the node, of the uplink.
    pub device: AtomicU32,
    /// Interface index of the pod of this node that opened the conversation, 0 if it was opened from elsewhere: whose
    /// [`crate::share`] it counts for.
    pub owner: u32,
    /// Rules that allowed the conversation: at the opener's egress, at the responder's ingress; 0 for none.
    pub egress_rule: AtomicU32,
    pub ingress_rule: AtomicU32,
    /// [`WayKey::echo`] of its key: tables give the memory of a row to another key at once, and a reader
    /// that was interrupted would follow a stranger's way. Before the step, which is then as old or older.
    pub echo: AtomicU32,
    /// TCP: what acknowledges the first answer (of who has opened it, until either says goodbye), then the other side's goodbye; in the
    /// order of the machine. 0 before.
    pub others_end: AtomicU32,
    pub step: Step,
}

/// What becomes of a packet. Aligned, so that it is copied in words.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct Step {
    /// What the end that is replaced becomes; of a hairpin the other end gets the address that this one had.
    pub addr: Addr,
    pub port: Port,
    pub rewrite: Rewrite,
    /// What the packet tells the next program of ours.
    pub mark: Mark,
    /// Where packets of the other direction arrive.
    pub other: Hook,
    pub pad: [u8; 3],
}

/// Which end of a packet is replaced.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Rewrite(pub u8);

impl Rewrite {
    pub const NONE: Self = Self(0);
    /// SNAT.
    pub const SOURCE: Self = Self(1);
    /// DNAT.
    pub const DESTINATION: Self = Self(2);
    /// Both, of a pod that is its own backend: the pod gets back what it sends, from the address that it asked. So the two
    /// addresses change places, and the port of one end becomes another: the destination's there, the source's back.
    pub const HAIRPIN_DESTINATION: Self = Self(2 | Self::HAIRPIN);
    pub const HAIRPIN_SOURCE: Self = Self(1 | Self::HAIRPIN);

    const HAIRPIN: u8 = 4;

    #[inline(always)]
    pub const fn is_source(self) -> bool {
        self.0 & Self::SOURCE.0 != 0
    }

    #[inline(always)]
    pub const fn is_destination(self) -> bool {
        self.0 & Self::DESTINATION.0 != 0
    }

    /// What becomes of the answers.
    #[inline(always)]
    pub const fn back(self) -> Self {
        Self(self.0 ^ (Self::SOURCE.0 | Self::DESTINATION.0))
    }

    #[inline(always)]
    pub const fn is_hairpin(self) -> bool {
        self.0 & Self::HAIRPIN != 0
    }
}

/// What a program of ours tells the next one about a packet; [`crate::node`] says in which bits of an skb.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Mark(pub u8);

impl Mark {
    /// None of our programs has seen it: it is the node's own, or a stranger's.
    pub const NONE: Self = Self(0);
    /// A pod of this node has sent it, and it goes as it is.
    pub const PASSED: Self = Self(1);
    /// A pod of this node has sent it out of the cluster: its source is replaced where it leaves.
    pub const LEAVING: Self = Self(2);
    /// The answer to what came in translated: its source is replaced where it leaves.
    pub const REPLY: Self = Self(3);
    /// Its destination was replaced where it came in.
    pub const TRANSLATED: Self = Self(4);
    /// An agent up to 8ae8392 has let a pod send it. Its programs left it to the uplink whose source is replaced, and
    /// are the pods' for a moment after ours are the uplink's.
    pub const FORMER: Self = Self(5);
}

/// Bits of [`Way::state`].
#[derive(Clone, Copy, Debug)]
pub struct WayState;

impl WayState {
    /// This is the direction of who opened the conversation.
    pub const OPENER: u32 = 1;
    /// The port of this node that stands for somebody was taken for this conversation (SNAT).
    pub const MASQUERADE: u32 = 1 << 1;
    /// Whoever sends this way has said goodbye; the other side has.
    pub const FIN: u32 = 1 << 2;
    pub const OTHER_FIN: u32 = 1 << 3;
    /// Something was sent this way after the other side's goodbye: it was heard.
    pub const FIN_HEARD: u32 = 1 << 4;
    /// Either side has sent RST, and neither anything else since but SYNs: what goes on talking was not ended by
    /// it, and who sent it may be somebody else.
    pub const RESET: u32 = 1 << 5;
    /// Whoever sends this way has acknowledged the other side's goodbye.
    pub const FIN_ACKNOWLEDGED: u32 = 1 << 6;
    /// Of a plan: it was found worth ways, of a connection from elsewhere since its opener has acknowledged the first answer; but
    /// there was no room for them, or another one has their place. A SYN where it is closed begins another one, of which nothing is known.
    pub const PROVEN: u32 = 1 << 7;

    /// Both sides have said goodbye.
    pub const BOTH_FIN: u32 = Self::FIN | Self::OTHER_FIN;
    /// Whatever is known of goodbyes.
    pub const GOODBYES: u32 = Self::BOTH_FIN | Self::FIN_HEARD | Self::FIN_ACKNOWLEDGED;
    /// Whatever has to do with an end: the hot path leaves such packets to the cold one.
    pub const ENDING: u32 = Self::BOTH_FIN | Self::RESET;

    /// [`Self::BOTH_FIN`]?
    #[inline(always)]
    pub const fn is_finished(state: u32) -> bool {
        state & Self::BOTH_FIN == Self::BOTH_FIN
    }

    /// Have both sides said goodbye, or has one broken off?
    #[inline(always)]
    pub const fn is_closed(state: u32) -> bool {
        state & Self::RESET != 0 || Self::is_finished(state)
    }

    /// Has one side said goodbye, and the other not?
    #[inline(always)]
    pub const fn is_half_closed(state: u32) -> bool {
        state & Self::BOTH_FIN != 0 && !Self::is_closed(state)
    }
}

/// Value of `TCP_PLANS` and `OTHER_PLANS`, under the key of the first answer: both ways of a conversation that
/// nobody has answered yet. The answer finds it and makes it two ways.
#[derive(Debug, Default, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct Plan {
    /// Of the way there.
    pub key: WayKey,
    pub way: Way,
    pub back: Way,
}

impl Way {
    /// Is it still the row of the key with this echo?
    #[inline(always)]
    pub fn is_of(&self, echo: u32) -> bool {
        self.echo.load(Relaxed) == echo
    }

    /// Makes this what another row says now.
    #[inline(always)]
    pub fn set(&mut self, of: &Self) {
        self.created = of.created;
        self.seen.store(of.seen.load(Relaxed), Relaxed);
        self.packets.store(of.packets.load(Relaxed), Relaxed);
        self.bytes.store(of.bytes.load(Relaxed), Relaxed);
        self.epoch.store(of.epoch.load(Relaxed), Relaxed);
        self.state.store(of.state.load(Relaxed), Relaxed);
        (self.backend, self.generation) = (of.backend, of.generation);
        self.device.store(of.device.load(Relaxed), Relaxed);
        self.owner = of.owner;
        let rules = (of.egress_rule.load(Relaxed), of.ingress_rule.load(Relaxed));
        self.egress_rule.store(rules.0, Relaxed);
        self.ingress_rule.store(rules.1, Relaxed);
        self.others_end.store(of.others_end.load(Relaxed), Relaxed);
        self.step = of.step;
        // Last, so that it tells whether the rest was this key's.
        self.echo.store(of.echo.load(Relaxed), Relaxed);
    }
}

impl Plan {
    /// Makes this what another row says now.
    #[inline(always)]
    pub fn set(&mut self, of: &Self) {
        self.key = of.key;
        self.way.set(&of.way);
        self.back.set(&of.back);
    }
}

impl WayKey {
    /// Where the packet comes from.
    #[inline(always)]
    pub const fn source(&self) -> Peer {
        Peer {
            addr: self.source,
            port: self.source_port,
        }
    }

    /// Where the packet goes.
    #[inline(always)]
    pub const fn destination(&self) -> Peer {
        Peer {
            addr: self.destination,
            port: self.destination_port,
        }
    }

    /// Makes this the answer to a packet, which arrives at `hook`.
    #[inline(always)]
    pub fn set_reversed(&mut self, of: &Self, hook: Hook) {
        let [a, b, c, d, _] = *of.words();
        let words = self.words_mut();
        (words[0], words[1], words[2], words[3]) = (c, d, a, b);
        self.source_port = of.destination_port;
        self.destination_port = of.source_port;
        self.protocol = of.protocol;
        self.hook = hook;
        self.pad = [0; 2];
    }

    /// The key as five words, in the order of the machine: source, destination, the rest.
    #[inline(always)]
    pub fn words(&self) -> &[u64; 5] {
        transmute_ref!(self)
    }

    /// [`Self::words`], to be written.
    #[inline(always)]
    pub fn words_mut(&mut self) -> &mut [u64; 5] {
        transmute_mut!(self)
    }

    /// 32 bits that other keys mostly differ in.
    #[inline(always)]
    pub fn echo(&self) -> u32 {
        let [a, b, c, d, e] = *self.words();
        let folded = a ^ b ^ c.rotate_left(17) ^ d.rotate_left(17) ^ e.rotate_left(7);
        (folded ^ folded >> 32) as u32
    }

    /// Equality in five comparisons.
    #[inline(always)]
    pub fn is(&self, other: &Self) -> bool {
        let (a, b) = (self.words(), other.words());
        ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4])) == 0
    }

    /// Do the packets come from where those of the other key go?
    #[inline(always)]
    pub fn is_answer_to(&self, other: &Self) -> bool {
        let ([a, b, ..], [_, _, c, d, _]) = (self.words(), other.words());
        ((a ^ c) | (b ^ d)) == 0
    }

    /// Have the packets one address on both sides?
    #[inline(always)]
    pub fn is_to_itself(&self) -> bool {
        self.is_answer_to(self)
    }

    /// The key of the other direction, if packets of this one take that step.
    #[inline(always)]
    pub fn set_other(&mut self, of: &Self, step: &Step) {
        self.set_reversed(of, step.other);
        let ([a, b, _], words) = (*step.words(), self.words_mut());
        if step.rewrite == Rewrite::SOURCE {
            (words[2], words[3]) = (a, b);
            self.destination_port = step.port;
        } else if step.rewrite == Rewrite::DESTINATION {
            (words[0], words[1]) = (a, b);
            self.source_port = step.port;
        } else if step.rewrite.is_hairpin() {
            // The answerer is who has asked, and answers whom he has asked.
            let of = of.words();
            (words[0], words[1], words[2], words[3]) = (of[0], of[1], of[2], of[3]);
            if step.rewrite == Rewrite::HAIRPIN_SOURCE {
                self.destination_port = step.port;
            } else {
                self.source_port = step.port;
            }
        }
    }

    /// The packet after a step.
    #[inline(always)]
    pub fn go(&mut self, step: &Step) {
        let ([a, b, _], words) = (*step.words(), self.words_mut());
        if step.rewrite == Rewrite::SOURCE {
            (words[0], words[1]) = (a, b);
            self.source_port = step.port;
        } else if step.rewrite == Rewrite::DESTINATION {
            (words[2], words[3]) = (a, b);
            self.destination_port = step.port;
        } else if step.rewrite.is_hairpin() {
            (words[0], words[1], words[2], words[3]) = (words[2], words[3], words[0], words[1]);
            if step.rewrite == Rewrite::HAIRPIN_SOURCE {
                self.source_port = step.port;
            } else {
                self.destination_port = step.port;
            }
        }
    }

    /// The packet of a pod to itself, whatever it is that a hairpin has made of it.
    #[inline(always)]
    pub fn set_to_itself(&mut self, of: &Self) {
        *self = *of;
        let words = self.words_mut();
        (words[2], words[3]) = (words[0], words[1]);
    }
}

impl Step {
    /// On as it is, with a word to the next program.
    pub const fn marked(mark: Mark) -> Self {
        Self {
            addr: Addr::ABSENT,
            port: Port::ABSENT,
            rewrite: Rewrite::NONE,
            mark,
            other: Hook(0),
            pad: [0; 3],
        }
    }

    /// The step as three words, in the order of the machine: the address, the rest.
    #[inline(always)]
    pub fn words(&self) -> &[u64; 3] {
        transmute_ref!(self)
    }

    /// Equality in three comparisons.
    #[inline(always)]
    pub fn is(&self, other: &Self) -> bool {
        let (a, b) = (self.words(), other.words());
        ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2])) == 0
    }

    /// What the end that is replaced becomes.
    #[inline(always)]
    pub const fn peer(&self) -> Peer {
        Peer {
            addr: self.addr,
            port: self.port,
        }
    }
}

const _: () = assert!(size_of::<Peer>() == 18);
const _: () = assert!(size_of::<WayKey>() == 40);
const _: () = assert!(size_of::<Step>() == 24);
const _: () = assert!(size_of::<Way>() == 96);
const _: () = assert!(size_of::<Plan>() == 40 + 2 * 96);
