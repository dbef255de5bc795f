//! What comes into the node through an uplink: destinations are replaced here, sources where packets
//! leave (`to_net`). What is not for one of our ports is the node's own affair and passes untouched.

use weir_common::counter::Counter;
use weir_common::flow::Peer;
use weir_common::nat::{NatFlags, NatKey};
use weir_common::service::{Frontend, NodeFlags, Scope};
use weir_common::{DropReason, Port, Protocol};

use crate::choose::{choose, is_over};
use crate::flow::{self, Count, Fit, Seen, Sender};
use crate::icmp;
use crate::l3::{self, Extent, Family, L3, Side};
use crate::l4::{self, Segment};
use crate::merge::Merge;
use crate::nat;
use crate::packet::Packet;
use crate::service;
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
    let segment = segment.merged(&scratch.merge);
    let transport = scratch.merge.pass(body.offset as u32) as usize;
    let length = scratch.merge.pass(body.end) - l3::OFFSET as u32;
    let tuple = &mut scratch.trace.tuple;
    let (protocol, asked) = (tuple.protocol, tuple.destination());
    if is_in_range(tables, asked.port) {
        write_key(&asked, &tuple.source(), protocol, &mut scratch.nat_key);
        if let Some(row) = tables.reserved(&scratch.nat_key) {
            tables.count(Counter::PacketsMasqueraded);
            if row.flags & NatFlags::CLIENT != 0 {
                tuple.set_destination(&row.end);
                let seen = Seen {
                    segment,
                    length,
                    count: Count::Here,
                };
                reply(tables, scratch, &seen)?;
                packet.mark_translated();
            }
            let side = Side::Destination;
            return nat::replace::<F>(packet, tables, side, protocol, transport, &asked, &row.end);
        }
    }
    let Some(frontend) = service::frontend(tables, &asked, protocol, Scope::EXTERNAL) else {
        return Ok(());
    };
    scratch.asked = asked;
    let target = target(tables, scratch, segment, &frontend)?.merged(&scratch.merge);
    scratch.trace.tuple.set_destination(&scratch.nat.peer);
    let local = tables.local_pod(&scratch.nat.peer.addr).is_some();
    let place = Place::of(local).merged(&scratch.merge);
    let seen = Seen {
        segment,
        length,
        // What a pod of this node receives is counted there.
        count: if place == Place::HERE {
            Count::FromElsewhere
        } else {
            Count::Here
        },
    };
    ask(tables, scratch, &seen, place)?;
    if target == Target::CHOSEN {
        scratch.question = scratch.trace.tuple;
        scratch.question.set_destination(&scratch.asked);
        flow::lead(tables, scratch)?;
    }
    if place == Place::ELSEWHERE {
        packet.mark_translated();
    }
    let (old, new) = (&scratch.asked, &scratch.nat.peer);
    nat::replace::<F>(
        packet,
        tables,
        Side::Destination,
        protocol,
        transport,
        old,
        new,
    )
}

/// Where a backend is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Place(u32);

impl Place {
    /// A pod of this node.
    const HERE: Self = Self(0);
    /// To be reached through an uplink, with the node's address as the source.
    const ELSEWHERE: Self = Self(1);

    #[inline(always)]
    const fn of(local: bool) -> Self {
        if local { Self::HERE } else { Self::ELSEWHERE }
    }

    #[inline(always)]
    fn merged(self, merge: &Merge) -> Self {
        Self(merge.pass(self.0))
    }
}

/// Which backend a packet for a service goes to; it is then in `nat`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Target(u32);

impl Target {
    /// The one that earlier packets went to.
    const REMEMBERED: Self = Self(0);
    /// One chosen for this packet.
    const CHOSEN: Self = Self(1);

    #[inline(always)]
    fn merged(self, merge: &Merge) -> Self {
        Self(merge.pass(self.0))
    }
}

#[inline(always)]
fn target<T: Tables>(
    tables: &T,
    scratch: &mut Scratch,
    segment: Segment,
    frontend: &Frontend,
) -> Result<Target, DropReason> {
    let tuple = &scratch.trace.tuple;
    let protocol = tuple.protocol;
    tuple.write_key(&mut scratch.key);
    if let Some(lead) = flow::find(tables, tuple, &scratch.key) {
        if lead.sender == Sender::Responder {
            return Err(DropReason::NatCollision);
        }
        if lead.leads_to_backend() {
            scratch.nat = lead.flow.nat;
            if service::is_current(tables, scratch.nat.backend, scratch.nat.generation) {
                if !(segment.is_syn() && is_over(tables, scratch)) {
                    flow::touch(tables, &lead.flow);
                    return Ok(Target::REMEMBERED);
                }
            } else if protocol == Protocol::TCP && !segment.is_syn() {
                return Err(DropReason::BackendGone);
            }
        }
        tables.forget(&scratch.key);
    }
    if segment.is_answer() {
        return Err(DropReason::NoFlow);
    }
    choose(tables, scratch, segment, frontend)?;
    Ok(Target::CHOSEN)
}

/// Goes on with the flow of a packet to its backend, or opens it.
#[inline(always)]
fn ask<T: Tables>(
    tables: &T,
    scratch: &mut Scratch,
    seen: &Seen,
    place: Place,
) -> Result<(), DropReason> {
    let tuple = &scratch.trace.tuple;
    let protocol = tuple.protocol;
    tuple.write_key(&mut scratch.key);
    let mut found = flow::find(tables, tuple, &scratch.key);
    if let Some(flow) = &found {
        match flow.fit(tables, protocol, seen.segment, Some(&scratch.asked)) {
            Fit::Yes => {}
            Fit::Over => {
                tables.forget(&scratch.key);
                found = None;
            }
            Fit::Collision => return Err(DropReason::NatCollision),
        }
    }
    match &found {
        Some(flow) => {
            // The pod's side accounts for what comes to it.
            if place == Place::ELSEWHERE {
                flow::account(tables, scratch, flow, seen);
            }
            Ok(())
        }
        None => {
            // A node cannot pass itself what it should answer with another port.
            if place == Place::ELSEWHERE
                && let Some(node) = tables.node(&scratch.nat.peer.addr)
                && node.flags & NodeFlags::OWN != 0
            {
                return Err(DropReason::NotTranslatable);
            }
            flow::open_from_outside(tables, scratch, seen)
        }
    }
}

/// Goes on with the flow of a backend's reply to a client outside.
#[inline(always)]
fn reply<T: Tables>(tables: &T, scratch: &mut Scratch, seen: &Seen) -> Result<(), DropReason> {
    let tuple = &scratch.trace.tuple;
    tuple.write_key(&mut scratch.key);
    match flow::find(tables, tuple, &scratch.key) {
        Some(found) if found.is_from_service() && found.sender == Sender::Responder => {
            flow::account(tables, scratch, &found, seen);
            Ok(())
        }
        _ => Err(DropReason::NoFlow),
    }
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
