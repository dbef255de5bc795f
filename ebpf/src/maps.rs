//! Every map, under the names of `weir_common::table`, and the two traits that decisions see them
//! through. `SCRATCH` is no table: it is never pinned.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use weir_common::counter::{COUNTERS as COUNTER_ROWS, Counter, Drops};
use weir_common::device::{Device, LocalPod};
use weir_common::event::EventLimit;
use weir_common::fragment::{Fragment, FragmentKey};
use weir_common::nat::{InCluster, PortRange, Uplink};
use weir_common::node::{Features, NodeConfig};
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::reason::REASONS;
use weir_common::service::{
    Affinity, AffinityKey, Backend, BackendId, Frontend, FrontendKey, Generation, NodeAddress,
    PortBits, SocketKey, SocketPeer,
};
use weir_common::share::{self, Share};
use weir_common::way::{Plan, Way, WayKey};
use weir_common::{Addr, DropReason, Prefix, Protocol, limits, table};
use weir_datapath::tables::{Added, Sockets, Tables};
use weir_datapath::{Outcome, Scratch, Trace};

use crate::{cold, events};

#[map]
static FRONTENDS: HashMap<FrontendKey, Frontend> = HashMap::with_max_entries(limits::FRONTENDS, 0);
// The agent reads these whole, again and again: mapped, a row costs it no call.
#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(limits::BACKENDS, BPF_F_MMAPABLE);
#[map]
static LIVE: Array<Generation> = Array::with_max_entries(limits::LIVE, BPF_F_MMAPABLE);
#[map]
static NODES: HashMap<Addr, NodeAddress> =
    HashMap::with_max_entries(limits::NODES, BPF_F_NO_PREALLOC);
#[map]
static AFFINITY: LruHashMap<AffinityKey, Affinity> =
    LruHashMap::with_max_entries(limits::AFFINITY, 0);
#[map]
static SOCKETS: LruHashMap<SocketKey, SocketPeer> =
    LruHashMap::with_max_entries(limits::SOCKETS, 0);
#[map]
static CONNECTED: LruHashMap<u64, SocketPeer> = LruHashMap::with_max_entries(limits::CONNECTED, 0);
// What it says at a start is the agent's, who also notes behind the ports which programs keep it.
#[map]
static UNUSED_PORTS: Array<PortBits> =
    Array::with_max_entries(limits::UNUSED_PORTS + limits::SOCKET_HOOKS, BPF_F_MMAPABLE);
#[map]
static HOSTNET_PORTS: Array<PortBits> =
    Array::with_max_entries(limits::HOSTNET_PORTS, BPF_F_MMAPABLE);
#[map]
static DEVICES: HashMap<u32, Device> = HashMap::with_max_entries(limits::DEVICES, 0);
#[map]
static PODS: HashMap<Addr, LocalPod> = HashMap::with_max_entries(limits::PODS, 0);
#[map]
static CLASSES: HashMap<Addr, Class> =
    HashMap::with_max_entries(limits::CLASSES, BPF_F_NO_PREALLOC);
#[map]
static CIDRS: LpmTrie<[u8; 16], Class> =
    LpmTrie::with_max_entries(limits::CIDRS, BPF_F_NO_PREALLOC);
#[map]
static VERDICTS: HashMap<VerdictKey, VerdictRow> =
    HashMap::with_max_entries(limits::VERDICTS, BPF_F_NO_PREALLOC);
#[map]
static PORTS: LpmTrie<[u8; 8], PortRow> =
    LpmTrie::with_max_entries(limits::PORTS, BPF_F_NO_PREALLOC);
#[map]
static EPOCH: Array<u32> = Array::with_max_entries(1, 0);
#[map]
static TCP_WAYS: HashMap<WayKey, Way> =
    HashMap::with_max_entries(limits::TCP_WAYS, BPF_F_NO_PREALLOC);
#[map]
static OTHER_WAYS: LruHashMap<WayKey, Way> = LruHashMap::with_max_entries(limits::OTHER_WAYS, 0);
#[map]
static TCP_PLANS: LruHashMap<WayKey, Plan> = LruHashMap::with_max_entries(limits::PLANS, 0);
#[map]
static OTHER_PLANS: LruHashMap<WayKey, Plan> = LruHashMap::with_max_entries(limits::PLANS, 0);
#[map]
static CHOICES: LruHashMap<WayKey, Affinity> = LruHashMap::with_max_entries(limits::CHOICES, 0);
// The agent takes off what it sweeps, while programs count.
#[map]
static SHARES: Array<Share> = Array::with_max_entries(limits::SHARES, BPF_F_MMAPABLE);
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment> =
    LruHashMap::with_max_entries(limits::FRAGMENTS, 0);
