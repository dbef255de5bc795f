//! The tables of the datapath in ordinary memory, with ordinary maps, a clock that stands still until it
//! is moved, and random numbers that are told.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use weir_common::counter::{COUNTERS, Counter};
use weir_common::device::{Device, LocalPod};
use weir_common::flow::{Flow, FlowKey};
use weir_common::nat::{ClusterKey, NatKey, NatRow, PortRange, Uplink};
use weir_common::node::{Features, NodeConfig};
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::service::{
    Affinity, AffinityKey, Backend, BackendId, Frontend, FrontendKey, Generation, NodeAddress,
    SocketKey, SocketPeer,
};
use weir_common::shared::{AtomicU32, AtomicU64};
use weir_common::{Addr, DropReason};
use weir_datapath::Tables;
use weir_datapath::tables::{FlowTable, Opened, Reserved, Sockets};
use weir_datapath::tuple::AlignedKey;
use zerocopy::IntoBytes as _;

/// Every table. What the agent writes is plain; what decisions write is behind cells.
#[derive(Debug, Default)]
pub struct Memory {
    pub frontends: HashMap<FrontendKey, Frontend>,
    pub backends: HashMap<u32, Backend>,
    pub live: HashMap<BackendId, Generation>,
    pub nodes: HashMap<Addr, NodeAddress>,
    pub devices: HashMap<u32, Rc<Device>>,
    pub pods: HashMap<Addr, LocalPod>,
    pub classes: HashMap<Addr, Class>,
    pub verdicts: HashMap<VerdictKey, VerdictRow>,
    pub ports: HashMap<PortKey, PortRow>,
    pub epoch: u32,
    pub flows: RefCell<HashMap<FlowKey, Rc<Flow>>>,
    pub half_open: RefCell<HashMap<FlowKey, Rc<Flow>>>,
    pub affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    pub sockets: RefCell<HashMap<SocketKey, SocketPeer>>,
    pub uplinks: HashMap<u32, Rc<Uplink>>,
    pub cluster: Vec<ClusterKey>,
    pub nat_ports: RefCell<HashMap<NatKey, NatRow>>,
    /// What the programs are told when they are loaded.
    pub config: NodeConfig,
    /// The cookie of the node's network namespace.
    pub network: u64,
    /// Entries that `HALF_OPEN` takes.
    pub room: Room,
    pub now: Cell<u64>,
    pub random: Cell<u32>,
    counters: RefCell<HashMap<u32, u64>>,
}

/// Whether there is room for another flow.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Room {
    #[default]
    Plenty,
    Full,
}

impl Memory {
    /// How often a counter was raised.
    pub fn counted(&self, counter: Counter) -> u64 {
        let counters = self.counters.borrow();
        counters.get(&(counter as u32)).copied().unwrap_or(0)
    }

    /// Every counter, by index.
    pub fn counters(&self) -> Vec<u64> {
        let counters = self.counters.borrow();
        (0..COUNTERS)
            .map(|index| counters.get(&index).copied().unwrap_or(0))
            .collect()
    }

    /// The flow of a key in either table.
    pub fn any_flow(&self, key: &FlowKey) -> Option<Rc<Flow>> {
        let found = self.flows.borrow().get(key).cloned();
        found.or_else(|| self.half_open.borrow().get(key).cloned())
    }
}

/// A copy of a flow as it is now.
pub fn copy(flow: &Flow) -> Flow {
    let load = |cell: &AtomicU32| AtomicU32::new(cell.load(Relaxed));
    let load64 = |cell: &AtomicU64| AtomicU64::new(cell.load(Relaxed));
    Flow {
        created: flow.created,
        seen: load64(&flow.seen),
        packets: [load64(&flow.packets[0]), load64(&flow.packets[1])],
        bytes: [load64(&flow.bytes[0]), load64(&flow.bytes[1])],
        bits: load(&flow.bits),
        epoch: load(&flow.epoch),
        egress_rule: load(&flow.egress_rule),
        ingress_rule: load(&flow.ingress_rule),
        opener_device: load(&flow.opener_device),
        responder_device: load(&flow.responder_device),
        nat: flow.nat,
        masquerade: load64(&flow.masquerade),
    }
}

