//! What a decision may ask of a packet and do to it. In the kernel an skb, on the host bytes.

use weir_common::DropReason;

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

    /// Makes the first `len` bytes, or all if there are fewer, readable by [`Packet::load`].
    ///
    /// # Errors
    /// [`DropReason::Malformed`] when the kernel cannot.
    fn pull(&mut self, len: u32) -> Result<(), DropReason>;

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

    /// Marks the packet as passed by us, for the second lock and for `to_net`.
    fn mark_passed(&mut self);

    /// Marks the packet as half translated, for `to_net`.
    fn mark_translated(&mut self);

    /// What an earlier program of ours has left on the packet.
    fn mark(&self) -> Mark;
}

/// What a packet's mark says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mark {
    /// None of our programs has seen it: it is the node's own, or a stranger's.
    None,
    /// A pod of this node has sent it.
    Passed,
    /// Its destination has been translated where it came in, its source has still to be.
    Translated,
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
    /// Between two runs of bytes of the same even length, at an even offset.
    #[inline(always)]
    pub fn between<const N: usize>(old: &[u8; N], new: &[u8; N]) -> Self {
        const { assert!(N.is_multiple_of(2) && N <= 16) };
        let mut sum = 0u32;
        let mut i = 0;
        while i < N {
            sum += u32::from(!u16::from_ne_bytes([old[i], old[i + 1]]));
            sum += u32::from(u16::from_ne_bytes([new[i], new[i + 1]]));
            i += 2;
        }
        Self(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delta_is_new_minus_old() {
        let delta = Delta::between(&[0x12, 0x34], &[0x12, 0x34]);
        assert_eq!(delta.0, 0xffff, "minus zero in one's complement");
        let delta = Delta::between(&1u16.to_ne_bytes(), &3u16.to_ne_bytes());
        assert_eq!((delta.0 & 0xffff) + (delta.0 >> 16), 2);
    }
}
