//! Whether a conversation may be: the sender's egress and, on its own node, the receiver's ingress,
//! each one lookup in the tables that the agent has compiled.

use weir_common::counter::Counter;
use weir_common::device::{Device, DeviceFlags};
use weir_common::event::Hook;
use weir_common::policy::{Action, Class, PortKey, RuleId, RulesId, VerdictKey};
use weir_common::way::WayKey;
use weir_common::{Addr, DropReason};

use crate::tables::Tables;
use crate::verdict::{Outcome, Scratch};

/// What allowed a conversation, and where its ends are.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Judgement {
    pub egress: RuleId,
    pub ingress: RuleId,
    /// Who of those that are only audited would have denied what was sent, and what was received; [`RuleId::NONE`] without such.
    pub egress_audit: RuleId,
    pub ingress_audit: RuleId,
    /// Interface index of the end's device, 0 for an end that is not a pod of this node.
    pub opener_device: u32,
    pub responder_device: u32,
}

/// Judges the conversation in the question, from its opener to its responder, after translation; fills the
/// judgement. Of a denial the rule is in the trace.
///
/// Drops for [`DropReason::EgressDenied`], [`DropReason::IngressDenied`], [`DropReason::NoVerdict`], [`DropReason::Tunnel`], and
/// [`DropReason::NoLease`] for a pod whose address is known but whose device is not.
pub fn judge<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Outcome {
    Outcome::of(decide(tables, scratch).map(|()| true))
}

#[inline(always)]
fn decide<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<(), DropReason> {
    tables.count(Counter::Judged);
    let Scratch {
        trace,
        arrival,
        question,
        judgement,
        ..
    } = scratch;
    let [a, b, c, d, _] = *trace.tuple.words();
    let here = Here {
        ifindex: arrival.ifindex,
        addr: if trace.tuple.hook == Hook::TO_POD {
            [c, d]
        } else {
            [a, b]
        },
    };
    let [a, b, c, d, _] = *question.words();
    let is_established = trace.is_established != 0;
    trace.is_established = 0;
    *judgement = Judgement::default();
    let mut egress;
    (judgement.opener_device, egress) = end(tables, &here, &question.source, [a, b], Way::Out)?;
    let mut ingress;
    (judgement.responder_device, ingress) =
        end(tables, &here, &question.destination, [c, d], Way::In)?;
    // A node that has the tunnel would take what is in it for somebody else's.
    if judgement.opener_device != 0
        && is_of_tunnel(question)
        && tables.node(&question.destination).is_some()
    {
        return Err(DropReason::Tunnel);
    }
    egress.keeps &= is_established;
    ingress.keeps &= is_established;
    // A pod may always reach itself.
    if question.is_to_itself() {
        return Ok(());
    }
    let rule = &mut trace.rule;
    let egress = ask(tables, egress, Way::Out, question, rule)?;
    let ingress = ask(tables, ingress, Way::In, question, rule)?;
    (judgement.egress, judgement.egress_audit) = (egress.rule, egress.audit);
    (judgement.ingress, judgement.ingress_audit) = (ingress.rule, ingress.audit);
    Ok(())
}

/// Is it of a tunnel: of IP in IP (RFC 2003, RFC 2473, RFC 4213), GRE, VXLAN (also at the port that Linux had first) or Geneve?
#[inline(always)]
fn is_of_tunnel(key: &WayKey) -> bool {
    let port = u16::from(key.destination_port);
    matches!(
        (key.protocol.0, port),
        (4 | 41 | 47, _) | (17, 4789 | 6081 | 8472)
    )
}

/// Counts and tells, for each end, what policies that are only audited would have denied of the conversation that was judged last.
#[inline(always)]
pub(crate) fn tell<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) {
    if scratch.judgement.egress_audit.0 | scratch.judgement.ingress_audit.0 != 0 {
        let _told: Outcome = tables.tell(scratch);
    }
}

/// What [`tell`] does where there is something to tell.
pub fn tell_audit<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Outcome {
    let judged = scratch.judgement;
    for (rule, reason) in [
        (judged.egress_audit, DropReason::EgressDenied),
        (judged.ingress_audit, DropReason::IngressDenied),
    ] {
        if rule != RuleId::NONE {
            tables.count(Counter::AuditDenials);
            scratch.trace.rule = rule;
            tables.audited(scratch, reason);
        }
    }
    scratch.trace.rule = RuleId::NONE;
    Outcome::of(Ok(true))
}

/// The pod whose device the program sits on.
struct Here {
    ifindex: u32,
    addr: [u64; 2],
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Way {
    Out,
    In,
}

/// What holds for one end.
#[derive(Clone, Copy)]
struct Rules {
    list: RulesId,
    /// Does what is established go on?
    keeps: bool,
}

/// Who allows; the default is nobody in particular.
#[derive(Clone, Copy, Default)]
struct Allowed {
    rule: RuleId,
    /// Who would not.
    audit: RuleId,
}

/// The device at an address and the rules that hold there.
#[inline(always)]
fn end<T: Tables + ?Sized>(
    tables: &T,
    here: &Here,
    addr: &Addr,
    words: [u64; 2],
    way: Way,
) -> Result<(u32, Rules), DropReason> {
    let ifindex = if (words[0] ^ here.addr[0]) | (words[1] ^ here.addr[1]) == 0 {
        here.ifindex
    } else if let Some(pod) = tables.local_pod(addr) {
        pod.ifindex
    } else {
        let open = Rules {
            list: RulesId::OPEN,
            keeps: false,
        };
        return Ok((0, open));
    };
    let device = tables.device(ifindex).ok_or(DropReason::NoLease)?;
    let device: &Device = &device;
    let rules = Rules {
        list: match way {
            Way::Out => device.egress,
            Way::In => device.ingress,
        },
        keeps: device.flags.has(DeviceFlags::KEEPS_ESTABLISHED),
    };
    Ok((ifindex, rules))
}

/// Whether rules allow a peer, and who does.
#[inline(always)]
fn ask<T: Tables + ?Sized>(
    tables: &T,
    Rules { list: rules, keeps }: Rules,
    way: Way,
    opener: &WayKey,
    rule: &mut RuleId,
) -> Result<Allowed, DropReason> {
    if rules == RulesId::OPEN {
        return Ok(Allowed::default());
    }
    let mut class = tables.class(match way {
        Way::Out => &opener.destination,
        Way::In => &opener.source,
    });
    if class == Class::OWN_NODE {
        if way == Way::Out {
            return Ok(Allowed::default());
        }
        // What the node itself sends is not asked about. What comes in by a device and says that it is the node's
        // is not.
        class = Class::WORLD;
    }
    let mut row = tables.verdict(&VerdictKey { rules, class });
    if row.is_none() {
        // Rules that do not tell a class from the world have no row for it.
        class = Class::WORLD;
        row = tables.verdict(&VerdictKey { rules, class });
    }
    let row = row.ok_or(DropReason::NoVerdict)?;
    let (mut action, mut decided) = (row.action, row.rule);
    let mut audit = row.audit;
    if action == Action::BY_PORT {
        let key = PortKey::exact(row.ports, opener.protocol, opener.destination_port);
        action = Action::DENY;
        if let Some(port) = tables.port(&key) {
            (action, decided) = (port.action, port.rule);
            audit = port.audit;
        }
    }
    if action == Action::ALLOW {
        return Ok(Allowed {
            rule: decided,
            audit,
        });
    }
    if keeps && action != Action::END {
        return Ok(Allowed::default());
    }
    *rule = decided;
    Err(match way {
        Way::Out => DropReason::EgressDenied,
        Way::In => DropReason::IngressDenied,
    })
}
