//! What a decision may look up, remember and count. In the kernel eBPF maps, on the host ordinary ones.

use core::ops::Deref;

use weir_common::counter::Counter;
use weir_common::device::{Device, LocalPod};
use weir_common::fragment::{Fragment, FragmentKey};
use weir_common::nat::{PortRange, Uplink};
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::service::{
    Affinity, AffinityKey, Backend, BackendId, Frontend, FrontendKey, Generation, NodeAddress,
    PortBits, SocketKey, SocketPeer,
};
use weir_common::share::Share;
use weir_common::way::{Plan, Way, WayKey};
use weir_common::{Addr, DropReason};

use crate::verdict::{Outcome, Scratch};
use crate::{answer, icmp, plan, policy, reserve, service, way};

/// The tables of `weir_common::table`, by the name of what a row is.
pub trait Tables {
    /// A way or a plan that is in a table: other CPUs may hold it too.
    type WayRef: Deref<Target = Way>;
    type PlanRef: Deref<Target = Plan>;
    /// A pod's row of shares.
    type ShareRef: Deref<Target = Share>;
    /// A device's row.
    type DeviceRef: Deref<Target = Device>;
    /// An uplink's row.
    type UplinkRef: Deref<Target = Uplink>;
    /// A row of bits for ports.
    type PortBitsRef: Deref<Target = PortBits>;

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
    /// A row of `HOSTNET_PORTS`.
    fn hostnet_ports(&self, row: u32) -> Option<Self::PortBitsRef>;
    /// Whose address, if it is a node's.
    fn node(&self, addr: &Addr) -> Option<NodeAddress>;

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    /// Best effort: a row that finds no room costs a client its stickiness.
    fn stick(&self, key: &AffinityKey, row: &Affinity);

    fn device(&self, ifindex: u32) -> Option<Self::DeviceRef>;
    fn local_pod(&self, addr: &Addr) -> Option<LocalPod>;

    /// That of its own row, otherwise of the longest block that it is in, otherwise [`Class::WORLD`].
    fn class(&self, addr: &Addr) -> Class;
    fn verdict(&self, key: &VerdictKey) -> Option<VerdictRow>;
    /// The row of the longest prefix of the key.
    fn port(&self, key: &PortKey) -> Option<PortRow>;
    fn epoch(&self) -> u32;

    /// TCP has tables of its own, here and for plans.
    fn way(&self, key: &WayKey) -> Option<Self::WayRef>;

    /// Adds a way.
    ///
    /// # Errors
    /// [`DropReason::TableFull`].
    fn add_way(&self, key: &WayKey, way: &Way) -> Result<Added, DropReason>;

    /// Removes a way. Was there one?
    fn remove_way(&self, key: &WayKey) -> bool;

    /// The plan whose first answer is this packet.
    fn plan(&self, answer: &WayKey) -> Option<Self::PlanRef>;

    /// Adds a plan.
    ///
    /// # Errors
    /// [`DropReason::TableFull`].
    fn add_plan(&self, answer: &WayKey, plan: &Plan) -> Result<Added, DropReason>;

    fn remove_plan(&self, answer: &WayKey);

    /// What was drawn for a connection, by its opener's key. Its time is nobody's.
    fn choice(&self, key: &WayKey) -> Option<Affinity>;
    /// Best effort: a row that finds no room costs a connection its draw if that comes out otherwise by now.
    fn keep_choice(&self, key: &WayKey, row: &Affinity);
    fn forget_choice(&self, key: &WayKey);

    /// What the pod behind an interface index holds.
    fn share(&self, ifindex: u32) -> Option<Self::ShareRef>;

    fn fragment(&self, key: &FragmentKey) -> Option<Fragment>;
    /// Best effort: a row that finds no room costs a packet its later fragments.
    fn keep_fragment(&self, key: &FragmentKey, row: &Fragment);

