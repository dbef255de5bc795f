//! What a decision may ask of a packet and do to it. In the kernel an skb, on the host bytes.

use weir_common::way::Mark;
use weir_common::{DropReason, Port};

use crate::fragment;
use crate::tables::Tables;
use crate::verdict::{Outcome, Scratch};

/// A frame with its Ethernet header. Offsets and lengths are in bytes from its start.
#[expect(
    clippy::len_without_is_empty,
    reason = "a frame has an Ethernet header: it is never empty"
)]
pub trait Packet {
    /// Interface index of the device that the program sits on.
    fn ifindex(&self) -> u32;

    /// Length of the whole frame.
    fn len(&self) -> u32;

    /// Does the packet carry a VLAN tag that the kernel has already taken out of the bytes?
    fn has_stripped_vlan(&self) -> bool;

    /// Interface index of the device by which the node has received it; 0 of what it has made itself, and of fragments that it
    /// has made of an IPv6 packet which it only passes on.
    fn received_by(&self) -> u32;

    /// Has a socket of the node sent it?
    fn is_of_socket(&self) -> bool;

    /// `N` bytes at an offset.
    ///
    /// # Errors
    /// [`DropReason::Malformed`] when the packet ends before.
    fn load<const N: usize>(&self, offset: usize) -> Result<[u8; N], DropReason>;

    /// Replaces `N` bytes at an offset. Checksums are not touched.
    ///
    /// # Errors
    /// [`DropReason::WriteFailed`] when the kernel refuses.
    fn store<const N: usize>(&mut self, offset: usize, bytes: &[u8; N]) -> Result<(), DropReason>;

    /// Corrects the checksum at an offset for what has changed.
    ///
    /// # Errors
    /// [`DropReason::WriteFailed`] when the kernel refuses.
    fn fix_checksum(
        &mut self,
        offset: usize,
        changed: Changed,
        delta: Delta,
    ) -> Result<(), DropReason>;

    /// Makes the frame longer, by bytes of zero, or shorter. What a device was to do with its segments is forgotten.
    ///
    /// # Errors
    /// [`DropReason::WriteFailed`] when the kernel refuses.
    fn resize(&mut self, len: u32) -> Result<(), DropReason>;

    /// Tells the next program of ours about the packet.
    fn set_mark(&mut self, mark: Mark);

    /// What an earlier program of ours has said.
    fn mark(&self) -> Mark;

    /// [`fragment::unfold`], which a program may call instead of containing it.
    #[inline(always)]
    fn unfold(&self, tables: &impl Tables, scratch: &mut Scratch) -> Outcome
    where
        Self: Sized,
    {
        fragment::unfold(self, tables, scratch)
    }
}

/// What has changed among the bytes that a checksum covers. The difference matters where the checksum
/// is left to a device (`CHECKSUM_PARTIAL`): then its field holds the sum of the pseudo-header alone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Changed {
    /// Bytes of the IPv4 header, under its own checksum.
    Header,
    /// IPv4 addresses, as part of the pseudo-header.
    V4Addresses(Zero),
    /// IPv6 addresses, as part of the pseudo-header.
    V6Addresses(Zero),
    /// Bytes of the transport header itself.
    Ports(Zero),
    /// What no checksum in the packet covers; the sum that a device has made of all of it changes.
    Uncovered,
}

/// What an all-zero checksum means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Zero {
    /// A sum like any other (TCP).
    IsSum,
    /// There is none, and it stays so (UDP, RFC 768); a sum that comes out as zero is sent as 0xffff.
    IsAbsent,
}

/// The difference between old and new bytes as a 32-bit one's complement sum (RFC 1624), in the byte
/// order of the machine, as the kernel's `csum_diff`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Delta(pub u32);

impl Delta {
    /// Between two addresses, in words of the order of the machine. What IPv4 addresses have in common in their mapped form
    /// cancels.
    #[inline(always)]
    pub const fn of_addresses(old: [u64; 2], new: [u64; 2]) -> Self {
        let mut sum = 0u64;
        let mut i = 0;
        while i < 2 {
            let old = !old[i];
            sum += (old & 0xffff_ffff) + (old >> 32) + (new[i] & 0xffff_ffff) + (new[i] >> 32);
            i += 1;
        }
        // Of 35 bits: what is carried out is carried in again, twice at most.
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        Self(sum as u32)
    }

    /// Between two ports.
    #[inline(always)]
    pub const fn of_ports(old: Port, new: Port) -> Self {
        Self(!u16::from_ne_bytes(old.0) as u32 + u16::from_ne_bytes(new.0) as u32)
    }
}

#[cfg(test)]
mod tests {
    use weir_common::Addr;

    use super::*;

    #[test]
    fn a_delta_is_new_minus_old() {
        let one = Port(1u16.to_ne_bytes());
        let three = Port(3u16.to_ne_bytes());
        assert_eq!(
            Delta::of_ports(one, one).0,
            0xffff,
            "minus zero in one's complement"
        );
        assert_eq!(fold(Delta::of_ports(one, three).0), 2);
    }

    #[test]
    fn the_delta_of_addresses_is_that_of_their_halves() {
        for (old, new) in [
            ([0xff; 16], [0; 16]),
            ([0; 16], [0xff; 16]),
            (Addr::v4([10, 0, 0, 1]).0, Addr::v4([192, 168, 255, 254]).0),
            (*b"0123456789abcdef", *b"zyxwvutsrqponmlk"),
        ] {
            let words = |bytes: [u8; 16]| {
                let (high, low) = bytes.split_at(8);
                [high, low].map(|half| u64::from_ne_bytes(half.try_into().unwrap_or_default()))
            };
            let halves = |bytes: [u8; 16], not: u16| {
                let halves = bytes
                    .chunks(2)
                    .map(move |it| u16::from_ne_bytes([it[0], it[1]]) ^ not);
                halves.map(u32::from).sum::<u32>()
            };
            let wanted = fold(halves(old, 0xffff) + halves(new, 0));
            assert_eq!(
                fold(Delta::of_addresses(words(old), words(new)).0) % 0xffff,
                wanted % 0xffff
            );
        }
    }

    fn fold(mut sum: u32) -> u32 {
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum
    }
}
