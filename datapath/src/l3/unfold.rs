//! Looking through what stands between an IP header and the transport's: numbers of fragments, extension headers.

use weir_common::{DropReason, Protocol};

use super::{Extent, FRAGMENT, Family, LONGEST, OFFSET, end};
use crate::packet::Packet;
use crate::tables::Tables;
use crate::verdict::Scratch;

/// How many extension headers are passed on.
const HEADERS: usize = 4;

/// How many options of IPv4 are, those that only fill up among them.
const OPTIONS: usize = 8;

/// Options of IPv4 (RFC 791 section 3.1): the end of them, one that fills up, and the two kinds of source routes, past every
/// policy to whom they name (RFC 7126).
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const LOOSE_ROUTE: u8 = 131;
const STRICT_ROUTE: u8 = 137;

/// The extension headers that are looked through (RFC 8200 section 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION_OPTIONS: u8 = 60;

/// What stands between an IP header and the transport's, as far as it has been looked through.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Part {
    /// Where what has not been looked at yet begins, and where the packet ends, as in [`super::Body`].
    at: u32,
    pub end: u32,
    /// As in [`weir_common::fragment::FragmentKey`].
    pub identification: u32,
    /// Where a fragment stands in the packet that it is of, in bytes, and how long it is.
    pub start: u32,
    pub length: u32,
    /// What has not been looked at yet.
    pub next: Protocol,
    /// As in [`weir_common::fragment::FragmentKey`].
    pub protocol: Protocol,
    pub extent: Extent,
    pub pad: u8,
}

impl Part {
    /// Offset of the transport header. The mask changes nothing, but the verifier has not seen where the number comes from.
    #[inline(always)]
    pub const fn offset(&self) -> usize {
        (self.at & 127) as usize
    }
}

impl Family {
    /// Looks through a packet that [`Self::body`] takes for a fragment, or for one with extension headers.
    ///
    /// # Errors
    /// [`DropReason::Malformed`], [`DropReason::ExtensionHeader`].
    #[inline(always)]
    pub fn unfold(
        self,
        packet: &impl Packet,
        tables: &impl Tables,
        scratch: &mut Scratch,
    ) -> Result<(), DropReason> {
        match self {
            Self::V4 => v4_unfold(packet, &mut scratch.part),
            Self::V6 => v6_unfold(packet, tables, scratch),
        }
    }
}

#[inline(always)]
fn v4_unfold(packet: &impl Packet, part: &mut Part) -> Result<(), DropReason> {
    let [version, _, l0, l1, i0, i1, f0, f1, _, protocol] = packet.load::<10>(OFFSET)?;
    let at = OFFSET as u32 + u32::from(version & 0x0f) * 4;
    let length = u32::from(u16::from_be_bytes([l0, l1]));
    let end = end(packet, OFFSET, length, 0, Extent::Whole)?;
    let field = u16::from_be_bytes([f0, f1]);
    let start = u32::from(field & 0x1fff) * 8;
    *part = Part {
        at,
        end,
        identification: u16::from_be_bytes([i0, i1]).into(),
        start,
        length: end.saturating_sub(at),
        next: Protocol(protocol),
        protocol: Protocol(protocol),
        extent: match (start, field & 0x2000) {
            (0, 0) => Extent::Whole,
            (0, _) => Extent::First,
            _ => Extent::Later,
        },
        pad: 0,
    };
    let mut option = OFFSET as u32 + 20;
    for _ in 0..OPTIONS {
        if option >= part.at {
            return Ok(());
        }
        let [kind, size] = packet.load::<2>((option & 127) as usize)?;
        match kind {
            END => return Ok(()),
            NO_OPERATION => option += 1,
            LOOSE_ROUTE | STRICT_ROUTE => return Err(DropReason::ExtensionHeader),
            _ if size < 2 => return Err(DropReason::Malformed),
            _ => option += u32::from(size),
        }
    }
    let is_read = option >= part.at;
    is_read.then_some(()).ok_or(DropReason::ExtensionHeader)
}

#[inline(always)]
fn v6_unfold(
    packet: &impl Packet,
    tables: &impl Tables,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    let [_, _, _, _, l0, l1, next, _] = packet.load::<8>(OFFSET)?;
    let length = u32::from(u16::from_be_bytes([l0, l1]));
    let at = OFFSET + 40;
    let end = end(packet, OFFSET, 40 + length, 40, Extent::Whole)?;
    scratch.part = Part {
        at: at as u32,
        end,
        next: Protocol(next),
        ..Part::default()
    };
    for number in 0..=HEADERS {
        tables.settle(scratch);
        if scratch.part.extent == Extent::Later || !v6_header(packet, &mut scratch.part, number)? {
            break;
        }
    }
    tables.settle(scratch);
    let part = &scratch.part;
    if part.at > part.end || part.length > 0xffff {
        return Err(DropReason::Malformed);
    }
    Ok(())
}

/// Looks at the next extension header. False if it is none.
#[inline(always)]
fn v6_header(packet: &impl Packet, part: &mut Part, number: usize) -> Result<bool, DropReason> {
    let at = part.offset();
    match part.next.0 {
        HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
            let [next, words, kind, left] = packet.load::<4>(at)?;
            // What is not where it goes yet could go past every policy (RFC 5095); and what a router has to read stands
            // first.
            let is_refused = if part.next.0 == ROUTING {
                kind == 0 || left != 0
            } else {
                part.next.0 == HOP_BY_HOP && number != 0
            };
            if is_refused {
                return Err(DropReason::ExtensionHeader);
            }
            part.next = Protocol(next);
            part.at += 8 + u32::from(words) * 8;
        }
        FRAGMENT if part.extent == Extent::Whole => {
            let [next, _, f0, f1, a, b, c, d] = packet.load::<8>(at)?;
            let field = u32::from(u16::from_be_bytes([f0, f1]));
            (part.start, part.identification) = (field & 0xfff8, u32::from_be_bytes([a, b, c, d]));
            part.next = Protocol(next);
            part.at += 8;
            part.length = part.end.saturating_sub(part.at);
            part.extent = match (part.start, field & 1) {
                (0, 0) => Extent::Atomic,
                (0, _) => Extent::First,
                _ => Extent::Later,
            };
        }
        // ESP, AH, and the others that [`v6_body`] names.
        FRAGMENT | 50 | 51 | 59 | 135 | 139 | 140 | 253 | 254 => {
            return Err(DropReason::ExtensionHeader);
        }
        _ => return Ok(false),
    }
    if number == HEADERS || part.at > (OFFSET + LONGEST) as u32 {
        return Err(DropReason::ExtensionHeader);
    }
    Ok(true)
}
