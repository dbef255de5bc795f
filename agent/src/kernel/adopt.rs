//! Conversations that programs of an earlier version know, as ways: an agent up to 8ae8392 kept one row for both
//! directions of a conversation, and one for each port of the node that stood for somebody. When our programs are put in
//! the place of its own, what goes on goes on.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64};

use weir_common::event::Hook;
use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation, Scope};
use weir_common::way::{Mark, Peer, Plan, Rewrite, Step, Way, WayKey, WayState};
use weir_common::{Addr, Port, Prefix, Protocol};
use zerocopy::{FromBytes, IntoBytes};

use super::flows::Flows;
use super::map::for_each;
use super::sys;

/// Where an earlier agent pinned its tables, in the folder of ours.
const TABLES: [&str; 2] = ["FLOWS_v2", "HALF_OPEN_v2"];
const PORTS: &str = "NAT_PORTS_v1";

/// Key of its flows: the ends in ascending order.
#[derive(Clone, Copy, Debug, Default, FromBytes)]
#[repr(C)]
struct FlowKey {
    low: Peer,
    high: Peer,
    protocol: Protocol,
    _pad: [u8; 3],
}

/// Its row for both directions of a conversation.
#[derive(Clone, Copy, Debug, Default, FromBytes)]
#[repr(C)]
struct Flow {
    created: u64,
    seen: u64,
    /// From the opener, then towards it.
    packets: [u64; 2],
    bytes: [u64; 2],
    bits: u32,
    _epoch: u32,
    egress_rule: u32,
    ingress_rule: u32,
    opener_device: u32,
    responder_device: u32,
    /// The service that the opener spoke to.
    service: Peer,
    _pad: u16,
    _backend: u32,
    _generation: u32,
    _pad2: u32,
    /// Has a port of the node, if bit 62 is set; nothing has left the node yet, if none is.
    masquerade: u64,
}

/// Bits of its flows.
const OPENER_IS_HIGH: u32 = 1;
const ANSWERED: u32 = 1 << 1;
const OPENER_FIN: u32 = 1 << 2;
const RESPONDER_FIN: u32 = 1 << 3;
const RESET: u32 = 1 << 4;
const FIN_HEARD: u32 = 1 << 5;
/// Only leads to another one.
const LEAD: u32 = 1 << 8;
const FROM_SERVICE: u32 = 1 << 9;
const HAS_PORT: u64 = 1 << 62;

/// Key of its ports: an answer as it arrives.
#[derive(Clone, Copy, Debug, Default, FromBytes)]
#[repr(C)]
struct PortKey {
    node: Peer,
    peer: Peer,
    protocol: Protocol,
    _pad: [u8; 3],
}

/// Whom the answer is for.
#[derive(Clone, Copy, Debug, Default, FromBytes)]
#[repr(C)]
struct PortRow {
    end: Peer,
    _pad: u16,
    /// 1: the end is a client outside of this node.
    flags: u32,
    _created: u64,
}

const _: () = assert!(size_of::<FlowKey>() == 40 && size_of::<Flow>() == 112);
const _: () = assert!(size_of::<PortKey>() == 40 && size_of::<PortRow>() == 32);

/// The number and the generation that a backend has today.
type BackendNow = (BackendId, Generation);

/// Frontends with their backends, as the tables hold them today. Several Services may have one endpoint, each under a
/// number of its own.
#[derive(Debug, Default)]
pub(super) struct Backends {
    /// The first row of each one's run.
    runs: HashMap<FrontendKey, u32>,
    by_run: HashMap<(u32, Addr, Port), BackendNow>,
}

/// What there is today.
#[derive(Debug, Default)]
pub(super) struct Today {
    pub backends: Backends,
    /// The addresses of nodes.
    pub nodes: HashSet<Addr>,
    /// This node's own: what pods and they say to each other has no ways any more.
    pub own: HashSet<Addr>,
    /// What is in the cluster; none if nothing leaves with the node's address.
    pub cluster: Option<Vec<Prefix>>,
    /// What was not used since this monotonic time, in nanoseconds, is known already.
    pub since: u64,
}

