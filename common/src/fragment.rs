//! What is remembered of a packet that comes in fragments: only the first of them names ports.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::event::Hook;
use crate::{Addr, Port, Protocol};

/// Key of `FRAGMENTS`: what the fragments of a packet have in common (RFC 791 section 3.2, RFC 8200 section 4.5), and where
/// they arrive, so that nobody speaks for another one.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct FragmentKey {
    pub source: Addr,
    pub destination: Addr,
    /// The sender's number of the packet, in the order of the machine: of 16 bits with IPv4, of 32 with IPv6.
    pub identification: u32,
    /// Of the device that the program sits on.
    pub ifindex: u32,
    /// IPv4 tells packets apart by it; of IPv6 it is 0.
    pub protocol: Protocol,
    pub hook: Hook,
    pub pad: [u8; 6],
}

/// Value of `FRAGMENTS`: what the first fragment has said.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct Fragment {
    /// Monotonic time in nanoseconds at which it came, to within a clock tick.
    pub seen: u64,
    pub source_port: Port,
    pub destination_port: Port,
    pub protocol: Protocol,
    /// 1 if only an answer makes sense, else 0.
    pub is_answer: u8,
    /// How many bytes of the packet it has brought: what comes later begins behind them. In the order of the machine.
    pub length: u16,
}

const _: () = assert!(size_of::<FragmentKey>() == 48);
const _: () = assert!(size_of::<Fragment>() == 16);
