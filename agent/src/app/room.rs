//! What conversations take of the node, as `weir status` shows it: rows of their tables, ports of the node's addresses.

use std::net::SocketAddr;

use weir_cli::views::{NatPeer, NatPorts, TableFill};

use crate::apply::Fill;
use crate::events::{Names, protocol};
use crate::kernel::Tally;
use crate::line;

/// How full the tables of conversations are.
pub(super) fn fills(tally: &Tally) -> impl Iterator<Item = TableFill> {
    tally.tables().map(|(table, rows, capacity)| {
        let mut fill = line::filled(&Fill {
            table,
            rows,
            capacity,
        });
        // A thousand questions a second fill it, as it is meant: those that were answered long ago go first.
        if table == "OTHER_PLANS" {
            fill.problem = None;
        }
        fill
    })
}

/// The node's ports that stand for others, of this many towards each peer.
pub(super) fn nat(tally: &Tally, capacity: usize, names: &Names) -> NatPorts {
    let ports = &tally.ports;
    let peers = ports.peers.iter().map(|it| NatPeer {
        peer: names.end(SocketAddr::new(it.peer.addr.into(), it.peer.port.into())),
        protocol: protocol(it.protocol),
        ports: it.ports,
        pod: it.pod.map(|(_, addr)| {
            let addr = addr.into();
            names.of_address(addr).unwrap_or_else(|| addr.to_string())
        }),
        pod_ports: it.pod.map_or(0, |(ports, _)| ports),
    });
    NatPorts {
        capacity,
        used: ports.used,
        error: ports.error,
        peers: peers.collect(),
    }
}
