//! Ports of the node that stand for others: freed when the flow that has one is gone.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use weir_common::flow::{Flow, FlowKey};
use weir_common::nat::{Masquerade, NatKey, NatRow};

/// How long a port may be reserved before its flow names it: a program does the one right after the other.
const GRACE: Duration = Duration::from_secs(5);

/// The reserved ports that no flow names any more. A flow that has another port than this one does not
/// name it.
///
/// # Errors
/// A flow cannot be looked up.
pub(super) fn orphans(
    rows: impl IntoIterator<Item = (NatKey, NatRow)>,
    now: Duration,
    find: impl Fn(&FlowKey) -> io::Result<Option<Flow>>,
) -> io::Result<Vec<NatKey>> {
    let mut orphans = Vec::new();
    for (key, row) in rows {
        if now.saturating_sub(Duration::from_nanos(row.created)) <= GRACE {
            continue;
        }
        let flow = find(&FlowKey {
            low: row.end.min(key.peer),
            high: row.end.max(key.peer),
            protocol: key.protocol,
            pad: [0; 3],
        })?;
        let names_it =
            |flow: Flow| flow.masquerade.load(Ordering::Relaxed) == Masquerade::of(&key.node).0;
        if !flow.is_some_and(names_it) {
            orphans.push(key);
        }
    }
    Ok(orphans)
}

#[cfg(test)]
mod tests {
    use super::*;
    use weir_common::flow::Peer;
    use weir_common::{Addr, Protocol};

    fn peer(last: u8, port: u16) -> Peer {
        Peer {
            addr: Addr::v4([192, 0, 2, last]),
            port: port.into(),
        }
    }

    #[test]
    fn a_port_goes_when_no_flow_names_it() {
        let (node, pod, peer_of_pod) = (peer(1, 20_000), peer(200, 4000), peer(7, 443));
        let key = NatKey {
            node,
            peer: peer_of_pod,
            protocol: Protocol::TCP,
            pad: [0; 3],
        };
        let row = NatRow {
            end: pod,
            created: 1_000_000_000,
            ..NatRow::default()
        };
        let naming = |port| Flow {
            masquerade: Masquerade::of(&peer(1, port)).cell(),
            ..Flow::default()
        };
        for (case, seconds, port, expected) in [
            ("its flow has it", 100, Some(20_000), 0),
            ("its flow has another", 100, Some(20_001), 1),
            ("there is no flow", 100, None, 1),
            ("it is being reserved", 4, None, 0),
        ] {
            let find = |asked: &FlowKey| {
                assert_eq!((asked.low, asked.high), (peer_of_pod, pod));
                Ok(port.map(naming))
            };
            let found = orphans([(key, row)], Duration::from_secs(seconds), find).unwrap();
            assert_eq!(found.len(), expected, "{case}");
        }
    }
}