impl Backends {
    pub(super) fn new(
        frontends: impl IntoIterator<Item = (FrontendKey, Frontend)>,
        rows: impl IntoIterator<Item = (u32, Backend)>,
        live: impl Fn(BackendId) -> Generation,
    ) -> Self {
        let rows: HashMap<u32, Backend> = rows.into_iter().collect();
        let mut backends = Self::default();
        for (key, Frontend { segment, .. }) in frontends {
            for index in 0..segment.len {
                let Some(row) = rows.get(&(segment.start + index)) else {
                    continue;
                };
                let generation = live(row.id);
                if !generation.is_gone() {
                    let of_run = (segment.start, row.addr, row.port);
                    backends.by_run.insert(of_run, (row.id, generation));
                    backends.runs.insert(key, segment.start);
                }
            }
        }
        backends
    }
}

impl Today {
    /// The backend at an address, as that of the service that was asked.
    fn backend(
        &self,
        asked: Peer,
        protocol: Protocol,
        scope: Scope,
        at: Peer,
    ) -> Option<BackendNow> {
        let key = FrontendKey {
            addr: asked.addr,
            port: asked.port,
            protocol,
            scope,
            ..FrontendKey::default()
        };
        let of_nodes = || {
            let is_node = self.nodes.contains(&asked.addr);
            is_node.then(|| self.backends.runs.get(&key.of_nodes()))?
        };
        let run = self.backends.runs.get(&key).or_else(of_nodes)?;
        let of_run = (*run, at.addr, at.port);
        self.backends.by_run.get(&of_run).copied()
    }

    /// Does what a pod sends there leave with the node's address?
    fn leaves(&self, addr: &Addr) -> bool {
        let is_in = |range: &Prefix| {
            let differing = u128::from_be_bytes(addr.0) ^ u128::from_be_bytes(range.addr.0);
            differing.leading_zeros() >= range.prefix_len
        };
        let cluster = self.cluster.as_ref();
        cluster.is_some_and(|ranges| !ranges.iter().any(is_in))
    }
}

/// A conversation at one side of the node.
#[derive(Debug)]
struct Found {
    plan: Plan,
    answer: WayKey,
    is_answered: bool,
}

/// Is there something to adopt in this pin folder?
pub(super) fn is_needed(bpffs: &Path) -> bool {
    bpffs.join(TABLES[0]).exists()
}

/// Is this the pin of a table that there is something to adopt of?
pub(super) fn is_of(pin: &Path) -> bool {
    let names = TABLES.into_iter().chain([PORTS]);
    pin.file_name()
        .is_some_and(|name| names.into_iter().any(|it| name == it))
}

/// Adds what the tables in a pin folder hold; what is known already stays as it is. Returns how many conversations there
/// were.
///
/// # Errors
/// The kernel refuses to read or to write.
pub(super) fn adopt(bpffs: &Path, flows: &Flows, today: &Today) -> io::Result<usize> {
    let mut found = Vec::new();
    let mut ends = HashMap::new();
    for table in TABLES {
        read(&bpffs.join(table), |key: FlowKey, row: Flow| {
            if row.seen >= today.since {
                of_flow(&key, &row, today, &mut found);
                if row.masquerade & HAS_PORT != 0 {
                    ends.insert((key.low, key.high, key.protocol), row);
                }
            }
        })?;
    }
    read(&bpffs.join(PORTS), |key: PortKey, row: PortRow| {
        let (low, high) = (row.end.min(key.peer), row.end.max(key.peer));
        // A port whose flow is gone is nobody's.
        if let Some(flow) = ends.get(&(low, high, key.protocol)) {
            found.push(of_port(&key, &row, flow));
        }
    })?;
    let count = found.len();
    for mut it in found {
        if it.plan.key.hook == Hook::TO_POD && is_translated_back(flows, &it.answer)? {
            it.plan.back.step.mark = Mark::REPLY;
        }
        add(flows, it)?;
    }
    Ok(count)
}

/// Do the answers of a conversation with a pod leave in another's name, though its row knows of no service? Our program of the
/// uplink has led it there, while theirs was the pod's.
fn is_translated_back(flows: &Flows, answer: &WayKey) -> io::Result<bool> {
    let key = WayKey {
        hook: Hook::TO_NET,
        ..*answer
    };
    let asked = flows.asked_by(&key)?;
    Ok(asked.is_some_and(|asked| asked.hook == Hook::FROM_NET))
}

