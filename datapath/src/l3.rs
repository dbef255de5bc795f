//! IPv4 and IPv6: the only file that knows one from the other. Everything after it is written once.

use weir_common::device::Device;
use weir_common::nat::Uplink;
use weir_common::{Addr, DropReason, Protocol};

use crate::packet::{Changed, Delta, Packet, Zero};
use crate::tuple::{Tuple, same};

/// Where the IP header starts: VLAN tags are refused, so always behind 14 bytes of Ethernet.
pub const OFFSET: usize = 14;

/// The longest run of headers that is ever read: Ethernet, IPv4 with all options, an ICMP error's own
/// header, the longest IPv4 header inside of it and eight bytes of transport.
pub const HEADERS: u32 = 14 + 60 + 8 + 60 + 8;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// 802.1Q, 802.1ad, and the number that was used for QinQ before it.
const ETHERTYPES_VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];

/// The family that a frame says it carries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    V4,
    V6,
}

/// What follows the IP header.
#[derive(Clone, Copy, Debug)]
pub struct Body {
    pub protocol: Protocol,
    /// Offset of the transport header.
    pub offset: usize,
    /// Offset of the first byte after the IP packet; what follows is padding of the frame.
    pub end: u32,
}

/// How much of an IP packet is there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Extent {
    Whole,
    /// The start of it, inside of an ICMP error.
    Quoted,
}

/// Which address of a packet is replaced.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    Source,
    Destination,
}

/// What a type of ICMP means here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Icmp {
    EchoRequest,
    EchoReply,
    /// Quotes the packet that it is about.
    Error,
    /// Neighbour discovery, redirects, timestamps: nothing that a pod needs.
    Other,
}

/// What differs between the families.
pub trait L3 {
    /// The number of the family's own ICMP, and of the other's, which may not appear.
    const ICMP: Protocol;
    const FOREIGN_ICMP: Protocol;
    /// Does the checksum of the family's ICMP cover addresses (RFC 4443 section 2.3)?
    const ICMP_COVERS_ADDRESSES: bool;

    /// Fills the addresses of a tuple from the header at an offset.
    ///
    /// # Errors
    /// [`DropReason::Malformed`], [`DropReason::MappedAddress`].
    fn addresses(packet: &impl Packet, offset: usize, tuple: &mut Tuple) -> Result<(), DropReason>;

    /// What follows the header at an offset.
    ///
    /// # Errors
    /// [`DropReason::Malformed`], [`DropReason::Fragment`], [`DropReason::ExtensionHeader`].
    fn body(packet: &impl Packet, offset: usize, extent: Extent) -> Result<Body, DropReason>;

    /// The address that a device's lease gives in this family.
    fn lease(device: &Device) -> &Addr;

    /// The address with which traffic of this family leaves.
    fn uplink(uplink: &Uplink) -> &Addr;

    /// May the address not be on the wire at all (RFC 1812 section 5.3.7, RFC 4291 section 2.5)?
    fn is_martian(addr: &Addr) -> bool;

    fn icmp(kind: u8) -> Icmp;

    /// Replaces an address, and corrects the header's own checksum and the transport's, which is at an
    /// offset if it covers addresses.
    ///
    /// # Errors
    /// [`DropReason::WriteFailed`].
    fn replace(
        packet: &mut impl Packet,
        side: Side,
        old: &Addr,
        new: &Addr,
        checksum: Option<(usize, Zero)>,
    ) -> Result<(), DropReason>;

    /// Replaces an address in the packet at an offset that an ICMP error quotes, and corrects the
    /// checksums that cover it: the quoted header's, the error's.
    ///
    /// # Errors
    /// [`DropReason::WriteFailed`].
    fn replace_quoted(
        packet: &mut impl Packet,
        at: usize,
        side: Side,
        old: &Addr,
        new: &Addr,
        checksum: usize,
    ) -> Result<(), DropReason>;
}

#[derive(Debug)]
pub struct V4;
#[derive(Debug)]
pub struct V6;

