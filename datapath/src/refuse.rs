//! Refusing a packet: it becomes the answer that a closed port would give, on its way back to who has sent it. A
//! RST for TCP, an ICMP port unreachable for everything else, from the address that was asked. Which packets are
//! refused is [`crate::Verdict`]'s, and how many `limit`'s.
//!
//! All is written in words of 32 bits: of anything else the compiler would store parts where the stack takes none.

use weir_common::way::WayKey;
use weir_common::{Addr, DropReason, Protocol};

use crate::l3::{Family, OFFSET};
use crate::packet::{Changed, Delta, Packet, Zero};
use crate::verdict::Scratch;
use crate::words::Aligned;

/// The version and header length of IPv4, "don't fragment", and for how many hops Linux sends.
const V4: u32 = 0x4500_0000;
const DONT_FRAGMENT: u32 = 0x4000;
const V6: u32 = 0x6000_0000;
const HOPS: u32 = 64;

const RST: u32 = 4;
const ACK: u32 = 16;

/// An answer, by a protocol, to what somebody has asked.
struct Answer<'a> {
    family: Family,
    asked: &'a WayKey,
    protocol: Protocol,
}

/// Turns the packet at hand, which nobody has changed yet, into the answer that refuses it.
///
/// # Errors
/// It is not to be answered, or cannot be; it may then be half changed and must be dropped.
#[inline(always)]
pub fn refuse<P: Packet>(packet: &mut P, scratch: &Scratch) -> Result<(), DropReason> {
    let (arrival, asked) = (&scratch.arrival, &scratch.trace.tuple);
    let family = arrival.family();
    let (header, quoted) = match family {
        Family::V4 => (20, 28),
        Family::V6 => (40, 48),
    };
    let [a, b, ..] = *asked.words();
    let ethernet = [load(packet, 0)?, load(packet, 4)?, load(packet, 8)?];
    // Neither what is sent to many nor what is from no single host is answered (RFC 1122 section 3.2.2), and no RST. Behind
    // options or extensions an answer's checksum would not be where a device may have been told to put it.
    if ethernet[0] & 1 << 24 != 0
        || family.is_martian([a, b])
        || arrival.segment.is_rst()
        || arrival.transport() != OFFSET + header
    {
        return Err(DropReason::NoFlow);
    }
    let mut answer = Answer {
        family,
        asked,
        protocol: Protocol::TCP,
    };
    if asked.protocol == Protocol::TCP {
        let numbers = (arrival.end, arrival.acknowledges);
        answer.reset(packet, OFFSET + header, numbers)?;
    } else {
        if arrival.length < quoted {
            return Err(DropReason::Malformed);
        }
        answer.protocol = family.icmp_numbers().0;
        answer.unreachable(packet, quoted as usize)?;
    }
    let [a, b, c] = ethernet;
    store(packet, 0, b << 16 | c >> 16)?;
    store(packet, 4, c << 16 | a >> 16)?;
    store(packet, 8, a << 16 | b >> 16)
}