fn read<K: FromBytes, V: FromBytes>(path: &Path, mut row: impl FnMut(K, V)) -> io::Result<()> {
    let table = match sys::open_pinned(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        table => table?,
    };
    let layout = sys::map_layout(table.as_fd())?;
    let sizes = (size_of::<K>(), size_of::<V>());
    if (layout.key_size as usize, layout.value_size as usize) != sizes {
        return Err(io::Error::other(format!(
            "{} is of another layout than its version says",
            path.display()
        )));
    }
    for_each(table.as_fd(), sizes.0, sizes.1, |key, value| {
        if let (Ok(key), Ok(value)) = (K::read_from_bytes(key), V::read_from_bytes(value)) {
            row(key, value);
        }
    })
}

fn add(flows: &Flows, found: Found) -> io::Result<()> {
    let Found {
        mut plan,
        mut answer,
        is_answered,
    } = found;
    let is_tcp = answer.protocol == Protocol::TCP;
    let pair = if is_answered {
        flows.ways()
    } else {
        flows.plans()
    };
    let table = if is_tcp { &pair.tcp } else { &pair.other };
    if !is_answered {
        return insert(table, answer.as_mut_bytes(), plan.as_mut_bytes()).map(drop);
    }
    // Where the answers are another's by now, so is the conversation. An agent that was killed may have left half of it.
    let is_ours = insert(table, answer.as_mut_bytes(), plan.back.as_mut_bytes())?
        || flows.other_of(&answer)? == Some(plan.key);
    if is_ours {
        insert(table, plan.key.as_mut_bytes(), plan.way.as_mut_bytes())?;
    }
    Ok(())
}

/// Was there room, and no such row yet? A table without room is one where those that come later find none either.
fn insert(table: &OwnedFd, key: &[u8], row: &[u8]) -> io::Result<bool> {
    match sys::insert(table.as_fd(), key, row) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EEXIST | libc::E2BIG | libc::ENOMEM)
            ) =>
        {
            Ok(false)
        }
        result => result.map(|()| true),
    }
}

/// The ways of a flow: at the pods' side, and where it came in through a service at an uplink.
fn of_flow(key: &FlowKey, flow: &Flow, today: &Today, found: &mut Vec<Found>) {
    if flow.bits & LEAD != 0 {
        return;
    }
    let (opener, responder) = if flow.bits & OPENER_IS_HIGH != 0 {
        (key.high, key.low)
    } else {
        (key.low, key.high)
    };
    let is_of_service = flow.bits & FROM_SERVICE != 0;
    let is_sent_here = flow.opener_device != 0;
    let scope = if is_sent_here {
        Scope::INTERNAL
    } else {
        Scope::EXTERNAL
    };
    let backend = today.backend(flow.service, key.protocol, scope, responder);
    let is_with_node = today.own.contains(&opener.addr) || today.own.contains(&responder.addr);
    if !is_of_service && is_with_node {
        return;
    }
    // A datagram would go there for ever; a connection ends by itself.
    if is_of_service && backend.is_none() && key.protocol != Protocol::TCP {
        return;
    }
    let to_backend = Step {
        addr: responder.addr,
        port: responder.port,
        rewrite: Rewrite::DESTINATION,
        ..Step::marked(Mark::PASSED)
    };
    let from_service = Step {
        addr: flow.service.addr,
        port: flow.service.port,
        rewrite: Rewrite::SOURCE,
        ..Step::marked(Mark::PASSED)
    };
    let plain = Step::marked(Mark::PASSED);
    let mut push = |hook, asked, there: Step, back: Step, devices: [u32; 2]| {
        let mut it = Found {
            plan: plan(flow, there, back, devices),
            answer: WayKey::default(),
            is_answered: flow.bits & ANSWERED != 0,
        };
        it.plan.key = packet(opener, asked, key.protocol, hook);
        if there.rewrite == Rewrite::DESTINATION {
            (it.plan.way.backend, it.plan.way.generation) = backend.unwrap_or_default();
        }
        seal(&mut it);
        found.push(it);
    };
    if is_sent_here {
        let is_local = flow.responder_device != 0;
        let other = if is_local {
            Hook::FROM_POD
        } else {
            Hook::TO_POD
        };
        // One that began after our program was put where packets leave has no port by theirs.
        let is_undecided = flow.masquerade == 0 && !is_local;
        let mark =
            if flow.masquerade & HAS_PORT != 0 || (is_undecided && today.leaves(&responder.addr)) {
                Mark::LEAVING
            } else {
                Mark::PASSED
            };
        let (asked, there, back) = if is_of_service {
            (flow.service, to_backend, from_service)
        } else {
            (responder, plain, plain)
        };
        let back = Step {
            other: Hook::FROM_POD,
            ..back
        };
        let there = Step {
            other,
            mark,
            ..there
        };
        let back_device = if is_local { flow.opener_device } else { 0 };
        push(
            Hook::FROM_POD,
            asked,
            there,
            back,
            [flow.responder_device, back_device],
        );
        return;
    }
    if flow.responder_device != 0 {
        let there = Step {
            other: Hook::FROM_POD,
            ..plain
        };
        let mark = if is_of_service {
            Mark::REPLY
        } else {
            Mark::PASSED
        };
        let back = Step {
            other: Hook::TO_POD,
            mark,
            ..plain
        };
        push(Hook::TO_POD, responder, there, back, [0, 0]);
    }
    if is_of_service {
        let there = Step {
            other: Hook::TO_NET,
            mark: Mark::TRANSLATED,
            ..to_backend
        };
        let back = Step {
            other: Hook::FROM_NET,
            mark: Mark::NONE,
            ..from_service
        };
        push(Hook::FROM_NET, flow.service, there, back, [0, 0]);
    }
}

