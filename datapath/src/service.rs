//! Services: is an address one, and which backend serves. What is done with the answer is `nat` and
//! `flow` for packets, `socket` for sockets.

use weir_common::Protocol;
use weir_common::flow::Peer;
use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation, Scope};

use crate::tables::Tables;

/// How many backends are looked at before a service counts as having none. More than one is needed only
/// in the moment between a backend's end and the new run without it.
const TRIES: u32 = 8;

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

/// What came of choosing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Chosen {
    Backend(Backend, Generation),
    /// Backends can serve, but none of those tried fits.
    NoneFits,
    /// Nothing can serve.
    Empty,
}

/// A random backend of a service that may be used and that fits.
#[inline(always)]
pub fn choose<T: Tables>(
    tables: &T,
    frontend: &Frontend,
    mut fits: impl FnMut(&Backend) -> bool,
) -> Chosen {
    let segment = frontend.segment;
    let mut outcome = Chosen::Empty;
    if segment.len == 0 {
        return outcome;
    }
    let mut index = tables.random() % segment.len;
    for _ in 0..TRIES {
        if let Some(backend) = tables.backend(segment.start.wrapping_add(index))
            && let Some(generation) = tables.generation(backend.id)
            && generation.is_usable()
        {
            if fits(&backend) {
                return Chosen::Backend(backend, generation);
            }
            outcome = Chosen::NoneFits;
        }
        index += 1;
        if index >= segment.len {
            index = 0;
        }
    }
    outcome
}

/// Is a remembered backend still the one that it was?
#[inline(always)]
pub fn is_current<T: Tables>(tables: &T, backend: BackendId, generation: Generation) -> bool {
    generation.is_usable() && tables.generation(backend) == Some(generation)
}
