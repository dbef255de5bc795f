//! What a pod sends, at the host's end of its veth pair: the lease, the service, the flow, the policy of
//! both ends, and straight on to the receiver when that is a pod of this node. A local delivery leaves
//! the TTL as it is: the two pods are neighbours, and a loop is not possible since a pod's device is
//! always the last hop.

use weir_common::counter::Counter;
use weir_common::service::Scope;
use weir_common::{DropReason, Protocol};

use crate::choose::{choose, is_over};
use crate::flow::{self, Count, Fit, Found, Seen, Sender, Through};
use crate::icmp;
use crate::l3::{self, Extent, Family, L3, Side};
use crate::l4::{self, Segment};
use crate::merge::Merge;
use crate::nat;
use crate::packet::{Mark, Packet};
use crate::policy::Here;
use crate::service;
use crate::tables::{FlowTable, Tables};
use crate::tuple::same;
use crate::verdict::{Scratch, Verdict};

/// Decides about a packet that a pod sends.
#[inline(always)]
pub fn from_pod<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Verdict {
    // A pod's packets come in without a mark: its pair takes every mark off. One that is marked here has passed a
    // program at this very hook, one that is attached in another way.
    if packet.mark() == Mark::Passed {
        return Verdict::Pass;
    }
    match decide(packet, tables, scratch) {
        Ok(verdict) => verdict,
        Err(reason) => Verdict::Drop(reason),
    }
}

#[inline(always)]
fn decide<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<Verdict, DropReason> {
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
        Family::V4 => forward::<l3::V4, _, _>(packet, tables, scratch, &here(&device.ipv4)),
        Family::V6 => forward::<l3::V6, _, _>(packet, tables, scratch, &here(&device.ipv6)),
    }
}

#[inline(always)]
fn forward<F: L3, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
    here: &Here<'_>,
) -> Result<Verdict, DropReason> {
    let tuple = &mut scratch.trace.tuple;
    F::addresses(packet, l3::OFFSET, tuple)?;
    if F::is_martian(&tuple.destination) || F::is_martian(&tuple.source) {
        return Err(DropReason::Martian);
    }
    if !same(&tuple.source, here.addr) {
        return Err(DropReason::SpoofedAddress);
    }
    if packet.load::<6>(6)? != here.device.mac.0 {
        return Err(DropReason::SpoofedMac);
    }
    let body = F::body(packet, l3::OFFSET, Extent::Whole)?;
    let segment = l4::parse::<F>(packet, &body, tuple)?;
    if segment.is_error() {
        icmp::is_about_flow::<F>(packet, tables, &body, scratch)?;
        // A pod speaks for itself alone.
        if !same(&scratch.question.destination, here.addr) {
            return Err(DropReason::NoFlow);
        }
        let device = match tables.local_pod(&scratch.trace.tuple.destination) {
            Some(pod) => pod.ifindex,
            None => 0,
        };
        return Ok(deliver(packet, tables, device));
    }
    let segment = segment.merged(&scratch.merge);
    let transport = scratch.merge.pass(body.offset as u32) as usize;
    let seen = Seen {
        segment,
        length: scratch.merge.pass(body.end) - l3::OFFSET as u32,
        count: Count::Here,
    };

    let (target, met) = target(tables, scratch, segment)?;
    let target = target.merged(&scratch.merge);
    let tuple = &mut scratch.trace.tuple;
    let (through, service) = if target == Target::DIRECT {
        (Through::Nothing, None)
    } else {
        tuple.set_destination(&scratch.nat.peer);
        (Through::Service, Some(&scratch.asked))
    };
    let mut found = if target == Target::DIRECT {
        met
    } else {
        tuple.write_key(&mut scratch.key);
        flow::find(tables, tuple, &scratch.key)
    };
    if let Some(flow) = &found {
        match flow.fit(tables, tuple.protocol, segment, service) {
            Fit::Yes => {}
            Fit::Over => {
                tables.forget(&scratch.key);
                found = None;
            }
            Fit::Collision => return Err(DropReason::NatCollision),
        }
    }
    let device = match &found {
        Some(flow) => flow::proceed(tables, here, scratch, flow, &seen)?,
        None => flow::open(tables, here, scratch, &seen, through)?,
    };

    if target == Target::CHOSEN {
        scratch.question = scratch.trace.tuple;
        scratch.question.set_destination(&scratch.asked);
        flow::lead(tables, scratch)?;
    }
    let protocol = scratch.trace.tuple.protocol;
    if through == Through::Service {
        let (asked, backend) = (&scratch.asked, &scratch.nat.peer);
        let side = Side::Destination;
        nat::replace::<F>(packet, tables, side, protocol, transport, asked, backend)?;
    } else if let Some(found) = &found
        && found.sender == Sender::Responder
        && found.is_from_service()
    {
        let backend = &scratch.trace.tuple.source();
        let asked = &found.flow.nat.peer;
        let side = Side::Source;
        nat::replace::<F>(packet, tables, side, protocol, transport, backend, asked)?;
    }
    Ok(deliver(packet, tables, device))
}

