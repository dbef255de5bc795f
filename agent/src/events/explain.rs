//! From a record to words: who, what, and why.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use weir_cli::views::DropView;
use weir_common::event::DropEvent;
use weir_common::policy::RuleId;
use weir_common::{Addr, DropReason, Port, Protocol};

use super::Names;

/// What words are taken from.
pub trait Explainer {
    /// Who decided, as the numbers of the current policy tables say.
    fn rule(&self, rule: RuleId) -> Option<String>;
    fn names(&self) -> &Names;
}

/// A record in words. `boot` is the wall clock's time at which the monotonic clock read zero.
pub fn explain(event: &DropEvent, boot: SystemTime, by: &impl Explainer) -> DropView {
    let reason = DropReason::from_number(event.reason);
    let names = by.names();
    let end = |addr: Addr, port: Port| names.end(SocketAddr::new(IpAddr::from(addr), port.into()));
    let time = boot + Duration::from_nanos(event.time);
    DropView {
        time: humantime::format_rfc3339_millis(time).to_string(),
        reason: reason.map_or("unknown", DropReason::label).to_owned(),
        why: why(reason, event.rule, by),
        hook: event.hook.label().to_owned(),
        device: names.device(event.ifindex),
        protocol: protocol(event.protocol),
        source: end(event.source, event.source_port),
        destination: end(event.destination, event.destination_port),
        bytes: event.len,
        limited: event.limited,
    }
}

/// One sentence: which policy and rule decided, or what is wrong with the packet.
pub fn why(reason: Option<DropReason>, rule: RuleId, by: &impl Explainer) -> String {
    let Some(reason) = reason else {
        return "A program of another version gave a reason that this agent does not know.".into();
    };
    match by.rule(rule) {
        Some(owner) => owner,
        None => reason.help().to_owned(),
    }
}

/// The name of a protocol, or its number.
pub fn protocol(protocol: Protocol) -> String {
    match protocol {
        Protocol::TCP => "TCP".into(),
        Protocol::UDP => "UDP".into(),
        Protocol::SCTP => "SCTP".into(),
        Protocol::ICMP | Protocol::ICMPV6 => "ICMP".into(),
        Protocol(number) => format!("IP protocol {number}"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use weir_common::event::{EventKind, Hook};

    use super::*;

    struct Known(Names);

    impl Explainer for Known {
        fn rule(&self, rule: RuleId) -> Option<String> {
            (rule == RuleId(7)).then(|| "no rule allows it; isolated by shop/default-deny".into())
        }

        fn names(&self) -> &Names {
            &self.0
        }
    }

    fn event(reason: DropReason, rule: RuleId) -> DropEvent {
        DropEvent {
            kind: EventKind::DROP,
            reason: reason as u8,
            protocol: Protocol::TCP,
            hook: Hook::FROM_POD,
            time: 1_500_000_000,
            source: Ipv4Addr::new(10, 0, 0, 1).into(),
            destination_port: 80.into(),
            rule,
            ..Default::default()
        }
    }

    #[test]
    fn a_denial_names_its_owner_and_the_wall_clock() {
        let view = explain(
            &event(DropReason::EgressDenied, RuleId(7)),
            SystemTime::UNIX_EPOCH,
            &Known(Names::default()),
        );
        assert_eq!(view.why, "no rule allows it; isolated by shop/default-deny");
        assert_eq!(view.time, "1970-01-01T00:00:01.500Z");
        assert_eq!((view.protocol.as_str(), view.destination.port), ("TCP", 80));
        assert_eq!(view.source.address, Ipv4Addr::new(10, 0, 0, 1));
    }

    #[test]
    fn without_an_owner_the_reason_explains_itself() {
        let view = explain(
            &event(DropReason::SpoofedMac, RuleId::NONE),
            SystemTime::UNIX_EPOCH,
            &Known(Names::default()),
        );
        assert_eq!(view.why, DropReason::SpoofedMac.help());
    }
}
