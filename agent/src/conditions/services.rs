//! What is to be said about Services and host ports: from what claims and tables report to conditions. When it is said is
//! not here.

use std::fmt::Write;

use super::{About, Condition, ObjectFault, PodFault, Reporter};
use crate::compile::{Owner, Report};

/// Parts of one object that are told; the rest are counted.
const TOLD: usize = 8;

/// Exactly this is left out of what `owner` asks for, see [`crate::compile::claims::Delta::reports`]. `to` is a reporter
/// of its own.
pub fn say_reports(to: &Reporter, owner: &Owner, reports: &[Report]) {
    let faults = match owner {
        Owner::Service(_) => vec![
            ObjectFault::SourceRanges,
            ObjectFault::ExternalIpNotAllowed,
            ObjectFault::AddressTaken,
        ],
        // A pod has one fault for all of them.
        Owner::HostPorts(_) => vec![ObjectFault::AddressTaken],
    };
    for fault in faults {
        let of_fault = |report: &&Report| self::fault(report) == fault;
        let of_fault: Vec<_> = reports.iter().filter(of_fault).collect();
        say(to, about(owner, fault), text(&of_fault));
    }
}

/// `owner` cannot be written, and why, or is as it should be; see [`crate::apply::Services::take_news`]. `to` is a
/// reporter of its own: a pod that lost one host port may have another that finds no room.
pub fn say_failure(to: &Reporter, owner: &Owner, failure: Option<String>) {
    say(to, about(owner, ObjectFault::NotWritten), failure);
}

fn say(to: &Reporter, about: About, text: Option<String>) {
    match text {
        Some(text) => to.raise(Condition { about, text }),
        None => to.clear(&about),
    }
}

fn about(owner: &Owner, fault: ObjectFault) -> About {
    match owner {
        Owner::Service(name) => About::Object(format!("Service {name}").into(), fault),
        Owner::HostPorts(pod) => About::Pod(pod.clone(), PodFault::HostPort),
    }
}

fn fault(report: &Report) -> ObjectFault {
    match report {
        Report::SourceRanges { .. } => ObjectFault::SourceRanges,
        Report::ExternalIp { .. } => ObjectFault::ExternalIpNotAllowed,
        Report::AddressTaken { .. } => ObjectFault::AddressTaken,
    }
}

fn text(reports: &[&Report]) -> Option<String> {
    let (first, others) = reports.split_first()?;
    let mut text = first.to_string();
    for other in others.iter().take(TOLD - 1) {
        text.push_str("; ");
        text.push_str(&other.to_string());
    }
    if reports.len() > TOLD {
        // Writing to a string does not fail.
        write!(text, "; and {} more", reports.len() - TOLD).unwrap_or_default();
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use weir_common::service::{FrontendKey, Scope};
    use weir_common::{Addr, Protocol};

    use super::*;
    use crate::compile::claims::Address;
    use crate::conditions::{Board, Effect};
    use crate::model::ObjectName;

    fn taken(n: u8) -> Report {
        Report::AddressTaken {
            address: Address::of(&FrontendKey {
                addr: Addr::v4([192, 0, 2, n]),
                port: 80.into(),
                protocol: Protocol::TCP,
                scope: Scope::INTERNAL,
                pad: [0; 4],
            }),
            holder: Owner::Service(ObjectName::new("shop", "web")),
        }
    }

    fn said(board: &Board) -> Vec<String> {
        let all = board.all().into_iter();
        let mut all: Vec<String> = all
            .map(|held| {
                assert_eq!(held.condition.about.effect(), Effect::Nothing);
                format!("{} {}", held.condition.about.fault(), held.condition)
            })
            .collect();
        all.sort();
        all
    }

    #[test]
    fn each_fault_of_an_object_is_said_once_and_taken_back() {
        let board = Arc::new(Board::default());
        let (claims, tables) = (board.reporter("claims"), board.reporter("tables"));
        let service = Owner::Service(ObjectName::new("shop", "late"));
        let address = [8, 8, 8, 8].into();
        let reports = [Report::ExternalIp { address }, taken(1), taken(2)];
        say_reports(&claims, &service, &reports);
        say_failure(&tables, &service, Some("BACKENDS has no room for 3".into()));
        let wanted = [
            "AddressTaken Service shop/late: 192.0.2.1:80 TCP belongs to shop/web; 192.0.2.2:80 TCP belongs to shop/web",
            "ExternalIpNotAllowed Service shop/late: external IP 8.8.8.8 is in no range that is allowed",
            "NotWritten Service shop/late: BACKENDS has no room for 3",
        ];
        assert_eq!(said(&board), wanted);
        say_reports(&claims, &service, &reports[..1]);
        assert_eq!(said(&board), wanted[1..]);
        say_reports(&claims, &service, &[]);
        say_failure(&tables, &service, None);
        assert!(said(&board).is_empty());
    }

    #[test]
    fn host_ports_are_their_pods_and_a_long_list_ends() {
        let board = Arc::new(Board::default());
        let (claims, tables) = (board.reporter("claims"), board.reporter("tables"));
        let pod = Owner::HostPorts(ObjectName::new("shop", "cart-0"));
        let reports: Vec<_> = (1..=20).map(taken).collect();
        say_reports(&claims, &pod, &reports);
        say_failure(&tables, &pod, Some("LIVE is full".into()));
        let said = said(&board);
        assert_eq!(said.len(), 2);
        assert!(
            said.iter()
                .all(|it| it.starts_with("HostPort Pod shop/cart-0: "))
        );
        assert!(
            said.iter()
                .any(|it| it.ends_with("192.0.2.8:80 TCP belongs to shop/web; and 12 more"))
        );
    }
}
