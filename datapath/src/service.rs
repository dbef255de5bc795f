//! Services: is an address one, and which backend serves. What is done with the answer is `nat` and
//! `flow` for packets, `socket` for sockets.

use weir_common::flow::Peer;
use weir_common::service::{
    Affinity, AffinityKey, Backend, BackendId, ClientKind, Frontend, FrontendFlags, FrontendKey,
    Generation, NodeFlags, Scope, Segment,
};
use weir_common::{Addr, Protocol, limits};

use crate::merge::Merge;
use crate::tables::Tables;
use crate::tuple::{Aligned, words};

const NANOSECONDS: u64 = 1_000_000_000;

/// The service at an address, as seen from `scope`: a row of its own, or else one of the ports that
/// nodes have for services. More than one look is taken only after a miss.
///
/// From outside, a port of nodes is found only at an address of this node, since what is on its way to
/// another is none of ours.
#[inline(always)]
pub fn frontend<T: Tables>(
    tables: &T,
    peer: &Peer,
    protocol: Protocol,
    scope: Scope,
) -> Option<Frontend> {
    if protocol != Protocol::TCP && protocol != Protocol::UDP {
        return None;
    }
    let mut key = Aligned(FrontendKey {
        addr: peer.addr,
        port: peer.port,
        protocol,
        scope,
    });
    let found = match tables.frontend(&key.0) {
        Some(found) if found.flags & FrontendFlags::OWN_NODE_ONLY == 0 => return Some(found),
        Some(found) => found,
        None => {
            key.0.set_of_nodes();
            tables.frontend(&key.0)?
        }
    };
    let node = tables.node(&peer.addr)?;
    let is_own = node.flags & NodeFlags::OWN != 0;
    let is_any_served = scope == Scope::INTERNAL && found.flags & FrontendFlags::OWN_NODE_ONLY == 0;
    (is_own || is_any_served).then_some(found)
}

/// Who a packet's sender is to session affinity.
#[inline(always)]
pub const fn client_at(frontend: &Frontend, source: Addr, protocol: Protocol) -> AffinityKey {
    client(frontend, source, protocol, ClientKind::ADDRESS)
}

/// Who a process is to session affinity, before its address is chosen: its network namespace, by the
/// kernel's cookie, with the family of the address that it asks for.
#[inline(always)]
pub const fn client_in(
    frontend: &Frontend,
    network: u64,
    asked: &Addr,
    protocol: Protocol,
) -> AffinityKey {
    let [a, b, c, d, e, f, g, h] = network.to_ne_bytes();
    let cookie = Addr([0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h]);
    let kind = if asked.is_v4() {
        ClientKind::NETWORK_V4
    } else {
        ClientKind::NETWORK_V6
    };
    client(frontend, cookie, protocol, kind)
}

#[inline(always)]
const fn client(
    frontend: &Frontend,
    client: Addr,
    protocol: Protocol,
    kind: ClientKind,
) -> AffinityKey {
    AffinityKey {
        client,
        service: frontend.service,
        port: frontend.port,
        protocol,
        kind,
    }
}

/// The usable backends of a service: from the one that the client had last, if the service has session
/// affinity and it still counts, otherwise from a random one on.
#[derive(Clone, Copy, Debug)]
pub struct Candidates {
    segment: Segment,
    index: u32,
}

impl Candidates {
    /// How many backends are looked at before a service counts as having none. More than one is needed
    /// only in the moment between a backend's end and the new run without it.
    const TRIES: u32 = 8;

    #[inline(always)]
    pub fn new<T: Tables>(tables: &T, frontend: &Frontend, client: &AffinityKey) -> Self {
        let segment = frontend.segment;
        let index = match segment.len {
            0 => 0,
            len => match last_of(tables, frontend, client) {
                Some(index) => index,
                None => tables.random() % len,
            },
        };
        Self { segment, index }
    }

    /// The same, for a program that is checked in every combination of its branches.
    #[inline(always)]
    pub fn merged(self, merge: &Merge) -> Self {
        Self {
            index: merge.pass(self.index),
            ..self
        }
    }

    /// The next backend that may be used. After the last one comes the first.
    #[inline(always)]
    pub fn next<T: Tables>(&mut self, tables: &T, merge: &Merge) -> Option<(Backend, Generation)> {
        let Segment { start, len } = self.segment;
        let found = tables.usable(start, len, self.index);
        if found >= len {
            return None;
        }
        let next = found + 1;
        self.index = merge.pass(if next < len { next } else { 0 });
        let backend = tables.backend(start.wrapping_add(found))?;
        let generation = tables.generation(backend.id)?;
        Some((backend, generation))
    }
}