    /// The addresses of the device with this interface index, if it is an uplink.
    fn uplink(&self, ifindex: u32) -> Option<Self::UplinkRef>;
    /// Is it an address of a pod or node of the cluster?
    fn is_in_cluster(&self, addr: &Addr) -> bool;
    /// Does what pods send out of the cluster leave with the node's address?
    fn masquerades(&self) -> bool;
    /// The ports that may be reserved.
    fn port_range(&self) -> PortRange;

    /// From here on a program reads the scratch from memory: the verifier then walks what follows once, whatever
    /// branches led here.
    #[inline(always)]
    fn settle(&self, _scratch: &mut Scratch) {}

    // The cold path, in functions that a program may call instead of containing them.

    /// [`way::again`].
    #[inline(always)]
    fn again(&self, scratch: &mut Scratch) -> Outcome {
        way::again(self, scratch)
    }
    /// [`answer::answer`].
    #[inline(always)]
    fn answer(&self, scratch: &mut Scratch) -> Outcome {
        answer::answer(self, scratch)
    }
    /// [`answer::establish`].
    #[inline(always)]
    fn establish(&self, scratch: &mut Scratch) -> Outcome {
        answer::establish(self, scratch)
    }
    /// [`plan::at_pod`].
    #[inline(always)]
    fn plan_at_pod(&self, scratch: &mut Scratch) -> Outcome {
        plan::at_pod(self, scratch)
    }
    /// [`plan::from_net`].
    #[inline(always)]
    fn plan_from_net(&self, scratch: &mut Scratch) -> Outcome {
        plan::from_net(self, scratch)
    }
    /// [`plan::to_net`].
    #[inline(always)]
    fn plan_to_net(&self, scratch: &mut Scratch) -> Outcome {
        plan::to_net(self, scratch)
    }
    /// [`icmp::about`].
    #[inline(always)]
    fn about(&self, scratch: &mut Scratch) -> Outcome {
        icmp::about(self, scratch)
    }
    /// [`service::frontend_of_packet`].
    #[inline(always)]
    fn asks_service(&self, scratch: &mut Scratch) -> u32 {
        service::frontend_of_packet(self, scratch)
    }
    /// [`service::first_for_packet`].
    #[inline(always)]
    fn first(&self, scratch: &mut Scratch) -> u32 {
        service::first_for_packet(self, scratch)
    }
    /// [`policy::judge`].
    #[inline(always)]
    fn judge(&self, scratch: &mut Scratch) -> Outcome {
        policy::judge(self, scratch)
    }
    /// [`policy::tell_audit`].
    #[inline(always)]
    fn tell(&self, scratch: &mut Scratch) -> Outcome {
        policy::tell_audit(self, scratch)
    }
    /// [`reserve::reserve`].
    #[inline(always)]
    fn reserve(&self, scratch: &mut Scratch) -> Outcome {
        reserve::reserve(self, scratch)
    }

    /// Monotonic time in nanoseconds, to within a clock tick.
    fn now(&self) -> u64;
    fn random(&self) -> u32;
    fn count(&self, counter: Counter);
    /// Policies that are only audited would have dropped what is at hand, for this reason; the rule is in the trace. Whoever cares
    /// tells it.
    fn audited(&self, _scratch: &Scratch, _reason: DropReason) {}
}

/// What came of adding a row.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Added {
    New,
    /// There is one already.
    Already,
}

/// What the socket hooks remember: the `SOCKETS` table.
pub trait Sockets: Tables {
    /// The cookie of the node's network namespace, [`weir_common::node::NodeConfig::network`].
    fn own_network(&self) -> u64;
    /// A row of `UNUSED_PORTS`.
    fn unused_ports(&self, row: u32) -> Option<Self::PortBitsRef>;
    fn socket(&self, key: &SocketKey) -> Option<SocketPeer>;
    /// Best effort: a row that finds no room costs the socket its stickiness, or a name its disguise.
    fn remember(&self, key: &SocketKey, peer: &SocketPeer);
    /// Keeps the backend of a connected UDP socket of the node's own processes, by the socket's cookie. Best effort, as above.
    fn keep_connected(&self, cookie: u64, backend: &SocketPeer);
    fn forget_connected(&self, cookie: u64);
}
