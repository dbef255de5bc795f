//! Services: is an address one, and which backend serves. What is done with the answer is `plan`
//! for packets, `socket` for sockets.

use weir_common::event::Hook;
use weir_common::service::{
    Affinity, AffinityKey, Backend, BackendId, ClientKind, Frontend, FrontendFlags, FrontendKey,
    Generation, NodeFlags, Scope, Segment,
};
use weir_common::{Addr, Protocol, limits};

use crate::tables::Tables;
use crate::verdict::Scratch;
use crate::words::{hash, words};

const NANOSECONDS: u64 = 1_000_000_000;

/// The service at an address, as seen from `scope`: a row of its own, or else one of the ports that
/// nodes have for services. More than one look is taken only after a miss.
///
/// `addr` is the address in the key, where the caller has it.
///
/// From outside, a port of nodes is found only at an address of this node, since what is on its way to
/// another is none of ours.
#[inline(always)]
pub fn frontend<T: Tables + ?Sized>(
    tables: &T,
    asked: &FrontendKey,
    addr: &Addr,
) -> Option<Frontend> {
    let scope = asked.scope;
    if asked.protocol != Protocol::TCP && asked.protocol != Protocol::UDP {
        return None;
    }
    let found = match tables.frontend(asked) {
        Some(found) if found.flags & FrontendFlags::OWN_NODE_ONLY == 0 => return Some(found),
        Some(found) => found,
        None => {
            let mut of_nodes = *asked;
            of_nodes.set_of_nodes();
            tables.frontend(&of_nodes)?
        }
    };
    let node = tables.node(addr)?;
    let is_own = node.flags & NodeFlags::OWN != 0;
    let is_any_served = scope == Scope::INTERNAL && found.flags & FrontendFlags::OWN_NODE_ONLY == 0;
    (is_own || is_any_served).then_some(found)
}

/// [`frontend`] for the packet at hand; it is then in the scratch. 0 if the packet asks for no service.
pub fn frontend_of_packet<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> u32 {
    let key = &scratch.trace.tuple;
    let scope = if key.hook == Hook::FROM_NET {
        Scope::EXTERNAL
    } else {
        Scope::INTERNAL
    };
    let asked = FrontendKey::of(key, scope);
    let Some(found) = frontend(tables, &asked, &key.destination) else {
        return 0;
    };
    scratch.frontend = found;
    1
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

/// The usable backends of a service, from one of them on.
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
    pub const fn from(frontend: &Frontend, index: u32) -> Self {
        Self {
            segment: frontend.segment,
            index,
        }
    }

    /// The next backend that may be used. After the last one comes the first.
    #[inline(always)]
    pub fn next<T: Tables + ?Sized>(&mut self, tables: &T) -> Option<(Backend, Generation)> {
        let Segment { start, len } = self.segment;
        let found = tables.usable(start, len, self.index);
        if found >= len {
            return None;
        }
        let next = found + 1;
        self.index = if next < len { next } else { 0 };
        let backend = tables.backend(start.wrapping_add(found))?;
        let generation = tables.generation(backend.id)?;
        generation.is_usable().then_some((backend, generation))
    }
}

/// Where in its run a client begins to look: at the backend that it had last, if the service has session affinity and
/// that still counts, otherwise at one that the caller has drawn.
#[inline(always)]
pub fn first<T: Tables + ?Sized>(
    tables: &T,
    frontend: &Frontend,
    client: &AffinityKey,
    drawn: u32,
) -> u32 {
    match frontend.segment.len {
        0 => 0,
        len => {
            let last = if frontend.affinity == 0 {
                None
            } else {
                tables.affinity(client)
            };
            match last.and_then(|last| place_of(tables, frontend, &last)) {
                Some(index) => index,
                None => drawn % len,
            }
        }
    }
}

/// [`first`] for the packet at hand and the service that it asks for. The same ends draw the same number, so that what a
/// lost row held is found again.
pub fn first_for_packet<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> u32 {
    let key = &scratch.trace.tuple;
    let frontend = &scratch.frontend;
    scratch.client = client_at(frontend, key.source, key.protocol);
    let drawn = hash(key);
    let len = frontend.segment.len;
    if len == 0 {
        return 0;
    }
    if frontend.affinity != 0
        && let Some(last) = tables.affinity(&scratch.client)
    {
        scratch.last = last;
        if let Some(index) = place_of(tables, &scratch.frontend, &scratch.last) {
            return index;
        }
    }
    drawn % len
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

/// Notes which backend a client got, but for the time in `row`. As with kube-proxy, every new connection begins the time anew, and
/// packets of one that is open do not.
#[inline(always)]
pub fn stick<T: Tables + ?Sized>(
    tables: &T,
    frontend: &Frontend,
    client: &AffinityKey,
    row: &mut Affinity,
) {
    if frontend.affinity != 0 {
        row.used = tables.now();
        tables.stick(client, row);
    }
}

/// Where in the run of the frontend the backend stands that the client had last. It counts while it is
/// the same backend, the time is not over, and it is still one of this frontend's: another way to the
/// same service can have one that this way has not.
#[inline(always)]
fn place_of<T: Tables + ?Sized>(tables: &T, frontend: &Frontend, last: &Affinity) -> Option<u32> {
    let age = tables.now().saturating_sub(last.used);
    if age > u64::from(frontend.affinity) * NANOSECONDS
        || !is_current(tables, last.backend, last.generation, Asks::Anew)
    {
        return None;
    }
    position(tables, frontend.segment, last)
}

/// A backend's place in a run, whose rows are in the order of address and port.
#[inline(always)]
fn position<T: Tables + ?Sized>(tables: &T, run: Segment, wanted: &Affinity) -> Option<u32> {
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
        let [a, b, _] = *row.words();
        let found = (u64::from_be(a), u64::from_be(b));
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

/// What is asked of a remembered backend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Asks {
    /// To take a new connection, or a datagram.
    Anew,
    /// To go on with an established connection, which it may do while it drains, too.
    ToGoOn,
}

impl Asks {
    /// What a packet asks: only TCP has connections that are known to be established, and a SYN begins one.
    #[inline(always)]
    pub fn of(protocol: Protocol, is_syn: bool) -> Self {
        if protocol == Protocol::TCP && !is_syn {
            Self::ToGoOn
        } else {
            Self::Anew
        }
    }
}

/// Is a remembered backend still the one that it was, and may it do what is asked?
#[inline(always)]
pub fn is_current<T: Tables + ?Sized>(
    tables: &T,
    backend: BackendId,
    generation: Generation,
    asks: Asks,
) -> bool {
    let Some(now) = tables.generation(backend) else {
        return false;
    };
    now.is_same_backend(generation)
        && (now.is_usable() || (asks == Asks::ToGoOn && now.is_draining()))
}