/// The family of a frame from its type.
///
/// # Errors
/// [`DropReason::Malformed`], [`DropReason::VlanTagged`], [`DropReason::NotIp`].
#[inline(always)]
pub fn family(packet: &impl Packet) -> Result<Family, DropReason> {
    let ethertype = u16::from_be_bytes(packet.load::<2>(12)?);
    if packet.has_stripped_vlan() {
        return Err(DropReason::VlanTagged);
    }
    match ethertype {
        ETHERTYPE_IPV4 => Ok(Family::V4),
        ETHERTYPE_IPV6 => Ok(Family::V6),
        other if ETHERTYPES_VLAN.contains(&other) => Err(DropReason::VlanTagged),
        _ => Err(DropReason::NotIp),
    }
}

/// The end of an IP packet of a length. A length of `absent` is that of a segmentation-offload packet
/// above 64 KiB (BIG TCP), which the field cannot express.
#[inline(always)]
fn end(
    packet: &impl Packet,
    offset: usize,
    length: u32,
    absent: u32,
    extent: Extent,
) -> Result<u32, DropReason> {
    let offset = offset as u32;
    if extent == Extent::Quoted || (length == absent && packet.len() > offset + absent + 0xffff) {
        return Ok(packet.len());
    }
    let end = offset + length;
    if end > packet.len() {
        return Err(DropReason::Malformed);
    }
    Ok(end)
}

/// [`Addr::v4`] in two words: what is read in words soon after should be written in words, or the read
/// waits for the writes.
#[inline(always)]
fn mapped(octets: [u8; 4]) -> Addr {
    let low = 0xffff_0000_0000 | u64::from(u32::from_be_bytes(octets));
    let [a, b, c, d, e, f, g, h] = low.to_be_bytes();
    Addr([0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h])
}

impl L3 for V4 {
    const ICMP: Protocol = Protocol::ICMP;
    const FOREIGN_ICMP: Protocol = Protocol::ICMPV6;
    const ICMP_COVERS_ADDRESSES: bool = false;

    #[inline(always)]
    fn addresses(packet: &impl Packet, offset: usize, tuple: &mut Tuple) -> Result<(), DropReason> {
        let [a, b, c, d, e, f, g, h] = packet.load::<8>(offset + 12)?;
        tuple.source = mapped([a, b, c, d]);
        tuple.destination = mapped([e, f, g, h]);
        Ok(())
    }

    #[inline(always)]
    fn body(packet: &impl Packet, offset: usize, extent: Extent) -> Result<Body, DropReason> {
        let [version, _, l0, l1, _, _, f0, f1, _, protocol] = packet.load::<10>(offset)?;
        let header = usize::from(version & 0x0f) * 4;
        let length = u32::from(u16::from_be_bytes([l0, l1]));
        if version >> 4 != 4 || header < 20 {
            return Err(DropReason::Malformed);
        }
        let end = end(packet, offset, length, 0, extent)?;
        if end < (offset + header) as u32 {
            return Err(DropReason::Malformed);
        }
        // "More fragments", or an offset.
        if u16::from_be_bytes([f0, f1]) & 0x3fff != 0 {
            return Err(DropReason::Fragment);
        }
        Ok(Body {
            protocol: Protocol(protocol),
            offset: offset + header,
            end,
        })
    }

    #[inline(always)]
    fn lease(device: &Device) -> &Addr {
        &device.ipv4
    }

    #[inline(always)]
    fn uplink(uplink: &Uplink) -> &Addr {
        &uplink.ipv4
    }

    #[inline(always)]
    fn is_martian(addr: &Addr) -> bool {
        // "This" network, loopback, multicast, class E with the broadcast address.
        matches!(addr.0[12], 0 | 127 | 224..)
    }

    #[inline(always)]
    fn icmp(kind: u8) -> Icmp {
        match kind {
            8 => Icmp::EchoRequest,
            0 => Icmp::EchoReply,
            3 | 11 | 12 => Icmp::Error,
            _ => Icmp::Other,
        }
    }

    #[inline(always)]
    fn replace(
        packet: &mut impl Packet,
        side: Side,
        old: &Addr,
        new: &Addr,
        checksum: Option<(usize, Zero)>,
    ) -> Result<(), DropReason> {
        let (old, new) = (old.v4_octets(), new.v4_octets());
        let delta = Delta::between(&old, &new);
        packet.fix_checksum(OFFSET + 10, Changed::Header, delta)?;
        if let Some((checksum, zero)) = checksum {
            packet.fix_checksum(checksum, Changed::V4Addresses(zero), delta)?;
        }
        let offset = match side {
            Side::Source => OFFSET + 12,
            Side::Destination => OFFSET + 16,
        };
        packet.store(offset, &new)
    }

