//! What to do with a packet, and with a socket's address: decisions only, generic over [`Packet`] and
//! [`Tables`], so that the same code runs under the verifier and in ordinary tests. Nothing here knows
//! aya, maps or skbs.
//!
//! Everything is `inline(always)`: a call between BPF functions costs time and splits the 512 bytes of
//! stack that a program has.
#![no_std]
#![forbid(unsafe_code)]

mod choose;
pub mod flow;
mod from_net;
mod from_pod;
mod icmp;
pub mod l3;
pub mod l4;
pub mod limit;
pub mod merge;
pub mod nat;
pub mod packet;
pub mod policy;
pub mod service;
pub mod socket;
pub mod tables;
mod to_net;
mod to_pod;
pub mod tuple;
pub mod verdict;

pub use from_net::from_net;
pub use from_pod::from_pod;
pub use packet::Packet;
pub use tables::Tables;
pub use to_net::to_net;
pub use to_pod::to_pod;
pub use verdict::{Scratch, Trace, Verdict};
