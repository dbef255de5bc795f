//! Whether a conversation may be: the sender's egress and, on its own node, the receiver's ingress,
//! each one lookup in the tables that the agent has compiled.

use weir_common::counter::Counter;
use weir_common::device::Device;
use weir_common::policy::{Action, Class, PortKey, RuleId, RulesId, VerdictKey};
use weir_common::{Addr, DropReason};

use crate::merge::Merge;
use crate::tables::Tables;
use crate::tuple::{Tuple, same};

/// The pod whose device the program sits on.
#[derive(Debug)]
pub struct Here<'a> {
    pub ifindex: u32,
    pub device: &'a Device,
    /// Its address of the packet's family.
    pub addr: &'a Addr,
}

/// What allowed a conversation, and where its ends are.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Judgement {
    pub egress: RuleId,
    pub ingress: RuleId,
    /// Interface index of the end's device, 0 for an end that is not a pod of this node.
    pub opener_device: u32,
    pub responder_device: u32,
}

/// Judges a conversation from its opener to its responder, after translation. A denial leaves its rule
/// in `rule`.
///
/// # Errors
/// [`DropReason::EgressDenied`], [`DropReason::IngressDenied`], [`DropReason::NoVerdict`], and
/// [`DropReason::NoLease`] for a pod whose address is known but whose device is not.
#[inline(always)]
pub fn judge<T: Tables>(
    tables: &T,
    here: &Here<'_>,
    opener: &Tuple,
    rule: &mut RuleId,
    merge: &Merge,
) -> Result<Judgement, DropReason> {
    tables.count(Counter::Judged);
    let (opener_device, egress) = end(tables, here, &opener.source, Way::Out, merge)?;
    let (responder_device, ingress) = end(tables, here, &opener.destination, Way::In, merge)?;
    let mut judgement = Judgement {
        opener_device,
        responder_device,
        ..Judgement::default()
    };
    // A pod may always reach itself.
    if same(&opener.source, &opener.destination) {
        return Ok(judgement);
    }
    let denied = DropReason::EgressDenied;
    judgement.egress = ask(
        tables,
        egress,
        &opener.destination,
        opener,
        denied,
        rule,
        merge,
    )?;
    let denied = DropReason::IngressDenied;
    judgement.ingress = ask(tables, ingress, &opener.source, opener, denied, rule, merge)?;
    Ok(judgement)
}

#[derive(Clone, Copy)]
enum Way {
    Out,
    In,
}

/// The device at an address and the rules that hold there.
#[inline(always)]
fn end<T: Tables>(
    tables: &T,
    here: &Here<'_>,
    addr: &Addr,
    way: Way,
    merge: &Merge,
) -> Result<(u32, RulesId), DropReason> {
    let rules = |device: &Device| match way {
        Way::Out => device.egress,
        Way::In => device.ingress,
    };
    let (ifindex, rules) = if same(addr, here.addr) {
        (here.ifindex, rules(here.device))
    } else if let Some(pod) = tables.local_pod(addr) {
        let device = tables.device(pod.ifindex).ok_or(DropReason::NoLease)?;
        (pod.ifindex, rules(&device))
    } else {
        (0, RulesId::OPEN)
    };
    Ok((merge.pass(ifindex), RulesId(merge.pass(rules.0))))
}

/// Whether rules allow a peer; the rule that does.
#[inline(always)]
fn ask<T: Tables>(
    tables: &T,
    rules: RulesId,
    peer: &Addr,
    opener: &Tuple,
    denied: DropReason,
    rule: &mut RuleId,
    merge: &Merge,
) -> Result<RuleId, DropReason> {
    if rules == RulesId::OPEN {
        return Ok(RuleId(merge.pass(0)));
    }
    let class = tables.class(peer);
    if class == Class::OWN_NODE {
        return Ok(RuleId(merge.pass(0)));
    }
    let row = tables
        .verdict(&VerdictKey { rules, class })
        .ok_or(DropReason::NoVerdict)?;
    let (mut action, mut decided) = (row.action, row.rule);
    if action == Action::BY_PORT {
        let key = PortKey::exact(row.ports, opener.protocol, opener.destination_port);
        action = Action::DENY;
        if let Some(port) = tables.port(&key) {
            (action, decided) = (port.action, port.rule);
        }
    }
    let decided = RuleId(merge.pass(decided.0));
    if action == Action::ALLOW {
        return Ok(decided);
    }
    *rule = decided;
    Err(denied)
}
