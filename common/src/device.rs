//! The pods of this node as the kernel knows them: by the interface they send through, and by address.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, transmute_ref};

use crate::policy::RulesId;
use crate::table::OTHER_BYTES;
use crate::{Addr, Mac};

/// The gateway of every pod, which no device carries: in the pod a fixed neighbour entry stands for it.
pub const GATEWAY_V4: [u8; 4] = [169, 254, 1, 1];
/// That of IPv6, `fe80::1`.
pub const GATEWAY_V6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Value of `DEVICES`, keyed by the interface index (`u32`) of the host's end of a pod's veth pair: the
/// lease, and the policy that holds for the pod. A device without a row passes nothing.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct Device {
    /// The pod's IPv4 address, or [`Addr::ABSENT`].
    pub ipv4: Addr,
    /// The pod's IPv6 address, or [`Addr::ABSENT`].
    pub ipv6: Addr,
    /// The pod's own Ethernet address: every frame it sends carries it.
    pub mac: Mac,
    pub pad: u16,
    /// What may come in. [`RulesId::OPEN`] when no policy isolates the pod.
    pub ingress: RulesId,
    /// What may go out.
    pub egress: RulesId,
    pub flags: DeviceFlags,
    pub pad2: [u8; 4 + 2 * OTHER_BYTES],
}

/// Bits of [`Device::flags`].
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct DeviceFlags(pub u32);

impl DeviceFlags {
    /// What has been answered already goes on, whatever the pod's rules say by now.
    pub const KEEPS_ESTABLISHED: Self = Self(1);

    /// Is one of these bits set?
    #[inline(always)]
    pub const fn has(self, bits: Self) -> bool {
        self.0 & bits.0 != 0
    }
}

impl Device {
    /// The row as words, in the order of the machine: the two addresses, the rest.
    #[inline(always)]
    pub fn words(&self) -> &[u64; 7 + OTHER_BYTES / 4] {
        transmute_ref!(self)
    }
}

/// Value of `PODS`, keyed by [`Addr`]: which interface leads to a pod of this node.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct LocalPod {
    /// Interface index of the host's end.
    pub ifindex: u32,
    pub flags: u32,
}

const _: () = assert!(size_of::<Device>() == 56 + 2 * OTHER_BYTES);
const _: () = assert!(size_of::<LocalPod>() == 8);
