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
    /// Interface index of the end's device, 0 for an end that is not a pod of this node.
    pub opener_device: u32,
    pub responder_device: u32,
}

/// Judges the conversation in the question, from its opener to its responder, after translation; fills the
/// judgement. Of a denial the rule is in the trace.
///
/// Drops for [`DropReason::EgressDenied`], [`DropReason::IngressDenied`], [`DropReason::NoVerdict`], and
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
    egress.keeps &= is_established;
    ingress.keeps &= is_established;
    // A pod may always reach itself.
    if question.is_to_itself() {
        return Ok(());
    }
    let rule = &mut trace.rule;
    let egress = ask(tables, egress, Way::Out, question, rule)?;
    let ingress = ask(tables, ingress, Way::In, question, rule)?;
    judgement.egress = egress.rule;
    judgement.ingress = ingress.rule;
    // Whoever would have denied it first.
    let reason = match (egress.audit, ingress.audit) {
        (RuleId::NONE, RuleId::NONE) => return Ok(()),
        (RuleId::NONE, audit) => {
            *rule = audit;
            DropReason::IngressDenied
        }
        (audit, _) => {
            *rule = audit;
            DropReason::EgressDenied
        }
    };
    tables.count(Counter::AuditDenials);
    tables.audited(scratch, reason);
    scratch.trace.rule = RuleId::NONE;
    Ok(())
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

/// Who allows.
#[derive(Clone, Copy)]
struct Allowed {
    rule: RuleId,
    /// Who would not.
    audit: RuleId,
}

impl Allowed {
    const BY_NOBODY: Self = Self {
        rule: RuleId::NONE,
        audit: RuleId::NONE,
    };
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
        return Ok(Allowed::BY_NOBODY);
    }
    let mut class = tables.class(match way {
        Way::Out => &opener.destination,
        Way::In => &opener.source,
    });
    if class == Class::OWN_NODE {
        if way == Way::Out {
            return Ok(Allowed::BY_NOBODY);
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
        return Ok(Allowed::BY_NOBODY);
    }
    *rule = decided;
    Err(match way {
        Way::Out => DropReason::EgressDenied,
        Way::In => DropReason::IngressDenied,
    })
}
