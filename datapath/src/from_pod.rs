//! What a pod sends, at the host's end of its veth pair: the lease, the service, the flow, the policy of
//! both ends, and straight on to the receiver when that is a pod of this node. A local delivery leaves
//! the TTL as it is: the two pods are neighbours, and a loop is not possible since a pod's device is
//! always the last hop.

use weir_common::counter::Counter;
use weir_common::flow::{Nat, Peer};
use weir_common::{DropReason, Protocol};

use crate::flow::{self, Count, Fit, Seen, Sender, Through};
use crate::icmp;
use crate::l3::{self, Extent, Family, L3, Side};
use crate::l4::{self, Meaning, Segment};
use crate::nat;
use crate::packet::Packet;
use crate::policy::Here;
use crate::service::{self, Chosen};
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
    if segment.meaning == Meaning::Error {
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
    let seen = Seen {
        segment: &segment,
        length: body.end - l3::OFFSET as u32,
        count: Count::Here,
    };

    let target = target(tables, scratch, &segment)?;
    let tuple = &mut scratch.trace.tuple;
    let (through, service) = if target == Target::Direct {
        (Through::Nothing, None)
    } else {
        tuple.set_destination(&scratch.nat.peer);
        (Through::Service, Some(&scratch.asked))
    };
    tuple.write_key(&mut scratch.key);
    let mut found = flow::find(tables, tuple, &scratch.key);
    if let Some(flow) = &found {
        match flow.fit(tables, tuple.protocol, segment.meaning, service) {
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

    if target == Target::Chosen {
        scratch.question = scratch.trace.tuple;
        scratch.question.set_destination(&scratch.asked);
        flow::lead(tables, scratch)?;
    }
    let protocol = scratch.trace.tuple.protocol;
    if through == Through::Service {
        let (asked, backend) = (&scratch.asked, &scratch.nat.peer);
        let side = Side::Destination;
        nat::replace::<F>(packet, tables, side, protocol, body.offset, asked, backend)?;
    } else if let Some(found) = &found
        && found.sender == Sender::Responder
        && found.is_from_service()
    {
        let backend = &scratch.trace.tuple.source();
        let asked = &found.flow.nat.peer;
        nat::replace::<F>(
            packet,
            tables,
            Side::Source,
            protocol,
            body.offset,
            backend,
            asked,
        )?;
    }
    Ok(deliver(packet, tables, device))
}

/// Where a packet goes, before policy. The service is then in `asked`, the backend in `nat`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Target {
    /// Where it says.
    Direct,
    /// To the backend that earlier packets went to.
    Remembered,
    /// To a backend chosen for this packet.
    Chosen,
}

#[inline(always)]
fn target<T: Tables>(
    tables: &T,
    scratch: &mut Scratch,
    segment: &Segment,
) -> Result<Target, DropReason> {
    let tuple = &scratch.trace.tuple;
    let protocol = tuple.protocol;
    let is_syn = segment.meaning == Meaning::Syn;
    scratch.asked = tuple.destination();
    tuple.write_key(&mut scratch.key);
    let found = flow::find(tables, tuple, &scratch.key);
    if let Some(found) = &found {
        if found.leads_to_backend() {
            if found.sender == Sender::Responder {
                return Err(DropReason::NoFlow);
            }
            scratch.nat = found.flow.nat;
            if service::is_current(tables, scratch.nat.backend, scratch.nat.generation) {
                if !(is_syn && is_over(tables, scratch)) {
                    flow::touch(tables, &found.flow);
                    return Ok(Target::Remembered);
                }
            } else if protocol == Protocol::TCP && !is_syn {
                return Err(DropReason::BackendGone);
            }
        } else if found.sender == Sender::Responder
            || found.is_from_service()
            || (found.table == FlowTable::Answered && !is_syn)
        {
            return Ok(Target::Direct);
        }
        // What is left is a lead to nowhere, or a flow that nobody has answered: its address may have
        // become a service's since.
    }
    let Some(frontend) = service::frontend(tables, &scratch.asked, protocol) else {
        if let Some(found) = &found
            && found.leads_to_backend()
        {
            tables.forget(&scratch.key);
        }
        return Ok(Target::Direct);
    };
    let chosen = service::choose(tables, &frontend, |backend| {
        // A pod that is its own backend would receive a packet from itself, which its kernel refuses.
        if same(&backend.addr, &scratch.trace.tuple.source) {
            return false;
        }
        scratch.question = scratch.trace.tuple;
        scratch.question.destination = backend.addr;
        scratch.question.destination_port = backend.port;
        scratch.question.write_key(&mut scratch.probe);
        match flow::find(tables, &scratch.question, &scratch.probe) {
            Some(found) => {
                let asked = Some(&scratch.asked);
                found.fit(tables, protocol, segment.meaning, asked) != Fit::Collision
            }
            None => true,
        }
    });
    match chosen {
        Chosen::Backend(backend, generation) => {
            if found.is_some() {
                tables.forget(&scratch.key);
            }
            scratch.nat = Nat {
                peer: Peer {
                    addr: backend.addr,
                    port: backend.port,
                },
                pad: 0,
                backend: backend.id,
                generation,
                pad2: 0,
            };
            Ok(Target::Chosen)
        }
        Chosen::NoneFits => Err(DropReason::NatCollision),
        Chosen::Empty => Err(DropReason::NoBackend),
    }
}

/// Is the connection to the remembered backend closed, so that a SYN is a new one?
#[inline(always)]
fn is_over<T: Tables>(tables: &T, scratch: &mut Scratch) -> bool {
    scratch.question = scratch.trace.tuple;
    scratch.question.set_destination(&scratch.nat.peer);
    scratch.question.write_key(&mut scratch.probe);
    let found = flow::find(tables, &scratch.question, &scratch.probe);
    found.is_some_and(|flow| flow.is_closed())
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
