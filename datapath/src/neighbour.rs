//! A pod's question for its gateway's Ethernet address: by ARP (RFC 826), or as a neighbour solicitation (RFC 4861
//! section 7.2). Pods have fixed entries; one with a kernel of its own inside, or whose entries somebody has flushed, asks.
//! The question becomes its answer, as [`crate::refuse`] does it. Nobody else is asked for here, and nobody else answered.
//!
//! All is read and written in words, as there.

use weir_common::device::{Device, GATEWAY_V4, GATEWAY_V6};
use weir_common::{DropReason, Protocol};

use crate::l3::{Family, OFFSET};
use crate::packet::Packet;
use crate::refuse::{fold, halves, load, store};
use crate::words::Aligned;

/// Of ARP: its type, Ethernet, IPv4, how long addresses of these are. What is asked, what is answered.
const ARP: u64 = 0x0806_0001_0800_0604;
const REQUEST: u64 = 1;
const REPLY: u64 = 2;

/// Where a neighbour message begins, its target, its one option. With the option it is 32 bytes long.
const ICMP: usize = OFFSET + 40;
const TARGET: usize = ICMP + 8;
const OPTION: usize = ICMP + 24;
const END: usize = ICMP + 32;
/// Types of message and option, the latter with its length in units of 8 bytes.
const SOLICITATION: u64 = 0x8700;
const ADVERTISEMENT: u64 = 0x8800;
const SOURCE_OPTION: u64 = 0x0101;
const TARGET_OPTION: u64 = 0x0201;
/// From a router, asked for, and overriding what was known.
const FLAGS: u64 = 0xe000_0000;
/// The next header, and that no router has passed it on.
const LAST: u32 = (Protocol::ICMPV6.0 as u32) << 8 | 255;

const GATEWAY: u32 = u32::from_be_bytes(GATEWAY_V4);
const ROUTER: [u64; 2] = halved(GATEWAY_V6);
/// The gateway's solicited-node address (RFC 4291 section 2.7.1).
const NODES: [u64; 2] = [0xff02 << 48, 0x0001_ff00_0000 | ROUTER[1] & 0xff_ffff];

/// May what is dropped for the reason of this number be such a question? Of ARP; sent to many; sent to the gateway itself.
#[inline(always)]
pub const fn may_ask(reason: u8) -> bool {
    reason == DropReason::NotIp as u8
        || reason == DropReason::Martian as u8
        || reason == DropReason::NoFlow as u8
}

/// In which family the pod behind the device asks for its gateway, if that is what the packet is.
///
/// # Errors
/// [`DropReason::Malformed`] when it ends before.
#[inline(always)]
pub fn asks<P: Packet>(packet: &P, device: &Device) -> Result<Option<Family>, DropReason> {
    if packet.has_stripped_vlan() || long(packet, 6)? >> 16 != mac(device) {
        return Ok(None);
    }
    let asks = match Family::of(packet) {
        Ok(Family::V6) => solicits(packet, device)?.then_some(Family::V6),
        Err(DropReason::NotIp) => requests(packet, device)?.then_some(Family::V4),
        _ => None,
    };
    Ok(asks)
}

/// A request of ARP.
#[inline(always)]
fn requests<P: Packet>(packet: &P, device: &Device) -> Result<bool, DropReason> {
    let [high, low] = lease(device, Family::V4);
    Ok(long(packet, 12)? == ARP
        && long(packet, 20)? == REQUEST << 48 | mac(device)
        // A pod without an address of the family has none at all.
        && (high, low >> 32) == (0, 0xffff)
        && load(packet, 28)? == low as u32
        && load(packet, 38)? == GATEWAY)
}