impl Answer<'_> {
    /// A RST with the numbers of RFC 9293 section 3.10.7.1; `end` and `acknowledges` are of the segment that it answers.
    #[inline(always)]
    fn reset<P: Packet>(
        &self,
        packet: &mut P,
        at: usize,
        (end, acknowledges): (u32, u32),
    ) -> Result<(), DropReason> {
        let (first, second, flags) = if load(packet, at + 12)? >> 16 & ACK != 0 {
            (acknowledges, 0, RST)
        } else {
            (0, end, RST | ACK)
        };
        packet.resize((at + 20) as u32)?;
        let ports = load(packet, at)?.rotate_left(16);
        let flags = 5 << 28 | flags << 16;
        store(packet, at, ports)?;
        store(packet, at + 4, first)?;
        store(packet, at + 8, second)?;
        store(packet, at + 12, flags)?;
        let covered = self.pseudo(20);
        let sum = if is_left_to_device(packet, at + 16)? {
            fold(covered)
        } else {
            !fold(covered + halves(ports) + halves(first) + halves(second) + halves(flags))
        };
        store(packet, at + 16, u32::from(sum) << 16)?;
        self.header(packet, 20)
    }

    /// An ICMP error that quotes so many bytes of the packet: its header and eight more (RFC 792, RFC 4443 section 3.1). That
    /// is as long as what stands before the quotation.
    #[inline(always)]
    fn unreachable<P: Packet>(&self, packet: &mut P, quoted: usize) -> Result<(), DropReason> {
        let icmp = OFFSET + quoted - 8;
        let length = 8 + quoted as u32;
        packet.resize((OFFSET + 2 * quoted) as u32)?;
        // Type and code: the port of this destination is unreachable.
        let (kind, covered) = match self.family {
            Family::V4 => (0x0303_0000, 0),
            Family::V6 => (0x0104_0000, self.pseudo(length)),
        };
        let mut sum = covered + halves(kind);
        let mut at = OFFSET;
        while at < OFFSET + quoted {
            let word = load(packet, at)?;
            sum += halves(word);
            store(packet, at + quoted, word)?;
            at += 4;
        }
        // A device that was to write the checksum of a datagram will write six bytes into the error, where nothing is: zero,
        // as its negative, if it finds there what is to be taken off for the addresses.
        let left = if is_left_to_device(packet, icmp)? {
            fold(covered)
        } else {
            0
        };
        store(packet, icmp, kind | u32::from(!fold(sum)))?;
        store(packet, icmp + 4, left.into())?;
        self.header(packet, length)
    }

    /// Writes the IP header of an answer of so many bytes.
    #[inline(always)]
    fn header<P: Packet>(&self, packet: &mut P, length: u32) -> Result<(), DropReason> {
        let protocol = u32::from(self.protocol.0);
        let (from, to) = (&self.asked.destination, &self.asked.source);
        match self.family {
            Family::V4 => {
                let first = V4 | (20 + length);
                let third = HOPS << 24 | protocol << 16;
                let [.., from] = words(from);
                let [.., to] = words(to);
                let sum = halves(first) + halves(DONT_FRAGMENT) + halves(third);
                let sum = !fold(sum + halves(from) + halves(to));
                store(packet, OFFSET, first)?;
                store(packet, OFFSET + 4, DONT_FRAGMENT)?;
                store(packet, OFFSET + 8, third | u32::from(sum))?;
                store(packet, OFFSET + 12, from)?;
                store(packet, OFFSET + 16, to)
            }
            Family::V6 => {
                store(packet, OFFSET, V6)?;
                store(packet, OFFSET + 4, length << 16 | protocol << 8 | HOPS)?;
                packet.store(OFFSET + 8, &from.0)?;
                packet.store(OFFSET + 24, &to.0)
            }
        }
    }

    /// The sum of the pseudo-header of so many bytes. What is before the four octets of a mapped address sums up to minus
    /// zero.
    #[inline(always)]
    fn pseudo(&self, length: u32) -> u32 {
        let mut sum = u32::from(self.protocol.0) + length;
        for addr in [&self.asked.source, &self.asked.destination] {
            for word in words(addr) {
                sum += halves(word);
            }
        }
        sum
    }
}

/// Is the checksum left to a device (`CHECKSUM_PARTIAL`)? Programs are
/// not told, but a correction for bytes that such a checksum does not hold yet is not made. The word is spoiled.
#[inline(always)]
fn is_left_to_device<P: Packet>(packet: &mut P, at: usize) -> Result<bool, DropReason> {
    const PROBE: u32 = 0x1234_5678;
    store(packet, at, PROBE)?;
    packet.fix_checksum(at, Changed::Ports(Zero::IsSum), Delta(1))?;
    Ok(load(packet, at)? == PROBE)
}

/// An address as words.
#[inline(always)]
const fn words(addr: &Addr) -> [u32; 4] {
    let (high, low) = crate::words::words(addr);
    [
        (high >> 32) as u32,
        high as u32,
        (low >> 32) as u32,
        low as u32,
    ]
}

#[inline(always)]
pub(crate) fn load<P: Packet>(packet: &P, at: usize) -> Result<u32, DropReason> {
    Ok(u32::from_be_bytes(packet.load(at)?))
}

#[inline(always)]
pub(crate) fn store<P: Packet>(packet: &mut P, at: usize, word: u32) -> Result<(), DropReason> {
    packet.store(at, &Aligned(word.to_be_bytes()).0)
}

/// The one's complement sum (RFC 1071) of a word, not yet folded.
#[inline(always)]
pub(crate) const fn halves(word: u32) -> u32 {
    (word >> 16) + (word & 0xffff)
}

#[inline(always)]
pub(crate) const fn fold(sum: u32) -> u16 {
    let sum = halves(sum);
    halves(sum) as u16
}
