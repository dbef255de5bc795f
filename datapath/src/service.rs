//! Services: is an address one, and which backend serves. What is done with the answer is `nat` and
//! `flow` for packets, `socket` for sockets.

use weir_common::Protocol;
use weir_common::flow::Peer;
use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation, Scope, Segment};

use crate::merge::Merge;
use crate::tables::Tables;

/// The service at an address, as seen from inside of the cluster.
#[inline(always)]
pub fn frontend<T: Tables>(tables: &T, peer: &Peer, protocol: Protocol) -> Option<Frontend> {
    if protocol != Protocol::TCP && protocol != Protocol::UDP {
        return None;
    }
    tables.frontend(&FrontendKey {
        addr: peer.addr,
        port: peer.port,
        protocol,
        scope: Scope::INTERNAL,
    })
}

/// The usable backends of a service, from a random one on.
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
    pub fn new<T: Tables>(tables: &T, frontend: &Frontend) -> Self {
        let segment = frontend.segment;
        let index = match segment.len {
            0 => 0,
            len => tables.random() % len,
        };
        Self { segment, index }
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

/// Is a remembered backend still the one that it was?
#[inline(always)]
pub fn is_current<T: Tables>(tables: &T, backend: BackendId, generation: Generation) -> bool {
    generation.is_usable() && tables.generation(backend) == Some(generation)
}
