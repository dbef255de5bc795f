//! Packets that are not whole, and those with headers in front of the transport's. The first fragment names the ports
//! of all; the others are then treated as packets of the same conversation, without a transport header. What comes
//! before its first one is dropped, or at an uplink left to the kernel.

use weir_common::DropReason;
use weir_common::fragment::{Fragment, FragmentKey};

use crate::arrive::Arrival;
use crate::l3::{Body, Extent, Family, OFFSET};
use crate::l4::{self, Segment};
use crate::packet::Packet;
use crate::tables::Tables;
use crate::verdict::{Outcome, Scratch};

/// How long the fragments of a packet may follow the first one, in nanoseconds: what Linux grants them
/// (`net.ipv4.ipfrag_time`).
pub const LIFE: u64 = 30_000_000_000;

/// Reads what follows the IP header of a packet that hides its transport header. Its addresses are in the trace, its family is in
/// the arrival.
///
/// Drops for [`DropReason::Fragment`] and the reasons of parsing.
pub fn unfold<P: Packet, T: Tables>(packet: &P, tables: &T, scratch: &mut Scratch) -> Outcome {
    Outcome::of(read(packet, tables, scratch).map(|()| true))
}

#[inline(always)]
fn read<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    scratch.arrival.family().unfold(packet, tables, scratch)?;
    tables.settle(scratch);
    let Scratch {
        trace,
        arrival,
        part,
        fragment,
        first,
        ..
    } = scratch;
    let (key, family) = (&mut trace.tuple, arrival.family());
    let body = Body {
        protocol: part.next,
        offset: part.offset(),
        end: part.end,
    };
    key.protocol = body.protocol;
    (arrival.transport, arrival.length) = (body.offset as u32, body.end - OFFSET as u32);
    let extent = part.extent;
    // A packet from elsewhere that the node has put together, to look into it, and taken apart again, looks as if the node had
    // made it; with IPv6, of which the kernel does not keep who received it.
    if family == Family::V6 && arrival.is_nodes() && !packet.is_of_socket() {
        arrival.received_by = Arrival::BY_SOME;
    }
    if extent != Extent::Later {
        arrival.set(&l4::parse(packet, family, &body, extent, key)?);
        if extent != Extent::First {
            return Ok(());
        }
    }
    *fragment = FragmentKey {
        source: key.source,
        destination: key.destination,
        identification: part.identification,
        ifindex: arrival.ifindex,
        protocol: part.protocol,
        hook: key.hook,
        pad: [0; 6],
    };
    let now = tables.now();
    // Not an option: the compiler would compare what is in it before it asks whether there is something.
    let (is_known, known) = match tables.fragment(fragment) {
        Some(known) if now.saturating_sub(known.seen) <= LIFE => (true, known),
        _ => (false, Fragment::default()),
    };
    if extent == Extent::First {
        *first = Fragment {
            seen: now,
            source_port: key.source_port,
            destination_port: key.destination_port,
            protocol: key.protocol,
            is_answer: arrival.segment.is_answer().into(),
            length: part.length as u16,
        };
        arrival.segment = arrival.segment.of_first();
        // Overlapping fragments are dropped (RFC 5722), and whoever speaks twice does not say two things.
        let says = |it: &Fragment| (it.source_port, it.destination_port, it.protocol);
        if is_known && says(&known) != says(first) {
            return Err(DropReason::Fragment);
        }
    } else {
        if !is_known || part.start < known.length.into() {
            return Err(DropReason::Fragment);
        }
        key.protocol = known.protocol;
        (key.source_port, key.destination_port) = (known.source_port, known.destination_port);
        arrival.segment = if known.is_answer == 0 {
            Segment::SPEAK
        } else {
            Segment::ANSWER
        };
        arrival.shape |= Arrival::LATER;
    }
    Ok(())
}

/// Remembers what the packet at hand, which goes on, says about those that follow it.
#[inline(always)]
pub(crate) fn remember<T: Tables + ?Sized>(tables: &T, scratch: &Scratch) {
    if scratch.arrival.segment.is_first() {
        tables.keep_fragment(&scratch.fragment, &scratch.first);
    }
}