/// The ways of a port of the node that stands for somebody.
fn of_port(key: &PortKey, row: &PortRow, flow: &Flow) -> Found {
    let is_of_client = row.flags & 1 != 0;
    let there = Step {
        addr: key.node.addr,
        port: key.node.port,
        rewrite: Rewrite::SOURCE,
        mark: if is_of_client {
            Mark::TRANSLATED
        } else {
            Mark::LEAVING
        },
        other: Hook::FROM_NET,
        ..Step::default()
    };
    let back = Step {
        addr: row.end.addr,
        port: row.end.port,
        rewrite: Rewrite::DESTINATION,
        mark: if is_of_client {
            Mark::REPLY
        } else {
            Mark::NONE
        },
        other: Hook::TO_NET,
        ..Step::default()
    };
    let mut it = Found {
        plan: plan(flow, there, back, [0, 0]),
        answer: WayKey::default(),
        is_answered: flow.bits & ANSWERED != 0,
    };
    for way in [&mut it.plan.way, &mut it.plan.back] {
        *way.state.get_mut() |= WayState::MASQUERADE;
    }
    it.plan.key = packet(row.end, key.peer, key.protocol, Hook::TO_NET);
    seal(&mut it);
    it
}

fn plan(flow: &Flow, there: Step, back: Step, devices: [u32; 2]) -> Plan {
    let bit = |bits: u32, bit: u32| if flow.bits & bits != 0 { bit } else { 0 };
    let both = bit(RESET, WayState::RESET);
    let heard = bit(FIN_HEARD, WayState::FIN_HEARD);
    let fins = [OPENER_FIN, RESPONDER_FIN];
    let way = |i: usize, step, opener| {
        let (own, others) = (fins[i], fins[1 - i]);
        let fin = bit(own, WayState::FIN) | bit(others, WayState::OTHER_FIN);
        let heard = if flow.bits & others != 0 { heard } else { 0 };
        Way {
            created: flow.created,
            seen: AtomicU64::new(flow.seen),
            packets: AtomicU64::new(flow.packets[i]),
            bytes: AtomicU64::new(flow.bytes[i]),
            // Of no epoch: it is judged at its next packet.
            epoch: AtomicU32::new(0),
            state: AtomicU32::new(opener | both | fin | heard),
            device: AtomicU32::new(devices[i]),
            owner: flow.opener_device,
            egress_rule: AtomicU32::new(flow.egress_rule),
            ingress_rule: AtomicU32::new(flow.ingress_rule),
            step,
            ..Way::default()
        }
    };
    Plan {
        key: WayKey::default(),
        way: way(0, there, WayState::OPENER),
        back: way(1, back, 0),
    }
}

fn packet(source: Peer, destination: Peer, protocol: Protocol, hook: Hook) -> WayKey {
    WayKey {
        source: source.addr,
        destination: destination.addr,
        source_port: source.port,
        destination_port: destination.port,
        protocol,
        hook,
        pad: [0; 2],
    }
}

fn seal(it: &mut Found) {
    let Plan { key, way, back } = &mut it.plan;
    it.answer.set_other(key, &way.step);
    way.echo = key.echo().into();
    back.echo = it.answer.echo().into();
}

#[cfg(test)]
mod tests;
