//! IPv4 and IPv6: the only file that knows one from the other, but for [`crate::refuse`], which writes packets of both.
//! Everything after it is written once.

mod unfold;

use weir_common::device::Device;
use weir_common::nat::Uplink;
use weir_common::way::WayKey;
use weir_common::{Addr, DropReason, Port, Protocol};

use crate::packet::{Changed, Delta, Packet, Zero};

pub use unfold::Part;

/// Where the IP header starts: VLAN tags are refused, so always behind 14 bytes of Ethernet.
pub const OFFSET: usize = 14;

/// The longest header that is passed on in front of the transport's: IPv6 with 64 bytes of extension headers.
pub const LONGEST: usize = 104;

/// The number of the header of a fragment (RFC 8200 section 4.5).
const FRAGMENT: u8 = 44;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// 802.1Q, 802.1ad, and the number that was used for QinQ before it.
const ETHERTYPES_VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];

/// A family of addresses.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(u8)]
pub enum Family {
    #[default]
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

impl Body {
    /// Not known yet.
    pub const NONE: Self = Self {
        protocol: Protocol(0),
        offset: OFFSET,
        end: OFFSET as u32,
    };
}

/// An IP header without its addresses. In words, which a program keeps in registers.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// The version in the upper half of the byte; of IPv4 the length of the header in the lower one, in words.
    version: u32,
    /// In bytes: of the packet for IPv4, of what follows the header for IPv6.
    length: u32,
    /// Of IPv4: flags and offset.
    fragment: u32,
    protocol: u32,
}

/// How much of an IP packet is there.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(u8)]
pub enum Extent {
    #[default]
    Whole,
    /// The start of it, inside of an ICMP error.
    Quoted,
    /// A fragment that says that it is all of its packet: treated as such (RFC 6946).
    Atomic,
    /// The first fragment, and another one.
    First,
    Later,
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

/// `N` of the bytes of a header.
#[inline(always)]
const fn bytes<const AT: usize, const N: usize, const M: usize>(header: &[u8; M]) -> [u8; N] {
    let mut bytes = [0; N];
    let mut at = 0;
    while at < N {
        bytes[at] = header[AT + at];
        at += 1;
    }
    bytes
}

impl Family {
    /// The family of a frame from its type.
    ///
    /// # Errors
    /// [`DropReason::Malformed`], [`DropReason::VlanTagged`], [`DropReason::NotIp`].
    #[inline(always)]
    pub fn of(packet: &impl Packet) -> Result<Self, DropReason> {
        let ethertype = u16::from_be_bytes(packet.load::<2>(12)?);
        if packet.has_stripped_vlan() {
            return Err(DropReason::VlanTagged);
        }
        match ethertype {
            ETHERTYPE_IPV4 => Ok(Self::V4),
            ETHERTYPE_IPV6 => Ok(Self::V6),
            other if ETHERTYPES_VLAN.contains(&other) => Err(DropReason::VlanTagged),
            _ => Err(DropReason::NotIp),
        }
    }

    /// Reads the header at an offset, once: fills the addresses of a key, which are still to be looked at
    /// ([`Self::check`]).
    ///
    /// # Errors
    /// [`DropReason::Malformed`].
    #[inline(always)]
    pub fn header(
        self,
        packet: &impl Packet,
        at: usize,
        key: &mut WayKey,
    ) -> Result<Header, DropReason> {
        match self {
            Self::V4 => {
                let header = packet.load::<20>(at)?;
                let [version, _, l0, l1, _, _, f0, f1, _, protocol, ..] = header;
                key.source = mapped(bytes::<12, 4, 20>(&header));
                key.destination = mapped(bytes::<16, 4, 20>(&header));
                Ok(Header {
                    version: version.into(),
                    length: u16::from_be_bytes([l0, l1]).into(),
                    fragment: u16::from_be_bytes([f0, f1]).into(),
                    protocol: protocol.into(),
                })
            }
            Self::V6 => {
                let header = packet.load::<40>(at)?;
                let [version, _, _, _, l0, l1, protocol, _, ..] = header;
                key.source = Addr(bytes::<8, 16, 40>(&header));
                key.destination = Addr(bytes::<24, 16, 40>(&header));
                Ok(Header {
                    version: version.into(),
                    length: u16::from_be_bytes([l0, l1]).into(),
                    fragment: 0,
                    protocol: protocol.into(),
                })
            }
        }
    }

    /// Looks at the addresses that were read. Not in the same breath: the compiler would take them apart into the bytes
    /// that it has just put together, and what is in memory it compares in words.
    ///
    /// # Errors
    /// [`DropReason::MappedAddress`].
    #[inline(always)]
    pub fn check(self, key: &WayKey) -> Result<(), DropReason> {
        let [a, b, c, d, _] = *key.words();
        if self == Self::V6 && (is_mapped(a, b) || is_mapped(c, d)) {
            return Err(DropReason::MappedAddress);
        }
        Ok(())
    }