/// A neighbour solicitation that is valid (section 7.1.1), with the option that says who asks or without any.
#[inline(always)]
fn solicits<P: Packet>(packet: &P, device: &Device) -> Result<bool, DropReason> {
    let last = load(packet, OFFSET + 4)?;
    let length = last >> 16;
    let (from, to) = (lease(device, Family::V6), pair(packet, OFFSET + 24)?);
    let icmp = long(packet, ICMP)?;
    if load(packet, OFFSET)? >> 28 != 6
        || last & 0xffff != LAST
        || (length != 24 && length != 32)
        || pair(packet, OFFSET + 8)? != from
        // A pod without an address of the family has this one, of who looks for duplicates.
        || from == [0, 0]
        || (to != NODES && to != ROUTER)
        || icmp >> 48 != SOLICITATION
        || pair(packet, TARGET)? != ROUTER
    {
        return Ok(false);
    }
    let mut option = 0;
    if length == 32 {
        option = SOURCE_OPTION << 48 | mac(device);
        if long(packet, OPTION)? != option {
            return Ok(false);
        }
    }
    Ok(sum(length, from, to, icmp, option) == 0xffff)
}

/// Turns a question into its answer: `host` is the Ethernet address of this end of the pair, as a number of 48 bits.
///
/// # Errors
/// It cannot be; it may then be half changed and must be dropped.
#[inline(always)]
pub fn answer<P: Packet>(
    packet: &mut P,
    family: Family,
    device: &Device,
    host: u64,
) -> Result<(), DropReason> {
    let (mac, [high, low]) = (mac(device), lease(device, family));
    if family == Family::V6 {
        packet.resize(END as u32)?;
        write(packet, OFFSET, 0x6000_0000_0020_0000 | u64::from(LAST))?;
        write(packet, OFFSET + 8, ROUTER[0])?;
        write(packet, OFFSET + 16, ROUTER[1])?;
        write(packet, OFFSET + 24, high)?;
        write(packet, OFFSET + 32, low)?;
        let (icmp, option) = (ADVERTISEMENT << 48 | FLAGS, TARGET_OPTION << 48 | host);
        let sum = !sum(32, ROUTER, [high, low], icmp, option);
        write(packet, ICMP, icmp | u64::from(sum) << 32)?;
        write(packet, OPTION, option)?;
    } else {
        write(packet, 20, REPLY << 48 | host)?;
        store(packet, 28, GATEWAY)?;
        write(packet, 32, mac << 16)?;
        store(packet, 38, low as u32)?;
    }
    write(packet, 0, mac << 16 | host >> 32)?;
    store(packet, 8, host as u32)
}

/// The sum of a neighbour message about the gateway, of so many bytes, with its pseudo-header; what begins it, and its
/// option, 0 without one.
#[inline(always)]
fn sum(length: u32, from: [u64; 2], to: [u64; 2], icmp: u64, option: u64) -> u16 {
    let mut sum = length + u32::from(Protocol::ICMPV6.0);
    for long in [
        from[0], from[1], to[0], to[1], ROUTER[0], ROUTER[1], icmp, option,
    ] {
        sum += halves((long >> 32) as u32) + halves(long as u32);
    }
    fold(sum)
}

/// The pod's Ethernet address, as a number of 48 bits.
#[inline(always)]
fn mac(device: &Device) -> u64 {
    let [_, _, _, _, word, ..] = *device.words();
    u64::from_be(word) >> 16
}

/// The address that the pod has.
#[inline(always)]
fn lease(device: &Device, family: Family) -> [u64; 2] {
    family.lease(device).map(u64::from_be)
}

#[inline(always)]
const fn halved(addr: [u8; 16]) -> [u64; 2] {
    let addr = u128::from_be_bytes(addr);
    [(addr >> 64) as u64, addr as u64]
}

#[inline(always)]
fn pair<P: Packet>(packet: &P, at: usize) -> Result<[u64; 2], DropReason> {
    Ok([long(packet, at)?, long(packet, at + 8)?])
}

#[inline(always)]
fn long<P: Packet>(packet: &P, at: usize) -> Result<u64, DropReason> {
    Ok(u64::from_be_bytes(packet.load(at)?))
}

#[inline(always)]
fn write<P: Packet>(packet: &mut P, at: usize, long: u64) -> Result<(), DropReason> {
    packet.store(at, &Aligned(long.to_be_bytes()).0)
}
