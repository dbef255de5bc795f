//! What the host or other nodes send to a pod, at the host's end of its veth pair. Packets between two
//! pods of this node do not come through here.

use weir_common::DropReason;

use crate::flow::{self, Count, Fit, Seen, Sender, Through};
use crate::icmp;
use crate::l3::{self, Extent, Family, L3, Side};
use crate::l4;
use crate::nat;
use crate::packet::Packet;
use crate::policy::Here;
use crate::tables::Tables;
use crate::tuple::same;
use crate::verdict::{Scratch, Verdict};

/// Decides about a packet that is sent to a pod.
#[inline(always)]
pub fn to_pod<P: Packet, T: Tables>(packet: &mut P, tables: &T, scratch: &mut Scratch) -> Verdict {
    match decide(packet, tables, scratch) {
        Ok(()) => Verdict::Pass,
        Err(reason) => Verdict::Drop(reason),
    }
}

#[inline(always)]
fn decide<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    let ifindex = packet.ifindex();
    let device = tables.device(ifindex).ok_or(DropReason::NoLease)?;
    packet.pull(l3::HEADERS)?;
    let family = l3::family(packet)?;
    let here = |addr| Here {
        ifindex,
        device: &device,
        addr,
    };
    match family {
        Family::V4 => receive::<l3::V4, _, _>(packet, tables, scratch, &here(&device.ipv4)),
        Family::V6 => receive::<l3::V6, _, _>(packet, tables, scratch, &here(&device.ipv6)),
    }
}

#[inline(always)]
fn receive<F: L3, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
    here: &Here<'_>,
) -> Result<(), DropReason> {
    let tuple = &mut scratch.trace.tuple;
    F::addresses(packet, l3::OFFSET, tuple)?;
    if !same(&tuple.destination, here.addr) {
        return Err(DropReason::NotForPod);
    }
    if F::is_martian(&tuple.source) {
        return Err(DropReason::Martian);
    }
    let body = F::body(packet, l3::OFFSET, Extent::Whole)?;
    let segment = l4::parse::<F>(packet, &body, tuple)?;
    if segment.is_error() {
        icmp::is_about_flow::<F>(packet, tables, &body, scratch)?;
        return Ok(());
    }
    let segment = segment.merged(&scratch.merge);
    let transport = scratch.merge.pass(body.offset as u32) as usize;
    let seen = Seen {
        segment,
        length: scratch.merge.pass(body.end) - l3::OFFSET as u32,
        count: Count::FromElsewhere,
    };
    let tuple = &scratch.trace.tuple;
    tuple.write_key(&mut scratch.key);
    let mut found = flow::find(tables, tuple, &scratch.key);
    if let Some(flow) = &found {
        // Replies through a service come from the backend. One that comes from the service is translated already, by
        // an agent's program that is attached here in another way; it says no more than the backend's could.
        if flow.leads_to_backend() {
            return match flow.sender {
                Sender::Responder => Ok(()),
                Sender::Opener => Err(DropReason::NoFlow),
            };
        }
        // A packet of the opener has its translation behind it, so any flow of these ports is its own.
        if flow.sender == Sender::Responder
            && flow.fit(tables, tuple.protocol, segment, None) == Fit::Over
        {
            tables.forget(&scratch.key);
            found = None;
        }
    }
    let Some(found) = &found else {
        flow::open(tables, here, scratch, &seen, Through::Nothing)?;
        return Ok(());
    };
    flow::proceed(tables, here, scratch, found, &seen)?;
    if found.sender == Sender::Responder && found.is_from_service() {
        nat::replace::<F>(
            packet,
            tables,
            Side::Source,
            scratch.trace.tuple.protocol,
            transport,
            &scratch.trace.tuple.source(),
            &found.flow.nat.peer,
        )?;
    }
    Ok(())
}