    /// Address and checksum of the quoted header change by opposite amounts, so that the error's own
    /// checksum, which covers both, stays.
    #[inline(always)]
    fn replace_quoted(
        packet: &mut impl Packet,
        at: usize,
        side: Side,
        old: &Addr,
        new: &Addr,
        _checksum: usize,
    ) -> Result<(), DropReason> {
        let (old, new) = (old.v4_octets(), new.v4_octets());
        let delta = Delta::between(&old, &new);
        packet.fix_checksum(at + 10, Changed::Header, delta)?;
        let offset = match side {
            Side::Source => at + 12,
            Side::Destination => at + 16,
        };
        packet.store(offset, &new)
    }
}

impl L3 for V6 {
    const ICMP: Protocol = Protocol::ICMPV6;
    const FOREIGN_ICMP: Protocol = Protocol::ICMP;
    const ICMP_COVERS_ADDRESSES: bool = true;

    #[inline(always)]
    fn addresses(packet: &impl Packet, offset: usize, tuple: &mut Tuple) -> Result<(), DropReason> {
        tuple.source = Addr(packet.load::<16>(offset + 8)?);
        tuple.destination = Addr(packet.load::<16>(offset + 24)?);
        if tuple.source.is_v4() || tuple.destination.is_v4() {
            return Err(DropReason::MappedAddress);
        }
        Ok(())
    }

    #[inline(always)]
    fn body(packet: &impl Packet, offset: usize, extent: Extent) -> Result<Body, DropReason> {
        let [version, _, _, _, l0, l1, protocol] = packet.load::<7>(offset)?;
        if version >> 4 != 6 {
            return Err(DropReason::Malformed);
        }
        match protocol {
            44 => return Err(DropReason::Fragment),
            // Hop-by-hop, routing, ESP, AH, no next header, destination options, mobility, HIP, shim6
            // and the numbers for experiments (RFC 7045, with RFC 8200).
            0 | 43 | 50 | 51 | 59 | 60 | 135 | 139 | 140 | 253 | 254 => {
                return Err(DropReason::ExtensionHeader);
            }
            _ => {}
        }
        let payload = u32::from(u16::from_be_bytes([l0, l1]));
        Ok(Body {
            protocol: Protocol(protocol),
            offset: offset + 40,
            end: end(packet, offset, 40 + payload, 40, extent)?,
        })
    }

    #[inline(always)]
    fn lease(device: &Device) -> &Addr {
        &device.ipv6
    }

    #[inline(always)]
    fn uplink(uplink: &Uplink) -> &Addr {
        &uplink.ipv6
    }

    #[inline(always)]
    fn is_martian(addr: &Addr) -> bool {
        let mut loopback = Addr::ABSENT;
        loopback.0[15] = 1;
        addr.0[0] == 0xff || same(addr, &Addr::ABSENT) || same(addr, &loopback)
    }

    #[inline(always)]
    fn icmp(kind: u8) -> Icmp {
        match kind {
            128 => Icmp::EchoRequest,
            129 => Icmp::EchoReply,
            1..=4 => Icmp::Error,
            _ => Icmp::Other,
        }
    }

    #[inline(always)]
    fn replace(
        packet: &mut impl Packet,
        side: Side,
        old: &Addr,
        new: &Addr,
        checksum: Option<(usize, Zero)>,
    ) -> Result<(), DropReason> {
        if let Some((checksum, zero)) = checksum {
            let delta = Delta::between(&old.0, &new.0);
            packet.fix_checksum(checksum, Changed::V6Addresses(zero), delta)?;
        }
        let offset = match side {
            Side::Source => OFFSET + 8,
            Side::Destination => OFFSET + 24,
        };
        packet.store(offset, &new.0)
    }
    #[inline(always)]
    fn replace_quoted(
        packet: &mut impl Packet,
        at: usize,
        side: Side,
        old: &Addr,
        new: &Addr,
        checksum: usize,
    ) -> Result<(), DropReason> {
        let delta = Delta::between(&old.0, &new.0);
        packet.fix_checksum(checksum, Changed::Ports(Zero::IsSum), delta)?;
        let offset = match side {
            Side::Source => at + 8,
            Side::Destination => at + 24,
        };
        packet.store(offset, &new.0)
    }
}
