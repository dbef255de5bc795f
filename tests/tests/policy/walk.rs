//! What the datapath does with the tables, in a few lines.

use std::net::IpAddr;

use weir_agent::compile::policy::Direction;
use weir_agent::compile::{PodRules, PolicyRows};
use weir_agent::model::ObjectName;
use weir_common::policy::{Action, Class, PortKey, RuleId, RulesId, VerdictKey};
use weir_common::{Addr, Port, Prefix, Protocol};

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Answer {
    Allowed(RuleId),
    Denied(RuleId),
    /// The tables hold no row.
    Missing,
}

impl Answer {
    pub(super) fn is_allowed(self) -> bool {
        matches!(self, Self::Allowed(_))
    }
}

pub(super) fn side(rules: PodRules, direction: Direction) -> RulesId {
    match direction {
        Direction::Ingress => rules.ingress,
        Direction::Egress => rules.egress,
    }
}

pub(super) fn class(rows: &PolicyRows, address: IpAddr) -> Class {
    let address = Addr::from(address);
    if let Some(class) = rows.classes.get(&address) {
        return *class;
    }
    let number = u128::from_be_bytes(address.0);
    let longest = (0..=Prefix::WHOLE).rev().find_map(|prefix_len| {
        let free = Prefix::WHOLE - prefix_len;
        let inside = u128::MAX.checked_shl(free).unwrap_or(0);
        let addr = Addr((number & inside).to_be_bytes());
        rows.cidrs.get(&Prefix { prefix_len, addr })
    });
    longest.copied().unwrap_or(Class::WORLD)
}

/// One direction of a pod of the node.
pub(super) fn judge(
    rows: &PolicyRows,
    pod: &ObjectName,
    direction: Direction,
    peer: IpAddr,
    (protocol, port): (Protocol, u16),
) -> Answer {
    let rules = side(rows.rules[pod], direction);
    cell(rows, rules, class(rows, peer), (protocol, port))
}

pub(super) fn cell(
    rows: &PolicyRows,
    rules: RulesId,
    class: Class,
    (protocol, port): (Protocol, u16),
) -> Answer {
    if rules == RulesId::OPEN || class == Class::OWN_NODE {
        return Answer::Allowed(RuleId::NONE);
    }
    let row = |class| rows.verdicts.get(&VerdictKey { rules, class });
    let Some(row) = row(class).or_else(|| row(Class::WORLD)) else {
        return Answer::Missing;
    };
    match row.action {
        Action::ALLOW => Answer::Allowed(row.rule),
        Action::DENY | Action::END => Answer::Denied(row.rule),
        Action::BY_PORT => {
            let longest = (PortKey::ANY_PORT..=PortKey::ONE_PORT)
                .rev()
                .find_map(|prefix_len| {
                    let mask = u16::MAX
                        .checked_shl(PortKey::ONE_PORT - prefix_len)
                        .unwrap_or(0);
                    rows.ports.get(&PortKey {
                        prefix_len,
                        ..PortKey::exact(row.ports, protocol, Port::from(port & mask))
                    })
                })
                .or_else(|| rows.ports.get(&PortKey::all(row.ports)));
            match longest {
                Some(port) if port.action == Action::ALLOW => Answer::Allowed(port.rule),
                Some(port) => Answer::Denied(port.rule),
                None => Answer::Denied(row.rule),
            }
        }
        other => panic!("{other:?} is no action"),
    }
}
