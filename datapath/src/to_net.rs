//! What leaves the node through an uplink: sources are replaced here, destinations where packets come in
//! (`from_net`), so that the stack in between never sees a packet from outside with an address of the node
//! as its source. What carries no mark of ours is the node's own, and not looked at.

use core::sync::atomic::Ordering::Relaxed;

use weir_common::counter::Counter;
use weir_common::flow::{Flow, Peer};
use weir_common::nat::{Masquerade, NatFlags, NatKey, NatRow};
use weir_common::{Addr, DropReason, Port};

use crate::flow::{self, Sender};
use crate::icmp::{self, Quoted};
use crate::l3::{self, Extent, Family, L3, Side};
use crate::l4::{self, Layout};
use crate::nat;
use crate::packet::{Mark, Packet};
use crate::tables::{Reserved, Tables};
use crate::tuple::{same, same_peer};
use crate::verdict::{Scratch, Verdict};

/// How many ports are tried before there counts as being none. With three quarters of them in use, one
/// new flow in ten finds none.
const TRIES: u32 = 8;

/// Decides about a packet that leaves the node.
#[inline(always)]
pub fn to_net<P: Packet, T: Tables>(packet: &mut P, tables: &T, scratch: &mut Scratch) -> Verdict {
    let mark = packet.mark();
    if mark == Mark::None {
        return Verdict::Pass;
    }
    match decide(packet, tables, scratch, mark) {
        Ok(()) => Verdict::Pass,
        Err(reason) => Verdict::Drop(reason),
    }
}

#[inline(always)]
fn decide<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
    mark: Mark,
) -> Result<(), DropReason> {
    // Without an address to leave with there is nothing to do.
    let Some(uplink) = tables.uplink(packet.ifindex()) else {
        return Ok(());
    };
    packet.pull(l3::HEADERS)?;
    match l3::family(packet) {
        Ok(Family::V4) => {
            leave::<l3::V4, _, _>(packet, tables, scratch, mark, l3::V4::uplink(&uplink))
        }
        Ok(Family::V6) => {
            leave::<l3::V6, _, _>(packet, tables, scratch, mark, l3::V6::uplink(&uplink))
        }
        // No pod sends anything else.
        Err(_) => Ok(()),
    }
}

#[inline(always)]
fn leave<F: L3, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
    mark: Mark,
    node: &Addr,
) -> Result<(), DropReason> {
    if F::addresses(packet, l3::OFFSET, &mut scratch.trace.tuple).is_err() {
        return Ok(());
    }
    // Neither a pod nor a client has the node's address: it is translated already.
    if same(&scratch.trace.tuple.source, node) {
        return Ok(());
    }
    let parsed = F::body(packet, l3::OFFSET, Extent::Whole).and_then(|body| {
        l4::parse::<F>(packet, &body, &mut scratch.trace.tuple).map(|segment| (body, segment))
    });
    let (body, segment) = match parsed {
        Ok(parsed) => parsed,
        Err(reason) => return unknown(tables, scratch, mark, reason),
    };
    if segment.is_error() {
        return match icmp::quoted::<F>(packet, &body, &mut scratch.question) {
            Ok(quoted) => error::<F, _, _>(packet, tables, scratch, mark, node, &quoted),
            Err(reason) => unknown(tables, scratch, mark, reason),
        };
    }
    let transport = scratch.merge.pass(body.offset as u32) as usize;
    let tuple = &scratch.trace.tuple;
    tuple.write_key(&mut scratch.key);
    let Some(found) = flow::find(tables, tuple, &scratch.key) else {
        return unknown(tables, scratch, mark, DropReason::NoFlow);
    };
    // A reply of a pod through a service has its translation behind it.
    if found.leads_to_backend() {
        return Ok(());
    }
    let protocol = tuple.protocol;
    let source = tuple.source();
    let mut new = Peer::default();
    if found.sender == Sender::Responder {
        if mark != Mark::Translated || !found.is_from_service() {
            return Ok(());
        }
        new = found.flow.nat.peer;
    } else {
        let kept = Masquerade(found.flow.masquerade.load(Relaxed));
        if kept == Masquerade::NONE {
            return Ok(());
        }
        if let Some(port) = kept.port(node) {
            new.port = port;
        } else {
            if mark == Mark::Passed && stays(tables, scratch, &found.flow) {
                found.flow.masquerade.store(Masquerade::NONE.0, Relaxed);
                return Ok(());
            }
            new.port = reserve::<F, _>(tables, scratch, mark, node)?;
            found.flow.masquerade.store(
                Masquerade::of(&Peer {
                    addr: *node,
                    port: new.port,
                })
                .0,
                Relaxed,
            );
        }
        new.addr = *node;
        tables.count(Counter::PacketsMasqueraded);
    }
    nat::replace::<F>(
        packet,
        tables,
        Side::Source,
        protocol,
        transport,
        &source,
        &new,
    )
}

