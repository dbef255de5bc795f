//! Addresses, ports, protocols: network order, one width for both families. Parsing of packets is not
//! here.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An IP address as 16 bytes in network order. IPv4 is stored in its IPv4-mapped form
/// (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2); a packet of IPv6 that carries such an address is
/// refused at parse, so the two families can never collide in a table.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Addr(pub [u8; 16]);

impl Addr {
    /// "No address": the all-zero IPv6 address, never a key of a table.
    pub const ABSENT: Self = Self([0; 16]);

    /// An IPv4 address from its four octets.
    #[inline(always)]
    pub const fn v4(o: [u8; 4]) -> Self {
        Self([
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, o[0], o[1], o[2], o[3],
        ])
    }

    /// True for an address in IPv4-mapped form.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = self.0;
        let high = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        // In words: by bytes it would be forty instructions of a program.
        let middle = u32::from_be_bytes([i, j, k, l]);
        high == 0 && middle == 0xffff
    }

    /// The last four octets: the IPv4 address of a mapped one.
    #[inline(always)]
    pub const fn v4_octets(&self) -> [u8; 4] {
        [self.0[12], self.0[13], self.0[14], self.0[15]]
    }
}

/// A range of addresses, key of the tries `CLUSTER` and `CIDRS`. IPv4 ranges are those of the mapped form, so their lengths are
/// 96 longer.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct Prefix {
    /// In bits, of `addr` alone.
    pub prefix_len: u32,
    /// The bits after the first `prefix_len` are zero.
    pub addr: Addr,
}

impl Prefix {
    /// What asks for an address.
    pub const WHOLE: u32 = 128;
    /// What an IPv4 prefix is longer in the mapped form.
    pub const V4_EXTRA: u32 = 96;
    /// Every IPv4 address.
    pub const V4: Self = Self {
        prefix_len: Self::V4_EXTRA,
        addr: Addr::v4([0; 4]),
    };
}

const _: () = assert!(size_of::<Prefix>() == 20);

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::v4(ip.octets())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        Self(ip.octets())
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        if addr.is_v4() {
            IpAddr::V4(addr.v4_octets().into())
        } else {
            IpAddr::V6(addr.0.into())
        }
    }
}

/// A port of TCP, UDP or SCTP in network order; for ICMP echo, the requester's is the identifier.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Port(pub [u8; 2]);

impl Port {
    /// "No port": what a protocol without ports carries in keys.
    pub const ABSENT: Self = Self([0; 2]);
}

impl From<u16> for Port {
    #[inline(always)]
    fn from(host_order: u16) -> Self {
        Self(host_order.to_be_bytes())
    }
}

impl From<Port> for u16 {
    #[inline(always)]
    fn from(port: Port) -> Self {
        u16::from_be_bytes(port.0)
    }
}

/// An Ethernet address.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Mac(pub [u8; 6]);

/// A protocol number as IANA assigns them; [`Protocol::ICMP`] stands for ICMP of both families.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Protocol(pub u8);

impl Protocol {
    pub const ICMP: Self = Self(1);
    pub const TCP: Self = Self(6);
    pub const UDP: Self = Self(17);
    pub const ICMPV6: Self = Self(58);
    pub const SCTP: Self = Self(132);
}

const _: () = assert!(size_of::<Addr>() == 16 && align_of::<Addr>() == 1);
const _: () = assert!(size_of::<Port>() == 2 && align_of::<Port>() == 1);
