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
        for _ in 0..Self::TRIES {
            if self.index >= self.segment.len {
                return None;
            }
            let at = self.segment.start.wrapping_add(self.index);
            let next = self.index + 1;
            self.index = merge.pass(if next < self.segment.len { next } else { 0 });
            if let Some(backend) = tables.backend(at)
                && let Some(generation) = tables.generation(backend.id)
                && generation.is_usable()
            {
                return Some((backend, generation));
            }
        }
        None
    }
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

/// Steps of a search that halves what is left: enough for a run as long as the table.
const STEPS: u32 = u32::BITS - limits::BACKENDS.leading_zeros();

/// A backend's place in a run, whose rows are in the order of address and port.
#[inline(always)]
fn position<T: Tables>(tables: &T, segment: Segment, wanted: &Affinity) -> Option<u32> {
    let (high, low) = words(&wanted.addr);
    let port = u16::from(wanted.port);
    let (mut first, mut left) = (0, segment.len);
    for _ in 0..STEPS {
        if left == 0 {
            break;
        }
        let half = left / 2;
        let row = tables.backend(segment.start.wrapping_add(first + half))?;
        if row.id == wanted.backend {
            return Some(first + half);
        }
        let found = words(&row.addr);
        let is_before = if found.0 != high {
            found.0 < high
        } else if found.1 != low {
            found.1 < low
        } else {
            u16::from(row.port) < port
        };
        if is_before {
            first += half + 1;
            left -= half + 1;
        } else {
            left = half;
        }
    }
    None
}

/// Is a remembered backend still the one that it was?
#[inline(always)]
pub fn is_current<T: Tables>(tables: &T, backend: BackendId, generation: Generation) -> bool {
    generation.is_usable() && tables.generation(backend) == Some(generation)
}
