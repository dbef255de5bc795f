//! What a decision may look up, remember and count. In the kernel eBPF maps, on the host ordinary ones.

use core::ops::Deref;

use weir_common::counter::Counter;
use weir_common::device::{Device, LocalPod};
use weir_common::flow::{Flow, FlowKey};
use weir_common::nat::{NatKey, NatRow, PortRange, Uplink};
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::service::{
    Affinity, AffinityKey, Backend, BackendId, Frontend, FrontendKey, Generation, NodeAddress,
    SocketKey, SocketPeer,
};
use weir_common::{Addr, DropReason};

use crate::service;
use crate::tuple::AlignedKey;

/// The tables of `weir_common::table`, by the name of what a row is.
pub trait Tables {
    /// A flow that is in a table: other CPUs may hold it too.
    type FlowRef: Deref<Target = Flow>;
    /// A device's row.
    type DeviceRef: Deref<Target = Device>;
    /// An uplink's row.
    type UplinkRef: Deref<Target = Uplink>;

    fn frontend(&self, key: &FrontendKey) -> Option<Frontend>;
    fn backend(&self, index: u32) -> Option<Backend>;
    fn generation(&self, backend: BackendId) -> Option<Generation>;
    /// [`service::search`], which a program may call instead of containing it.
    #[inline(always)]
    fn search(&self, start: u32, len: u32, high: u64, low: u64, port: u32) -> u32 {
        service::search(self, start, len, high, low, port)
    }
    /// [`service::usable`], likewise.
    #[inline(always)]
    fn usable(&self, start: u32, len: u32, index: u32) -> u32 {
        service::usable(self, start, len, index)
    }
    /// Whose address, if it is a node's.
    fn node(&self, addr: &Addr) -> Option<NodeAddress>;

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    /// Best effort: a row that finds no room costs a client its stickiness.
    fn stick(&self, key: &AffinityKey, row: &Affinity);

    fn device(&self, ifindex: u32) -> Option<Self::DeviceRef>;
    fn local_pod(&self, addr: &Addr) -> Option<LocalPod>;

    /// [`Class::WORLD`] for an address without a row.
    fn class(&self, addr: &Addr) -> Class;
    fn verdict(&self, key: &VerdictKey) -> Option<VerdictRow>;
    /// The row of the longest prefix of the key.
    fn port(&self, key: &PortKey) -> Option<PortRow>;
    fn epoch(&self) -> u32;

    fn flow(&self, table: FlowTable, key: &AlignedKey) -> Option<Self::FlowRef>;

    /// Adds a flow to `HALF_OPEN`.
    ///
    /// # Errors
    /// [`DropReason::TableFull`].
    fn open(&self, key: &AlignedKey, flow: &Flow) -> Result<Opened, DropReason>;

    /// Moves a flow from `HALF_OPEN` to `FLOWS`. If that has no room it stays where it is.
    fn promote(&self, key: &AlignedKey, flow: &Self::FlowRef);

    /// Takes a flow out of whichever table holds it.
    fn forget(&self, key: &AlignedKey);

    /// The addresses of the device with this interface index, if it is an uplink.
    fn uplink(&self, ifindex: u32) -> Option<Self::UplinkRef>;
    /// Is it an address of a pod or node of the cluster?
    fn is_in_cluster(&self, addr: &Addr) -> bool;
    /// Whom a reply to a reserved port is for.
    fn reserved(&self, key: &NatKey) -> Option<NatRow>;

    /// Reserves a port.
    ///
    /// # Errors
    /// [`DropReason::TableFull`].
    fn reserve(&self, key: &NatKey, row: &NatRow) -> Result<Reserved, DropReason>;

    /// Does what pods send out of the cluster leave with the node's address?
    fn masquerades(&self) -> bool;
    /// The ports that may be reserved.
    fn port_range(&self) -> PortRange;

    /// Monotonic time in nanoseconds, to within a clock tick.
    fn now(&self) -> u64;
    fn random(&self) -> u32;
    fn count(&self, counter: Counter);
}

/// Which of the two tables of flows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FlowTable {
    /// The responder has answered.
    Answered,
    HalfOpen,
}

/// What came of adding a flow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Opened {
    New,
    /// Another CPU was faster.
    Already,
}

/// What came of reserving a port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reserved {
    New,
    /// Somebody has it.
    Taken,
}

/// What the socket hooks remember: the `SOCKETS` table.
pub trait Sockets: Tables {
    /// The cookie of the node's network namespace, [`weir_common::node::NodeConfig::network`].
    fn own_network(&self) -> u64;
    fn socket(&self, key: &SocketKey) -> Option<SocketPeer>;
    /// Best effort: a row that finds no room costs the socket its stickiness, or a name its disguise.
    fn remember(&self, key: &SocketKey, peer: &SocketPeer);
}

/// The key without its alignment.
impl Deref for AlignedKey {
    type Target = FlowKey;

    #[inline(always)]
    fn deref(&self) -> &FlowKey {
        &self.0
    }
}