#[map]
static UPLINKS: HashMap<u32, Uplink> = HashMap::with_max_entries(limits::UPLINKS, 0);
#[map]
static CLUSTER: LpmTrie<[u8; 16], InCluster> =
    LpmTrie::with_max_entries(limits::CLUSTER, BPF_F_NO_PREALLOC);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTER_ROWS, 0);
#[map]
pub(crate) static DROPS: PerCpuArray<Drops> = PerCpuArray::with_max_entries(REASONS, 0);
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(limits::EVENTS_BYTES, 0);
#[map]
pub(crate) static EVENT_LIMITS: PerCpuArray<EventLimit> = PerCpuArray::with_max_entries(REASONS, 0);
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// What the loader says about this node.
#[unsafe(no_mangle)]
static NODE: Global<NodeConfig> = Global::new(NodeConfig {
    features: Features::MASQUERADE | Features::SAYS_WHY,
    first_port: PortRange::USUAL.first,
    last_port: PortRange::USUAL.last,
    network: 0,
});

#[inline(always)]
pub(crate) fn node() -> NodeConfig {
    NODE.load()
}

/// This CPU's memory for a decision. Packet programs run to their end with migration and softirqs off,
/// so there is one decision at a time.
#[inline(always)]
pub(crate) fn scratch() -> Option<&'static mut Scratch> {
    let scratch = same_scratch()?;
    scratch.trace = Trace::default();
    Some(scratch)
}

/// The same memory in a function that is called in the middle of a decision.
#[inline(always)]
pub(crate) fn same_scratch() -> Option<&'static mut Scratch> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: the pointer is to a live row of the size of `Scratch`, used by one program at a time; who calls looks at
    // it again only when the function is over (`cold::call`).
    Some(unsafe { &mut *scratch })
}

const EEXIST: i32 = -17;

/// The maps as tables.
pub(crate) struct Maps;

/// A key of `CLUSTER` and `CIDRS` whose address is aligned: it is written in words, which the stack takes only so.
#[repr(C, align(8))]
struct AlignedPrefix {
    pad: u32,
    key: Key<[u8; 16]>,
}

impl AlignedPrefix {
    #[inline(always)]
    fn whole(addr: &Addr) -> Self {
        Self {
            pad: 0,
            key: Key::new(Prefix::WHOLE, addr.0),
        }
    }
}

/// The row behind a pointer that a lookup returned.
///
/// # Safety
/// `row` must come from a lookup of this run of the program: the kernel keeps the memory until the
/// program ends, though another CPU may reuse the row of a hash for another key meanwhile.
#[inline(always)]
unsafe fn row<T>(row: *const T) -> &'static T {
    // SAFETY: as above.
    unsafe { &*row }
}

