//! What to do with a packet, and with a socket's address: decisions only, generic over [`Packet`] and
//! [`Tables`], so that the same code runs under the verifier and in ordinary tests. Nothing here knows
//! aya, maps or skbs.
//!
//! | a packet | meets | which may |
//! |---|---|---|
//! | of a pod | [`from_pod`] | drop it, send it to a backend or put an answer's source back, hand it to another pod |
//! | to a pod, from elsewhere | [`to_pod`] | drop it, put an answer's source back |
//! | into the node by an uplink | [`from_net`] | send it to a backend, or to whom a port of the node stands for |
//! | out of the node by an uplink | [`to_net`] | let it come from the node, or an answer from the service |
//!
//! Each is the same in its middle: the packet is read ([`arrive`]); its [`way`] says what becomes of it; and
//! that is done ([`nat`]). Where there is no way yet, the cold path ([`plan`]) makes one and does nothing
//! else, so the first packet of a conversation is treated as every later one.
//!
//! What every packet meets is `inline(always)`: a call between BPF functions costs time and splits the 512 bytes
//! of stack that a program has. What few packets meet is a function of its own ([`Tables::again`] and what follows
//! it), which the verifier walks once.
#![no_std]
#![forbid(unsafe_code)]

pub mod answer;
pub mod arrive;
pub mod fragment;
mod from_net;
mod from_pod;
pub mod icmp;
pub mod l3;
pub mod l4;
pub mod limit;
pub mod nat;
pub mod neighbour;
pub mod packet;
pub mod plan;
pub mod policy;
pub mod refuse;
pub mod reserve;
pub mod service;
pub mod share;
pub mod socket;
pub mod tables;
mod to_net;
mod to_pod;
pub mod verdict;
pub mod way;
pub mod words;

pub use from_net::from_net;
pub use from_pod::from_pod;
pub use packet::Packet;
pub use tables::Tables;
pub use to_net::to_net;
pub use to_pod::to_pod;
pub use verdict::{Outcome, Scratch, Trace, Verdict};