    /// What follows the header at an offset.
    ///
    /// # Errors
    /// [`DropReason::Malformed`], [`DropReason::Fragment`], [`DropReason::ExtensionHeader`].
    #[inline(always)]
    pub fn body(
        self,
        packet: &impl Packet,
        at: usize,
        header: &Header,
        extent: Extent,
    ) -> Result<Body, DropReason> {
        match self {
            Self::V4 => v4_body(packet, at, header, extent),
            Self::V6 => v6_body(packet, at, header, extent),
        }
    }

    /// The address that a device's lease gives in this family, in words.
    #[inline(always)]
    pub fn lease(self, device: &Device) -> [u64; 2] {
        let [a, b, c, d, ..] = *device.words();
        match self {
            Self::V4 => [a, b],
            Self::V6 => [c, d],
        }
    }

    /// The address with which traffic of this family leaves.
    #[inline(always)]
    pub const fn uplink(self, uplink: &Uplink) -> &Addr {
        match self {
            Self::V4 => &uplink.ipv4,
            Self::V6 => &uplink.ipv6,
        }
    }

    /// May the address, in words, not be on the wire at all (RFC 1812 section 5.3.7, RFC 4291 section 2.5)?
    #[inline(always)]
    pub const fn is_martian(self, addr: [u64; 2]) -> bool {
        let (high, low) = (u64::from_be(addr[0]), u64::from_be(addr[1]));
        match self {
            // "This" network, loopback, multicast, class E with the broadcast address.
            Self::V4 => matches!((low >> 24) as u8, 0 | 127 | 224..),
            // Multicast, unspecified, loopback.
            Self::V6 => high >> 56 == 0xff || (high == 0 && low <= 1),
        }
    }

    /// The number of the family's own ICMP, and of the other's, which may not appear.
    #[inline(always)]
    pub const fn icmp_numbers(self) -> (Protocol, Protocol) {
        match self {
            Self::V4 => (Protocol::ICMP, Protocol::ICMPV6),
            Self::V6 => (Protocol::ICMPV6, Protocol::ICMP),
        }
    }

    /// Does the checksum of the family's ICMP cover addresses (RFC 4443 section 2.3)?
    #[inline(always)]
    pub const fn covers_icmp(self) -> bool {
        matches!(self, Self::V6)
    }

    /// What a type of the family's ICMP means.
    #[inline(always)]
    pub const fn icmp(self, kind: u8) -> Icmp {
        match (self, kind) {
            (Self::V4, 8) | (Self::V6, 128) => Icmp::EchoRequest,
            (Self::V4, 0) | (Self::V6, 129) => Icmp::EchoReply,
            (Self::V4, 3 | 11 | 12) | (Self::V6, 1..=4) => Icmp::Error,
            _ => Icmp::Other,
        }
    }

    /// Looks into a frame that a kernel has made, without extension headers: is it an ICMP error, or of TCP or UDP and from one of some
    /// ports? A fragment may be.
    #[inline(always)]
    pub fn may_be(self, packet: &impl Packet, is_one: impl FnOnce(Port) -> bool) -> bool {
        let (protocol, is_fragment, size) = match self {
            Self::V4 => match packet.load::<10>(OFFSET) {
                Ok([version, _, _, _, _, _, f0, f1, _, protocol]) => {
                    let is_fragment = u16::from_be_bytes([f0, f1]) & 0x3fff != 0;
                    (protocol, is_fragment, (version & 0x0f) as usize * 4)
                }
                Err(_) => return false,
            },
            Self::V6 => match packet.load::<1>(OFFSET + 6) {
                Ok([protocol]) => (protocol, protocol == FRAGMENT, 40),
                Err(_) => return false,
            },
        };
        let Ok([a, b]) = packet.load::<2>(OFFSET + size) else {
            return false;
        };
        match Protocol(protocol) {
            _ if is_fragment => true,
            Protocol::TCP | Protocol::UDP => is_one(Port([a, b])),
            other => other == self.icmp_numbers().0 && matches!(self.icmp(a), Icmp::Error),
        }
    }

    /// Replaces an address, which is there in words too, and corrects the header's own checksum and the transport's, which is at an
    /// offset if it covers addresses.
    ///
    /// # Errors
    /// [`DropReason::WriteFailed`].
    #[inline(always)]
    pub fn replace(
        self,
        packet: &mut impl Packet,
        side: Side,
        old: [u64; 2],
        new: [u64; 2],
        addr: &Addr,
        checksum: Option<(usize, Zero)>,
    ) -> Result<(), DropReason> {
        let delta = Delta::of_addresses(old, new);
        match self {
            Self::V4 => {
                packet.fix_checksum(OFFSET + 10, Changed::Header, delta)?;
                if let Some((checksum, zero)) = checksum {
                    packet.fix_checksum(checksum, Changed::V4Addresses(zero), delta)?;
                }
            }
            Self::V6 => {
                if let Some((checksum, zero)) = checksum {
                    packet.fix_checksum(checksum, Changed::V6Addresses(zero), delta)?;
                } else {
                    packet.fix_checksum(0, Changed::Uncovered, delta)?;
                }
            }
        }
        self.store(packet, OFFSET, side, addr)
    }