impl Tables for Maps {
    type WayRef = &'static Way;
    type PlanRef = &'static Plan;
    type ShareRef = &'static Share;
    type DeviceRef = &'static Device;
    type UplinkRef = &'static Uplink;
    type PortBitsRef = &'static PortBits;

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        // SAFETY: see `row`.
        FRONTENDS.get_ptr(key).map(|found| *unsafe { row(found) })
    }

    #[inline(always)]
    fn backend(&self, index: u32) -> Option<Backend> {
        BACKENDS.get(index).copied()
    }

    #[inline(always)]
    fn generation(&self, backend: BackendId) -> Option<Generation> {
        LIVE.get(backend).copied()
    }

    #[inline(always)]
    fn hostnet_ports(&self, row: u32) -> Option<&'static PortBits> {
        HOSTNET_PORTS.get(row)
    }

    #[inline(always)]
    fn node(&self, addr: &Addr) -> Option<NodeAddress> {
        // SAFETY: see `row`.
        NODES.get_ptr(addr).map(|found| *unsafe { row(found) })
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: see `row`.
        AFFINITY.get_ptr(key).map(|found| *unsafe { row(found) })
    }

    #[inline(always)]
    fn stick(&self, key: &AffinityKey, row: &Affinity) {
        discard(AFFINITY.insert(key, row, 0));
    }

    #[inline(always)]
    fn device(&self, ifindex: u32) -> Option<&'static Device> {
        // SAFETY: see `row`.
        DEVICES.get_ptr(&ifindex).map(|found| unsafe { row(found) })
    }

    #[inline(always)]
    fn local_pod(&self, addr: &Addr) -> Option<LocalPod> {
        // SAFETY: see `row`.
        PODS.get_ptr(addr).map(|found| *unsafe { row(found) })
    }

    #[inline(always)]
    fn class(&self, addr: &Addr) -> Class {
        match CLASSES.get_ptr(addr) {
            // SAFETY: see `row`.
            Some(found) => *unsafe { row(found) },
            None => {
                let asked = AlignedPrefix::whole(addr);
                CIDRS.get(&asked.key).copied().unwrap_or(Class::WORLD)
            }
        }
    }

    #[inline(always)]
    fn verdict(&self, key: &VerdictKey) -> Option<VerdictRow> {
        // SAFETY: see `row`.
        VERDICTS.get_ptr(key).map(|found| *unsafe { row(found) })
    }

    #[inline(always)]
    fn port(&self, key: &PortKey) -> Option<PortRow> {
        let [a, b, c, d] = key.set;
        let [high, low] = key.port.0;
        let data = [a, b, c, d, key.protocol.0, key.pad, high, low];
        PORTS.get(Key::new(key.prefix_len, data)).copied()
    }

    #[inline(always)]
    fn epoch(&self) -> u32 {
        match EPOCH.get(table::EPOCH_INDEX) {
            Some(epoch) => *epoch,
            None => 0,
        }
    }

    #[inline(always)]
    fn way(&self, key: &WayKey) -> Option<&'static Way> {
        let found = if key.protocol == Protocol::TCP {
            TCP_WAYS.get_ptr(key)
        } else {
            OTHER_WAYS.get_ptr(key)
        };
        // SAFETY: see `row`.
        found.map(|found| unsafe { row(found) })
    }

    #[inline(always)]
    fn add_way(&self, key: &WayKey, way: &Way) -> Result<Added, DropReason> {
        let flags = u64::from(BPF_NOEXIST);
        added(if key.protocol == Protocol::TCP {
            TCP_WAYS.insert(key, way, flags)
        } else {
            OTHER_WAYS.insert(key, way, flags)
        })
    }

    #[inline(always)]
    fn remove_way(&self, key: &WayKey) -> bool {
        let removed = if key.protocol == Protocol::TCP {
            TCP_WAYS.remove(key)
        } else {
            OTHER_WAYS.remove(key)
        };
        removed.is_ok()
    }

    #[inline(always)]
    fn plan(&self, answer: &WayKey) -> Option<&'static Plan> {
        let found = if answer.protocol == Protocol::TCP {
            TCP_PLANS.get_ptr(answer)
        } else {
            OTHER_PLANS.get_ptr(answer)
        };
        // SAFETY: see `row`.
        found.map(|found| unsafe { row(found) })
    }

    #[inline(always)]
    fn add_plan(&self, answer: &WayKey, plan: &Plan) -> Result<Added, DropReason> {
        added(put_plan(answer, plan, u64::from(BPF_NOEXIST)))
    }

    #[inline(always)]
    fn remove_plan(&self, answer: &WayKey) {
        discard(if answer.protocol == Protocol::TCP {
            TCP_PLANS.remove(answer)
        } else {
            OTHER_PLANS.remove(answer)
        });
    }

    #[inline(always)]
    fn choice(&self, key: &WayKey) -> Option<Affinity> {
        // SAFETY: see `row`.
        CHOICES.get_ptr(key).map(|found| *unsafe { row(found) })
    }

    #[inline(always)]
    fn keep_choice(&self, key: &WayKey, row: &Affinity) {
        discard(CHOICES.insert(key, row, 0));
    }

    #[inline(always)]
    fn forget_choice(&self, key: &WayKey) {
        discard(CHOICES.remove(key));
    }

    #[inline(always)]
    fn share(&self, ifindex: u32) -> Option<&'static Share> {
        SHARES.get(share::row(ifindex))
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        // SAFETY: see `row`.
        FRAGMENTS.get_ptr(key).map(|found| *unsafe { row(found) })
    }

    #[inline(always)]
    fn keep_fragment(&self, key: &FragmentKey, row: &Fragment) {
        discard(FRAGMENTS.insert(key, row, 0));
    }

    #[inline(always)]
    fn uplink(&self, ifindex: u32) -> Option<&'static Uplink> {
        // SAFETY: see `row`.
        UPLINKS.get_ptr(&ifindex).map(|found| unsafe { row(found) })
    }

    #[inline(always)]
    fn is_in_cluster(&self, addr: &Addr) -> bool {
        let asked = AlignedPrefix::whole(addr);
        CLUSTER.get(&asked.key).is_some()
    }

    #[inline(always)]
    fn search(&self, start: u32, len: u32, high: u64, low: u64, port: u32) -> u32 {
        cold::weir_search(start, len, high, low, port)
    }

    #[inline(always)]
    fn usable(&self, start: u32, len: u32, index: u32) -> u32 {
        cold::weir_usable(start, len, index)
    }

    #[inline(always)]
    fn settle(&self, scratch: &mut Scratch) {
        cold::settle(scratch);
    }

    #[inline(always)]
    fn again(&self, scratch: &mut Scratch) -> Outcome {
        Outcome(cold::call(scratch, cold::weir_again))
    }

    #[inline(always)]
    fn answer(&self, scratch: &mut Scratch) -> Outcome {
        Outcome(cold::call(scratch, cold::weir_answer))
    }

    #[inline(always)]
    fn establish(&self, scratch: &mut Scratch) -> Outcome {
        Outcome(cold::call(scratch, cold::weir_establish))
    }

    #[inline(always)]
    fn plan_at_pod(&self, scratch: &mut Scratch) -> Outcome {
        Outcome(cold::call(scratch, cold::weir_plan_at_pod))
    }

    #[inline(always)]
    fn plan_from_net(&self, scratch: &mut Scratch) -> Outcome {
        Outcome(cold::call(scratch, cold::weir_plan_from_net))
    }

    #[inline(always)]
    fn plan_to_net(&self, scratch: &mut Scratch) -> Outcome {
        Outcome(cold::call(scratch, cold::weir_plan_to_net))
    }

    #[inline(always)]
    fn about(&self, scratch: &mut Scratch) -> Outcome {
        Outcome(cold::call(scratch, cold::weir_about))
    }

    #[inline(always)]
    fn asks_service(&self, scratch: &mut Scratch) -> u32 {
        cold::call(scratch, cold::weir_frontend)
    }

    #[inline(always)]
    fn first(&self, scratch: &mut Scratch) -> u32 {
        cold::call(scratch, cold::weir_first)
    }

    #[inline(always)]
    fn judge(&self, scratch: &mut Scratch) -> Outcome {
        Outcome(cold::call(scratch, cold::weir_judge))
    }

    #[inline(always)]
    fn tell(&self, scratch: &mut Scratch) -> Outcome {
        Outcome(cold::call(scratch, cold::weir_tell))
    }

    #[inline(always)]
    fn reserve(&self, scratch: &mut Scratch) -> Outcome {
        Outcome(cold::call(scratch, cold::weir_reserve))
    }

    #[inline(always)]
    fn masquerades(&self) -> bool {
        node().features & Features::MASQUERADE != 0
    }

    #[inline(always)]
    fn port_range(&self) -> PortRange {
        let node = node();
        PortRange {
            first: node.first_port,
            last: node.last_port,
        }
    }

    #[inline(always)]
    fn audited(&self, scratch: &Scratch, reason: DropReason) {
        events::audited(scratch, reason as u8);
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: the helper has no arguments and always succeeds.
        unsafe { bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper has no arguments and always succeeds.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn count(&self, counter: Counter) {
        if let Some(count) = COUNTERS.get_ptr_mut(counter as u32) {
            // SAFETY: a live row of this CPU; a program of another kind that interrupts between the
            // load and the store can at worst lose one count.
            unsafe { *count += 1 };
        }
    }
}

impl Sockets for Maps {
    #[inline(always)]
    fn unused_ports(&self, row: u32) -> Option<&'static PortBits> {
        UNUSED_PORTS.get(row)
    }

    #[inline(always)]
    fn own_network(&self) -> u64 {
        node().network
    }

    #[inline(always)]
    fn socket(&self, key: &SocketKey) -> Option<SocketPeer> {
        // SAFETY: see `row`.
        SOCKETS.get_ptr(key).map(|found| *unsafe { row(found) })
    }

    #[inline(always)]
    fn keep_connected(&self, cookie: u64, backend: &SocketPeer) {
        discard(CONNECTED.insert(&cookie, backend, 0));
    }

    #[inline(always)]
    fn forget_connected(&self, cookie: u64) {
        discard(CONNECTED.remove(&cookie));
    }

    #[inline(always)]
    fn remember(&self, key: &SocketKey, peer: &SocketPeer) {
        discard(SOCKETS.insert(key, peer, 0));
    }
}

#[inline(always)]
fn put_plan(answer: &WayKey, plan: &Plan, flags: u64) -> Result<(), i32> {
    if answer.protocol == Protocol::TCP {
        TCP_PLANS.insert(answer, plan, flags)
    } else {
        OTHER_PLANS.insert(answer, plan, flags)
    }
}

#[inline(always)]
fn added(inserted: Result<(), i32>) -> Result<Added, DropReason> {
    match inserted {
        Ok(()) => Ok(Added::New),
        Err(EEXIST) => Ok(Added::Already),
        Err(_) => Err(DropReason::TableFull),
    }
}

/// For results that say nothing the caller could act on: a row that is already gone, or a table whose
/// rows are best effort.
#[inline(always)]
fn discard(_: Result<(), i32>) {}
