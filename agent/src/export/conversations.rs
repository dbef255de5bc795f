//! Conversations on the page of metrics, as the last sweep has counted them.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::metrics::one;
use crate::kernel::Tally;

pub(super) fn encode(to: &mut DescriptorEncoder<'_>, tally: &Tally) -> fmt::Result {
    let mut family = to.encode_descriptor(
        "conversations",
        "Conversations that pass this node, at the last sweep. Those through a service that was replaced at the socket are direct.",
        None,
        MetricType::Gauge,
    )?;
    for (transport, kind, state, count) in tally.conversations() {
        let labels = [
            ("protocol", transport.label()),
            ("kind", kind.label()),
            ("state", state.label()),
        ];
        ConstGauge::new(count as i64).encode(family.encode_family(&labels)?)?;
    }
    for (name, help, value) in [
        (
            "connections_evictable",
            "Rows of open TCP connections without room among TCP_WAYS, or whose place another has, at the last sweep: TCP_PLANS, where they are, pushes out \
             what was not used for long, and does not say so. All others are never pushed out.",
            tally.evictable,
        ),
        (
            "nat_ports_used",
            "Ports of the node's addresses that stand for others, at the last sweep; one that leads to two peers counts twice.",
            tally.ports.used,
        ),
        (
            "nat_ports_peer_max",
            "The most of them towards one peer (address, port, protocol). Exact up to 1024 peers; with more it may be too \
             high, by a 1025th of nat_ports_used at most.",
            tally.ports.peer_max,
        ),
        (
            "nat_ports_pod_max",
            "The most of them that one pod of this node has towards one peer; as exact.",
            tally.ports.pod_max,
        ),
    ] {
        one(to, name, help, &ConstGauge::new(value as i64))?;
    }
    Ok(())
}
