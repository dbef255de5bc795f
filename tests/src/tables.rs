//! The tables of the datapath in ordinary memory, with ordinary maps, a clock that stands still until it
//! is moved, and random numbers that are told.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;

use weir_common::counter::{COUNTERS, Counter};
use weir_common::device::{Device, LocalPod};
use weir_common::fragment::{Fragment, FragmentKey};
use weir_common::nat::{PortRange, Uplink};
use weir_common::node::{Features, NodeConfig};
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::service::{
    Affinity, AffinityKey, Backend, BackendId, Frontend, FrontendKey, Generation, NodeAddress,
    PortBits, SocketKey, SocketPeer,
};
use weir_common::share::{self, Share};
use weir_common::way::{Plan, Way, WayKey};
use weir_common::{Addr, DropReason, Prefix};
use weir_datapath::Tables;
use weir_datapath::tables::{Added, Sockets};
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
    pub cidrs: HashMap<Prefix, Class>,
    pub verdicts: HashMap<VerdictKey, VerdictRow>,
    pub ports: HashMap<PortKey, PortRow>,
    pub epoch: u32,
    pub ways: RefCell<HashMap<WayKey, Rc<Way>>>,
    pub plans: RefCell<HashMap<WayKey, Rc<Plan>>>,
    pub choices: RefCell<HashMap<WayKey, Affinity>>,
    pub shares: RefCell<HashMap<u32, Rc<Share>>>,
    pub fragments: RefCell<HashMap<FragmentKey, Fragment>>,
    pub affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    pub sockets: RefCell<HashMap<SocketKey, SocketPeer>>,
    pub connected: RefCell<HashMap<u64, SocketPeer>>,
    /// As the agent makes it: what is not in here is a row without a used port.
    pub unused_ports: RefCell<HashMap<u32, Rc<PortBits>>>,
    pub hostnet_ports: RefCell<HashMap<u32, Rc<PortBits>>>,
    pub uplinks: HashMap<u32, Rc<Uplink>>,
    pub cluster: Vec<Prefix>,
    /// What the programs are told when they are loaded.
    pub config: NodeConfig,
    /// The cookie of the node's network namespace.
    pub network: u64,
    /// Rows that the tables of conversations take.
    pub room: Room,
    /// Whose place of a plan was given up last: the kernel's table gives what is free again next.
    vacated: Cell<Option<WayKey>>,
    /// How many each of them takes, where that matters.
    pub most: Option<usize>,
    pub now: Cell<u64>,
    pub random: Cell<u32>,
    /// How often a hash was looked into.
    pub looked: Cell<usize>,
    /// What another CPU does while a conversation is judged, once.
    pub meanwhile: Cell<Option<fn(&Self)>>,
    counters: RefCell<HashMap<u32, u64>>,
}

/// Whether there is room for another conversation.
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
}

/// A copy of a way as it is now.
pub fn copy(way: &Way) -> Way {
    let mut copy = Way::default();
    copy.set(way);
    copy
}

/// A copy of a plan as it is now.
pub fn copy_plan(plan: &Plan) -> Plan {
    let mut copy = Plan::default();
    copy.set(plan);
    copy
}

impl Memory {
    fn look(&self) {
        self.looked.set(self.looked.get() + 1);
    }

    fn add<V>(
        &self,
        table: &RefCell<HashMap<WayKey, Rc<V>>>,
        key: &WayKey,
        row: impl FnOnce() -> V,
    ) -> Result<Added, DropReason> {
        let mut table = table.borrow_mut();
        let is_full = self.room == Room::Full || self.most.is_some_and(|most| table.len() >= most);
        match table.entry(*key) {
            Entry::Occupied(_) => Ok(Added::Already),
            Entry::Vacant(_) if is_full => Err(DropReason::TableFull),
            Entry::Vacant(place) => {
                place.insert(Rc::new(row()));
                Ok(Added::New)
            }
        }
    }
}

fn is_in(addr: &Addr, range: &Prefix) -> bool {
    let free = Prefix::WHOLE - range.prefix_len;
    let differ = u128::from_be_bytes(addr.0) ^ u128::from_be_bytes(range.addr.0);
    differ.checked_shr(free).unwrap_or(0) == 0
}

