//! Which backend a packet goes to that asks for a service, on either side of the node.

use weir_common::DropReason;
use weir_common::flow::Peer;
use weir_common::service::Frontend;

use crate::flow::{self, Fit};
use crate::l4::Segment;
use crate::service::{self, Candidates};
use crate::tables::Tables;
use crate::tuple::same;
use crate::verdict::Scratch;

/// How many backends are tried when the client's port is already in use towards one of them.
const TRIES: u32 = 3;

/// Chooses a backend for the packet at hand, which asks for the service in `asked`, and leaves it in `nat`.
///
/// # Errors
/// [`DropReason::NoBackend`], [`DropReason::NatCollision`].
#[inline(always)]
pub(crate) fn choose<T: Tables>(
    tables: &T,
    scratch: &mut Scratch,
    segment: Segment,
    frontend: &Frontend,
) -> Result<(), DropReason> {
    let protocol = scratch.trace.tuple.protocol;
    scratch.client = service::client_at(frontend, scratch.trace.tuple.source, protocol);
    let mut candidates = Candidates::new(tables, frontend, &scratch.client).merged(&scratch.merge);
    let mut fits = false;
    for _ in 0..TRIES {
        let Some((backend, generation)) = candidates.next(tables, &scratch.merge) else {
            return Err(DropReason::NoBackend);
        };
        scratch.nat.peer = Peer {
            addr: backend.addr,
            port: backend.port,
        };
        scratch.nat.backend = backend.id;
        scratch.nat.generation = generation;
        let is_free = u32::from(is_free(tables, scratch, segment));
        fits = scratch.merge.pass(is_free) != 0;
        if fits {
            break;
        }
    }
    if !fits {
        return Err(DropReason::NatCollision);
    }
    let (client, nat) = (&scratch.client, &scratch.nat);
    service::stick(
        tables,
        frontend,
        client,
        &nat.peer,
        nat.backend,
        nat.generation,
    );
    Ok(())
}

/// Can the packet go to the backend of `nat` without being taken for another conversation's?
#[inline(always)]
fn is_free<T: Tables>(tables: &T, scratch: &mut Scratch, segment: Segment) -> bool {
    // A pod that is its own backend would receive a packet from itself, which its kernel refuses.
    if same(&scratch.nat.peer.addr, &scratch.trace.tuple.source) {
        return false;
    }
    scratch.question = scratch.trace.tuple;
    scratch.question.set_destination(&scratch.nat.peer);
    scratch.question.write_key(&mut scratch.probe);
    let Some(other) = flow::find(tables, &scratch.question, &scratch.probe) else {
        return true;
    };
    let (protocol, asked) = (scratch.trace.tuple.protocol, Some(&scratch.asked));
    other.fit(tables, protocol, segment, asked) != Fit::Collision
}

/// Is the connection to the remembered backend closed, so that a SYN is a new one?
#[inline(always)]
pub(crate) fn is_over<T: Tables>(tables: &T, scratch: &mut Scratch) -> bool {
    scratch.question = scratch.trace.tuple;
    scratch.question.set_destination(&scratch.nat.peer);
    scratch.question.write_key(&mut scratch.probe);
    let found = flow::find(tables, &scratch.question, &scratch.probe);
    found.is_some_and(|flow| flow.is_closed())
}