    /// Lets the two addresses of the packet at an offset change places, which are those of a key. A sum is the same in
    /// whatever order, so no checksum changes.
    ///
    /// # Errors
    /// [`DropReason::WriteFailed`].
    #[inline(always)]
    pub fn turn(self, packet: &mut impl Packet, at: usize, key: &WayKey) -> Result<(), DropReason> {
        self.store(packet, at, Side::Source, &key.destination)?;
        self.store(packet, at, Side::Destination, &key.source)
    }

    /// Replaces an address in the packet at an offset that an ICMP error quotes, and corrects the
    /// checksums that cover it: the quoted header's, the error's.
    ///
    /// # Errors
    /// [`DropReason::WriteFailed`].
    #[inline(always)]
    #[expect(
        clippy::too_many_arguments,
        reason = "it is inlined: each is a register"
    )]
    pub fn replace_quoted(
        self,
        packet: &mut impl Packet,
        at: usize,
        side: Side,
        old: [u64; 2],
        new: [u64; 2],
        addr: &Addr,
        checksum: usize,
    ) -> Result<(), DropReason> {
        let delta = Delta::of_addresses(old, new);
        match self {
            // Address and checksum of the quoted header change by opposite amounts, so that the error's own
            // checksum, which covers both, stays.
            Self::V4 => {
                packet.fix_checksum(at + 10, Changed::Header, delta)?;
            }
            Self::V6 => {
                packet.fix_checksum(checksum, Changed::Ports(Zero::IsSum), delta)?;
            }
        }
        self.store(packet, at, side, addr)
    }

    #[inline(always)]
    fn store(
        self,
        packet: &mut impl Packet,
        at: usize,
        side: Side,
        new: &Addr,
    ) -> Result<(), DropReason> {
        match (self, side) {
            (Self::V4, Side::Source) => packet.store(at + 12, &new.v4_octets()),
            (Self::V4, Side::Destination) => packet.store(at + 16, &new.v4_octets()),
            (Self::V6, Side::Source) => packet.store(at + 8, &new.0),
            (Self::V6, Side::Destination) => packet.store(at + 24, &new.0),
        }
    }
}

#[inline(always)]
fn v4_body(
    packet: &impl Packet,
    at: usize,
    header: &Header,
    extent: Extent,
) -> Result<Body, DropReason> {
    let size = (header.version & 0x0f) as usize * 4;
    if header.version >> 4 != 4 || size < 20 {
        return Err(DropReason::Malformed);
    }
    let end = end(packet, at, header.length, 0, extent)?;
    if end < (at + size) as u32 {
        return Err(DropReason::Malformed);
    }
    if extent == Extent::Quoted {
        if header.fragment & 0x1fff != 0 {
            return Err(DropReason::NoFlow);
        }
    } else if header.fragment & 0x3fff != 0 {
        // More fragments, or an offset.
        return Err(DropReason::Fragment);
    } else if size > 20 {
        // Options.
        return Err(DropReason::ExtensionHeader);
    }
    Ok(Body {
        protocol: Protocol(header.protocol as u8),
        offset: at + size,
        end,
    })
}

#[inline(always)]
fn v6_body(
    packet: &impl Packet,
    at: usize,
    header: &Header,
    extent: Extent,
) -> Result<Body, DropReason> {
    if header.version >> 4 != 6 {
        return Err(DropReason::Malformed);
    }
    let (mut protocol, mut offset) = (header.protocol as u8, at + 40);
    if extent == Extent::Quoted && protocol == FRAGMENT {
        let [next, _, f0, f1] = packet.load::<4>(offset)?;
        if u16::from_be_bytes([f0, f1]) & 0xfff8 != 0 {
            return Err(DropReason::NoFlow);
        }
        (protocol, offset) = (next, offset + 8);
    }
    match protocol {
        FRAGMENT => return Err(DropReason::Fragment),
        // Hop-by-hop, routing, ESP, AH, no next header, destination options, mobility, HIP, shim6
        // and the numbers for experiments (RFC 7045, with RFC 8200).
        0 | 43 | 50 | 51 | 59 | 60 | 135 | 139 | 140 | 253 | 254 => {
            return Err(DropReason::ExtensionHeader);
        }
        _ => {}
    }
    Ok(Body {
        protocol: Protocol(protocol),
        offset,
        end: end(packet, at, 40 + header.length, 40, extent)?,
    })
}

/// [`Addr::is_v4`] in words.
#[inline(always)]
const fn is_mapped(high: u64, low: u64) -> bool {
    high == 0 && u64::from_be(low) >> 32 == 0xffff
}