impl Tables for Memory {
    type WayRef = Rc<Way>;
    type PlanRef = Rc<Plan>;
    type ShareRef = Rc<Share>;
    type DeviceRef = Rc<Device>;
    type UplinkRef = Rc<Uplink>;
    type PortBitsRef = Rc<PortBits>;

    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.look();
        self.frontends.get(key).copied()
    }

    fn backend(&self, index: u32) -> Option<Backend> {
        self.backends.get(&index).copied()
    }

    fn generation(&self, backend: BackendId) -> Option<Generation> {
        self.live.get(&backend).copied()
    }

    fn hostnet_ports(&self, row: u32) -> Option<Rc<PortBits>> {
        let mut rows = self.hostnet_ports.borrow_mut();
        Some(rows.entry(row).or_default().clone())
    }

    fn node(&self, addr: &Addr) -> Option<NodeAddress> {
        self.look();
        self.nodes.get(addr).copied()
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.look();
        self.affinity.borrow().get(key).copied()
    }

    fn stick(&self, key: &AffinityKey, row: &Affinity) {
        self.affinity.borrow_mut().insert(*key, *row);
    }

    fn device(&self, ifindex: u32) -> Option<Rc<Device>> {
        self.look();
        self.devices.get(&ifindex).cloned()
    }

    fn local_pod(&self, addr: &Addr) -> Option<LocalPod> {
        self.look();
        self.pods.get(addr).copied()
    }

    fn class(&self, addr: &Addr) -> Class {
        self.look();
        if let Some(meanwhile) = self.meanwhile.take() {
            meanwhile(self);
        }
        if let Some(class) = self.classes.get(addr) {
            return *class;
        }
        self.look();
        let around = self.cidrs.iter().filter(|(range, _)| is_in(addr, range));
        let longest = around.max_by_key(|(range, _)| range.prefix_len);
        longest.map_or(Class::WORLD, |(_, class)| *class)
    }

    fn verdict(&self, key: &VerdictKey) -> Option<VerdictRow> {
        self.look();
        self.verdicts.get(key).copied()
    }

    fn port(&self, key: &PortKey) -> Option<PortRow> {
        self.look();
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

    fn way(&self, key: &WayKey) -> Option<Rc<Way>> {
        self.look();
        self.ways.borrow().get(key).cloned()
    }

    fn add_way(&self, key: &WayKey, way: &Way) -> Result<Added, DropReason> {
        self.add(&self.ways, key, || copy(way))
    }

    fn remove_way(&self, key: &WayKey) -> bool {
        self.ways.borrow_mut().remove(key).is_some()
    }

    fn plan(&self, answer: &WayKey) -> Option<Rc<Plan>> {
        self.look();
        self.vacated.set(None);
        self.plans.borrow().get(answer).cloned()
    }

    fn add_plan(&self, answer: &WayKey, plan: &Plan) -> Result<Added, DropReason> {
        if self.vacated.take() == Some(*answer) {
            let plan = Rc::new(copy_plan(plan));
            let there = self.plans.borrow_mut().insert(*answer, plan);
            return Ok(there.map_or(Added::New, |_| Added::Already));
        }
        self.add(&self.plans, answer, || copy_plan(plan))
    }

    fn remove_plan(&self, answer: &WayKey) {
        let there = self.plans.borrow_mut().remove(answer);
        self.vacated.set(there.map(|_| *answer));
    }

    fn choice(&self, key: &WayKey) -> Option<Affinity> {
        self.look();
        self.choices.borrow().get(key).copied()
    }

    fn keep_choice(&self, key: &WayKey, row: &Affinity) {
        self.choices.borrow_mut().insert(*key, *row);
    }

    fn forget_choice(&self, key: &WayKey) {
        self.choices.borrow_mut().remove(key);
    }

    fn share(&self, ifindex: u32) -> Option<Rc<Share>> {
        let mut shares = self.shares.borrow_mut();
        Some(shares.entry(share::row(ifindex)).or_default().clone())
    }

    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.look();
        self.fragments.borrow().get(key).copied()
    }

    fn keep_fragment(&self, key: &FragmentKey, row: &Fragment) {
        self.fragments.borrow_mut().insert(*key, *row);
    }

    fn uplink(&self, ifindex: u32) -> Option<Rc<Uplink>> {
        self.look();
        self.uplinks.get(&ifindex).cloned()
    }

    fn is_in_cluster(&self, addr: &Addr) -> bool {
        self.look();
        self.cluster.iter().any(|range| is_in(addr, range))
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

    fn unused_ports(&self, row: u32) -> Option<Rc<PortBits>> {
        let mut rows = self.unused_ports.borrow_mut();
        let new = || Rc::new(PortBits(u64::MAX.into()));
        Some(rows.entry(row).or_insert_with(new).clone())
    }

    fn socket(&self, key: &SocketKey) -> Option<SocketPeer> {
        self.look();
        self.sockets.borrow().get(key).copied()
    }

    fn remember(&self, key: &SocketKey, peer: &SocketPeer) {
        self.sockets.borrow_mut().insert(*key, *peer);
    }

    fn keep_connected(&self, cookie: u64, backend: &SocketPeer) {
        self.connected.borrow_mut().insert(cookie, *backend);
    }

    fn forget_connected(&self, cookie: u64) {
        self.connected.borrow_mut().remove(&cookie);
    }
}