/// Where a packet goes, before policy. The service is then in `asked`, the backend in `nat`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Target(u32);

impl Target {
    /// Where it says.
    const DIRECT: Self = Self(0);
    /// To the backend that earlier packets went to.
    const REMEMBERED: Self = Self(1);
    /// To a backend chosen for this packet.
    const CHOSEN: Self = Self(2);

    #[inline(always)]
    fn merged(self, merge: &Merge) -> Self {
        Self(merge.pass(self.0))
    }
}

/// The flow of a packet that goes where it says, if it is known.
type Met<T> = Option<Found<<T as Tables>::FlowRef>>;

#[inline(always)]
fn target<T: Tables>(
    tables: &T,
    scratch: &mut Scratch,
    segment: Segment,
) -> Result<(Target, Met<T>), DropReason> {
    let tuple = &scratch.trace.tuple;
    let protocol = tuple.protocol;
    let is_syn = segment.is_syn();
    scratch.asked = tuple.destination();
    tuple.write_key(&mut scratch.key);
    let met = flow::find(tables, tuple, &scratch.key);
    if let Some(found) = &met {
        if found.leads_to_backend() {
            if found.sender == Sender::Responder {
                return Err(DropReason::NoFlow);
            }
            scratch.nat = found.flow.nat;
            if service::is_current(tables, scratch.nat.backend, scratch.nat.generation) {
                if !(is_syn && is_over(tables, scratch)) {
                    flow::touch(tables, &found.flow);
                    return Ok((Target::REMEMBERED, None));
                }
            } else if protocol == Protocol::TCP && !is_syn {
                return Err(DropReason::BackendGone);
            }
        } else if found.sender == Sender::Responder
            || found.is_from_service()
            || (found.table == FlowTable::Answered && !is_syn)
        {
            return Ok((Target::DIRECT, met));
        }
        // What is left is a lead to nowhere, or a flow that nobody has answered: its address may have
        // become a service's since.
    }
    let asked = &scratch.asked;
    let Some(frontend) = service::frontend(tables, asked, protocol, Scope::INTERNAL) else {
        if let Some(found) = &met
            && found.leads_to_backend()
        {
            tables.forget(&scratch.key);
            return Ok((Target::DIRECT, None));
        }
        return Ok((Target::DIRECT, met));
    };
    choose(tables, scratch, segment, &frontend)?;
    if met.is_some() {
        tables.forget(&scratch.key);
    }
    Ok((Target::CHOSEN, None))
}

#[inline(always)]
fn deliver<P: Packet, T: Tables>(packet: &mut P, tables: &T, device: u32) -> Verdict {
    if device == 0 {
        packet.mark_passed();
        return Verdict::Pass;
    }
    tables.count(Counter::LocalDeliveries);
    Verdict::Redirect(device)
}