/// Which of the `len` backends from `start` on is the first that may be used, from `index` on and around; `len` if
/// there is none nearby.
#[inline(always)]
pub fn usable<T: Tables + ?Sized>(tables: &T, start: u32, len: u32, mut index: u32) -> u32 {
    for _ in 0..Candidates::TRIES {
        if index >= len {
            return len;
        }
        if let Some(backend) = tables.backend(start.wrapping_add(index))
            && let Some(generation) = tables.generation(backend.id)
            && generation.is_usable()
        {
            return index;
        }
        let next = index + 1;
        index = if next < len { next } else { 0 };
    }
    len
}

/// Notes which backend a client got. As with kube-proxy, every new connection begins the time anew, and
/// packets of one that is open do not.
#[inline(always)]
pub fn stick<T: Tables>(
    tables: &T,
    frontend: &Frontend,
    client: &AffinityKey,
    peer: &Peer,
    backend: BackendId,
    generation: Generation,
) {
    if frontend.affinity == 0 {
        return;
    }
    let row = Affinity {
        used: tables.now(),
        backend,
        generation,
        addr: peer.addr,
        port: peer.port,
        pad: 0,
        pad2: 0,
    };
    tables.stick(client, &row);
}

/// Where in the run of the frontend the backend stands that the client had last. It counts while it is
/// the same backend, the time is not over, and it is still one of this frontend's: another way to the
/// same service can have one that this way has not.
#[inline(always)]
fn last_of<T: Tables>(tables: &T, frontend: &Frontend, client: &AffinityKey) -> Option<u32> {
    if frontend.affinity == 0 {
        return None;
    }
    let last = tables.affinity(client)?;
    let age = tables.now().saturating_sub(last.used);
    if age > u64::from(frontend.affinity) * NANOSECONDS
        || !is_current(tables, last.backend, last.generation)
    {
        return None;
    }
    position(tables, frontend.segment, &last)
}

/// A backend's place in a run, whose rows are in the order of address and port.
#[inline(always)]
fn position<T: Tables>(tables: &T, run: Segment, wanted: &Affinity) -> Option<u32> {
    let (high, low) = words(&wanted.addr);
    let port = u32::from(u16::from(wanted.port));
    let first = tables.search(run.start, run.len, high, low, port);
    let row = tables.backend(run.start.wrapping_add(first))?;
    (first < run.len && row.id == wanted.backend).then_some(first)
}

/// Steps of a search that halves what is left: enough for a run as long as the table.
const STEPS: u32 = u32::BITS - limits::BACKENDS.leading_zeros();

/// How many of the `len` backends from `start` on stand before an address, the most significant word first, and a
/// port in host order. Without branches but the ends of the search: the verifier would follow both ways of every one
/// of them.
#[inline(always)]
pub fn search<T: Tables + ?Sized>(
    tables: &T,
    start: u32,
    len: u32,
    high: u64,
    low: u64,
    port: u32,
) -> u32 {
    let (mut first, mut left) = (0_u32, len);
    for _ in 0..STEPS {
        if left == 0 {
            break;
        }
        let half = left / 2;
        let Some(row) = tables.backend(start.wrapping_add(first + half)) else {
            return len;
        };
        let found = words(&row.addr);
        // The row minus what is wanted, as one long number: negative if the row stands before.
        let lowest = borrow(u64::from(u16::from(row.port)), u64::from(port), 0);
        let is_before = borrow(found.1, low, lowest);
        let is_before = borrow(found.0, high, is_before) as u32;
        let is_even = (left & 1) ^ 1;
        first += is_before * (half + 1);
        left = half - (is_before & is_even);
    }
    first
}

/// 1 if `a - b - borrow` is negative, else 0 (Hacker's Delight, section 2-13).
#[inline(always)]
const fn borrow(a: u64, b: u64, borrow: u64) -> u64 {
    let difference = a.wrapping_sub(b).wrapping_sub(borrow);
    ((!a & b) | ((!a | b) & difference)) >> 63
}

/// Is a remembered backend still the one that it was?
#[inline(always)]
pub fn is_current<T: Tables>(tables: &T, backend: BackendId, generation: Generation) -> bool {
    generation.is_usable() && tables.generation(backend) == Some(generation)
}
