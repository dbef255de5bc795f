//! What the kernel side counts: the one table that the `COUNTERS` map, metric names and their help are
//! made from.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! counters {
    ($($index:literal $name:ident $metric:literal $help:literal)*) => {
        /// A counter of the kernel side; its number is its index in `COUNTERS`.
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        #[repr(u32)]
        pub enum Counter {
            $(#[doc = $help] $name = $index,)*
        }

        impl Counter {
            /// Every counter, in the order of the indexes.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The Prometheus name, without prefix and without `_total`.
            pub const fn metric(self) -> &'static str {
                match self {
                    $(Self::$name => $metric,)*
                }
            }

            /// One sentence for a person.
            pub const fn help(self) -> &'static str {
                match self {
                    $(Self::$name => $help,)*
                }
            }
        }
    };
}

counters! {
    0 SocketTranslated "socket_translations" "Connects and sends that a socket hook sent to a backend."
    1 SocketRefused "socket_refusals" "Connects and sends refused because the Service has no backend."
    2 FlowsOpened "flows_opened" "Flow entries made."
    3 FlowsAnswered "flows_answered" "Flows whose responder answered."
    4 PacketsTranslated "packet_translations" "Packets translated to or from a backend by the per-packet path."
    5 LocalDeliveries "local_deliveries" "Packets handed straight to another pod of the node."
    6 Judged "policy_judgements" "Flows judged against policy, again after a change included."
    7 EventsLost "events_lost" "Events that found the ring buffer full."
    8 EventsLimited "events_limited" "Events left out by the rate limit; their drops are counted all the same."
    9 PacketsMasqueraded "packet_masquerades" "Packets that left with the node's address, or came back to whom it stood for."
    10 NatPortsTaken "nat_ports_taken" "Ports of the node reserved for flows that leave it."
    11 WaysLost "ways_lost" "Ways found missing beside those of the other direction, and made again: of datagrams, since TCP's are never pushed out. Nothing says when both directions or a plan were pushed out."
    12 Refusals "refusals" "Packets answered with a RST or an ICMP error; their drops are counted, too."
    13 AuditDenials "policy_audit_denials" "Flows that policy allowed, and would have denied were policies enforced that are only audited; judged again after a change included."
}

/// Rows of the `COUNTERS` table, with room for later counters.
pub const COUNTERS: u32 = 64;

/// Value of `DROPS` (per CPU), indexed by the number of a [`crate::DropReason`].
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Drops {
    pub packets: u64,
    /// Of the IP packets, headers included.
    pub bytes: u64,
}
