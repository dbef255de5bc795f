//! What comes into the node through an uplink: destinations are replaced here, sources where packets
//! leave (`to_net`). What is not for one of our ports is the node's own affair and passes untouched.

use weir_common::counter::Counter;
use weir_common::flow::Peer;
use weir_common::nat::{NatFlags, NatKey};
use weir_common::{DropReason, Port, Protocol};

use crate::icmp;
use crate::l3::{self, Extent, Family, L3, Side};
use crate::l4;
use crate::nat;
use crate::packet::Packet;
use crate::tables::Tables;
use crate::tuple::same;
use crate::verdict::{Scratch, Verdict};

/// Decides about a packet that comes into the node.
#[inline(always)]
pub fn from_net<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Verdict {
    if packet.pull(l3::HEADERS).is_err() {
        return Verdict::Pass;
    }
    let decided = match l3::family(packet) {
        Ok(Family::V4) => enter::<l3::V4, _, _>(packet, tables, scratch),
        Ok(Family::V6) => enter::<l3::V6, _, _>(packet, tables, scratch),
        Err(_) => Ok(()),
    };
    match decided {
        Ok(()) => Verdict::Pass,
        Err(reason) => Verdict::Drop(reason),
    }
}

#[inline(always)]
fn enter<F: L3, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    let tuple = &mut scratch.trace.tuple;
    let parsed = F::addresses(packet, l3::OFFSET, tuple).and_then(|()| {
        let body = F::body(packet, l3::OFFSET, Extent::Whole)?;
        let segment = l4::parse::<F>(packet, &body, tuple)?;
        Ok((body, segment))
    });
    let Ok((body, segment)) = parsed else {
        return Ok(());
    };
    if segment.is_error() {
        let quoted = &mut scratch.question;
        let Ok(at) = icmp::quoted::<F>(packet, &body, quoted) else {
            return Ok(());
        };
        // The quoted packet has left with one of our ports as its source.
        if !is_in_range(tables, quoted.source_port) || !same(&quoted.source, &tuple.destination) {
            return Ok(());
        }
        let protocol = quoted.protocol;
        write_key(
            &quoted.source(),
            &quoted.destination(),
            protocol,
            &mut scratch.nat_key,
        );
        return match tables.reserved(&scratch.nat_key) {
            Some(row) if row.flags & NatFlags::CLIENT == 0 => {
                let old = &scratch.nat_key.node;
                icmp::replace::<F>(packet, tables, &at, Side::Source, old, &row.end)
            }
            _ => Ok(()),
        };
    }
    let transport = scratch.merge.pass(body.offset as u32) as usize;
    if is_in_range(tables, tuple.destination_port) {
        let protocol = tuple.protocol;
        write_key(
            &tuple.destination(),
            &tuple.source(),
            protocol,
            &mut scratch.nat_key,
        );
        if let Some(row) = tables.reserved(&scratch.nat_key) {
            let old = tuple.destination();
            tables.count(Counter::PacketsMasqueraded);
            let side = Side::Destination;
            nat::replace::<F>(packet, tables, side, protocol, transport, &old, &row.end)?;
        }
    }
    Ok(())
}

/// Can it be a port that stands for somebody?
#[inline(always)]
fn is_in_range(tables: &impl Tables, port: Port) -> bool {
    let range = tables.port_range();
    let port = u16::from(port);
    range.first <= port && port <= range.last
}

#[inline(always)]
fn write_key(node: &Peer, peer: &Peer, protocol: Protocol, key: &mut NatKey) {
    key.node = *node;
    key.peer = *peer;
    key.protocol = protocol;
    key.pad = [0; 3];
}