/// Does a flow that a pod has opened, or somebody else who is passed on, keep its source?
#[inline(always)]
fn stays<T: Tables>(tables: &T, scratch: &Scratch, flow: &Flow) -> bool {
    !tables.masquerades()
        || flow.opener_device.load(Relaxed) == 0
        || tables.is_in_cluster(&scratch.trace.tuple.destination)
}

/// A packet of ours whose flow cannot be told. What a pod sends out of the cluster would leave with the
/// pod's address, and what was half translated would reach a backend that answers past us.
#[inline(always)]
fn unknown<T: Tables>(
    tables: &T,
    scratch: &Scratch,
    mark: Mark,
    reason: DropReason,
) -> Result<(), DropReason> {
    let tuple = &scratch.trace.tuple;
    if mark == Mark::Translated {
        return Err(reason);
    }
    if !tables.masquerades()
        || tables.local_pod(&tuple.source).is_none()
        || tables.is_in_cluster(&tuple.destination)
    {
        return Ok(());
    }
    Err(reason)
}

/// Reserves a port of the node for the flow of the packet at hand.
#[inline(always)]
fn reserve<F: L3, T: Tables>(
    tables: &T,
    scratch: &mut Scratch,
    mark: Mark,
    node: &Addr,
) -> Result<Port, DropReason> {
    let tuple = &scratch.trace.tuple;
    if Layout::of::<F>(tuple.protocol).is_none() || same(node, &Addr::ABSENT) {
        return Err(DropReason::NotTranslatable);
    }
    let range = tables.port_range();
    let many = u32::from(range.last.saturating_sub(range.first)) + 1;
    scratch.nat_key = NatKey {
        node: Peer {
            addr: *node,
            ..Peer::default()
        },
        peer: tuple.destination(),
        protocol: tuple.protocol,
        pad: [0; 3],
    };
    scratch.nat_row = NatRow {
        end: tuple.source(),
        pad: 0,
        flags: match mark {
            Mark::Translated => NatFlags::CLIENT,
            Mark::Passed | Mark::None => 0,
        },
        created: tables.now(),
    };
    for _ in 0..TRIES {
        let number = u32::from(range.first) + tables.random() % many;
        let number = scratch.merge.pass(number) as u16;
        scratch.nat_key.node.port = number.into();
        if tables.reserve(&scratch.nat_key, &scratch.nat_row)? == Reserved::New {
            tables.count(Counter::NatPortsTaken);
            return Ok(number.into());
        }
        // The same conversation before its flow was forgotten.
        if let Some(row) = tables.reserved(&scratch.nat_key)
            && same_peer(&row.end, &scratch.nat_row.end)
        {
            return Ok(number.into());
        }
    }
    Err(DropReason::NoNatPort)
}

/// An error of a pod about what it has received: it names the pod twice.
#[inline(always)]
fn error<F: L3, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
    mark: Mark,
    node: &Addr,
    quoted: &Quoted,
) -> Result<(), DropReason> {
    scratch.question.write_key(&mut scratch.key);
    let Some(found) = flow::find(tables, &scratch.question, &scratch.key) else {
        return unknown(tables, scratch, mark, DropReason::NoFlow);
    };
    let Some(port) = Masquerade(found.flow.masquerade.load(Relaxed)).port(node) else {
        return Ok(());
    };
    // The pod is the opener of a flow with a port; what it has received came from the responder.
    let is_pod = same(&scratch.question.destination, &scratch.trace.tuple.source);
    if found.leads_to_backend() || found.sender == Sender::Opener || !is_pod {
        return Ok(());
    }
    let old = scratch.question.destination();
    let new = Peer { addr: *node, port };
    icmp::replace::<F>(packet, tables, quoted, Side::Destination, &old, &new)
}