impl Tables for Memory {
    type FlowRef = Rc<Flow>;
    type DeviceRef = Rc<Device>;
    type UplinkRef = Rc<Uplink>;

    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.frontends.get(key).copied()
    }

    fn backend(&self, index: u32) -> Option<Backend> {
        self.backends.get(&index).copied()
    }

    fn generation(&self, backend: BackendId) -> Option<Generation> {
        self.live.get(&backend).copied()
    }

    fn node(&self, addr: &Addr) -> Option<NodeAddress> {
        self.nodes.get(addr).copied()
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.affinity.borrow().get(key).copied()
    }

    fn stick(&self, key: &AffinityKey, row: &Affinity) {
        self.affinity.borrow_mut().insert(*key, *row);
    }

    fn device(&self, ifindex: u32) -> Option<Rc<Device>> {
        self.devices.get(&ifindex).cloned()
    }

    fn local_pod(&self, addr: &Addr) -> Option<LocalPod> {
        self.pods.get(addr).copied()
    }

    fn class(&self, addr: &Addr) -> Class {
        self.classes.get(addr).copied().unwrap_or(Class::WORLD)
    }

    fn verdict(&self, key: &VerdictKey) -> Option<VerdictRow> {
        self.verdicts.get(key).copied()
    }

    fn port(&self, key: &PortKey) -> Option<PortRow> {
        let covers = |row: &PortKey| {
            let bits = row.prefix_len.min(key.prefix_len) as usize;
            let (a, b) = (&row.as_bytes()[4..], &key.as_bytes()[4..]);
            (0..bits).all(|bit| (a[bit / 8] ^ b[bit / 8]) & (0x80 >> (bit % 8)) == 0)
        };
        let rows = self.ports.iter().filter(|(row, _)| covers(row));
        rows.max_by_key(|(row, _)| row.prefix_len)
            .map(|(_, value)| *value)
    }

    fn epoch(&self) -> u32 {
        self.epoch
    }

    fn flow(&self, table: FlowTable, key: &AlignedKey) -> Option<Rc<Flow>> {
        match table {
            FlowTable::Answered => self.flows.borrow().get(&key.0).cloned(),
            FlowTable::HalfOpen => self.half_open.borrow().get(&key.0).cloned(),
        }
    }

    fn open(&self, key: &AlignedKey, flow: &Flow) -> Result<Opened, DropReason> {
        if self.half_open.borrow().contains_key(&key.0) {
            return Ok(Opened::Already);
        }
        if self.room == Room::Full {
            return Err(DropReason::TableFull);
        }
        self.half_open
            .borrow_mut()
            .insert(key.0, Rc::new(copy(flow)));
        Ok(Opened::New)
    }

    fn promote(&self, key: &AlignedKey, flow: &Rc<Flow>) {
        let mut flows = self.flows.borrow_mut();
        flows.entry(key.0).or_insert_with(|| Rc::new(copy(flow)));
        self.half_open.borrow_mut().remove(&key.0);
    }

    fn forget(&self, key: &AlignedKey) {
        self.flows.borrow_mut().remove(&key.0);
        self.half_open.borrow_mut().remove(&key.0);
    }

    fn uplink(&self, ifindex: u32) -> Option<Rc<Uplink>> {
        self.uplinks.get(&ifindex).cloned()
    }

    fn is_in_cluster(&self, addr: &Addr) -> bool {
        let number = u128::from_be_bytes(addr.0);
        self.cluster.iter().any(|range| {
            let free = ClusterKey::WHOLE - range.prefix_len;
            let differ = number ^ u128::from_be_bytes(range.addr.0);
            differ.checked_shr(free).unwrap_or(0) == 0
        })
    }

    fn reserved(&self, key: &NatKey) -> Option<NatRow> {
        self.nat_ports.borrow().get(key).copied()
    }

    fn reserve(&self, key: &NatKey, row: &NatRow) -> Result<Reserved, DropReason> {
        match self.nat_ports.borrow_mut().entry(*key) {
            Entry::Occupied(_) => Ok(Reserved::Taken),
            Entry::Vacant(_) if self.room == Room::Full => Err(DropReason::TableFull),
            Entry::Vacant(place) => {
                place.insert(*row);
                Ok(Reserved::New)
            }
        }
    }

    fn masquerades(&self) -> bool {
        self.config.features & Features::MASQUERADE != 0
    }

    fn port_range(&self) -> PortRange {
        PortRange {
            first: self.config.first_port,
            last: self.config.last_port,
        }
    }

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn random(&self) -> u32 {
        self.random.get()
    }

    fn count(&self, counter: Counter) {
        *self
            .counters
            .borrow_mut()
            .entry(counter as u32)
            .or_default() += 1;
    }
}

impl Sockets for Memory {
    fn own_network(&self) -> u64 {
        self.network
    }

    fn socket(&self, key: &SocketKey) -> Option<SocketPeer> {
        self.sockets.borrow().get(key).copied()
    }

    fn remember(&self, key: &SocketKey, peer: &SocketPeer) {
        self.sockets.borrow_mut().insert(*key, *peer);
    }
}
