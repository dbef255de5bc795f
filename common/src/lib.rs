//! The ABI between kernel and user space: keys, values and numbers of every table. Plain data only:
//! nothing here decides what happens to a packet.
//!
//! Addresses and ports are in network order for ever; every other integer is in the order of the
//! machine, since both sides run on it. No struct has implicit padding (the zerocopy derives refuse
//! it), and each carries an assertion of its size.
#![no_std]
#![deny(unsafe_code)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod addr;
#[cfg(feature = "allocator")]
pub mod allocator;
pub mod counter;
pub mod device;
pub mod event;
pub mod fragment;
pub mod limits;
pub mod nat;
pub mod node;
pub mod policy;
pub mod reason;
pub mod service;
pub mod share;
pub mod shared;
pub mod table;
pub mod way;

pub use addr::{Addr, Mac, Port, Prefix, Protocol};
pub use reason::DropReason;
