//! The page of metrics, made from one sample when it is scraped. Names are `weir_…`; labels are bounded
//! by tables of the code: reasons, tables.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::Registry;
use weir_common::DropReason;
use weir_common::counter::{Counter, Drops};

use super::conversations;
use crate::kernel::Tally;
use crate::line::Sample;
use crate::model::ObjectName;

/// What the page is made of.
#[derive(Debug)]
pub struct Page {
    pub sample: Sample,
    pub counters: Vec<(Counter, u64)>,
    pub drops: Vec<(DropReason, Drops)>,
    /// How many conditions hold, by whom they are about and by fault.
    pub conditions: BTreeMap<(&'static str, &'static str), usize>,
    /// How many of them make the node unready.
    pub not_ready: usize,
    pub second_lock_drops: u64,
    /// What the last sweep has left; nothing before the first.
    pub tally: Option<Arc<Tally>>,
    pub sweep_age: Duration,
    /// How many ports of a node's address may stand for others towards one peer.
    pub nat_ports: usize,
    /// Pods that have opened more than one may, with the packets that were dropped for it.
    pub limited: Vec<(ObjectName, u64)>,
}

/// The page as OpenMetrics text.
///
/// # Errors
/// Never in practice: text is written to memory.
pub fn encode(page: Page) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("weir");
    registry.register_collector(Box::new(page));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

impl Page {
    fn about(&self, kind: &str) -> usize {
        let conditions = self.conditions.iter();
        let about = conditions.filter(|((about, _), _)| *about == kind);
        about.map(|(_, count)| count).sum()
    }

    fn with(&self, kind: &'static str, fault: &'static str) -> usize {
        self.conditions
            .get(&(kind, fault))
            .copied()
            .unwrap_or_default()
    }
}

impl Collector for Page {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let sample = &self.sample;
        for (counter, value) in &self.counters {
            one(
                &mut to,
                counter.metric(),
                counter.help(),
                &ConstCounter::new(*value),
            )?;
        }
        let drops = |value: fn(&weir_common::counter::Drops) -> u64| {
            self.drops
                .iter()
                .map(move |(reason, drops)| (reason.label(), value(drops)))
        };
        family(
            &mut to,
            "drops",
            "Packets dropped, by reason.",
            "reason",
            drops(|d| d.packets),
        )?;
        family(
            &mut to,
            "drop_bytes",
            "Bytes of the IP packets dropped, by reason.",
            "reason",
            drops(|d| d.bytes),
        )?;
        let rows = sample
            .fills
            .iter()
            .map(|fill| (fill.table.as_str(), fill.rows));
        gauges(
            &mut to,
            "table_rows",
            "Rows that a table holds.",
            "table",
            rows,
        )?;
        let capacity = sample
            .fills
            .iter()
            .map(|fill| (fill.table.as_str(), fill.capacity));
        gauges(
            &mut to,
            "table_capacity",
            "Rows that a table can hold.",
            "table",
            capacity,
        )?;
        one(
            &mut to,
            "sweep_age_seconds",
            "Seconds since the last sweep of conversations, which comes every 30; since the start of the agent before the first.",
            &ConstGauge::new(self.sweep_age.as_secs() as i64),
        )?;
        if let Some(tally) = &self.tally {
            conversations::encode(&mut to, tally)?;
        }
        let mut family = to.encode_descriptor(
            "conditions",
            "What is wrong: conditions that hold, by whom they are about and by fault.",
            None,
            MetricType::Gauge,
        )?;
        for ((about, fault), count) in &self.conditions {
            let labels = [("about", *about), ("fault", *fault)];
            ConstGauge::new(*count as i64).encode(family.encode_family(&labels)?)?;
        }
        for (name, help, value) in [
            ("nodes", "Nodes known.", sample.nodes),
            (
                "unreachable_nodes",
                "Nodes whose pods have no route from here.",
                self.about("peer"),
            ),
            ("pods", "Pods of this node that are open.", sample.pods),
            ("services", "Services known.", sample.services),
            (
                "policies",
                "NetworkPolicies and ClusterNetworkPolicies known.",
                sample.policies,
            ),
            (
                "quarantined_objects",
                "Objects that cannot be understood; the last good state of each holds.",
                self.with("object", "Quarantined"),
            ),
            (
                "unapplied_objects",
                "Objects that could not be written to the kernel; the last good state of each holds.",
                self.with("object", "NotWritten") + self.with("pod", "NotWritten"),
            ),
            (
                "unsynced_inputs",
                "Kinds of objects that are not synced.",
                sample.unsynced,
            ),
            (
                "stale_inputs",
                "1 while objects are gone by that an earlier run saved, since the API server has not been \
                 heard.",
                usize::from(sample.stale_for.is_some()),
            ),
            (
                "stale_seconds",
                "How old those objects are; 0 when there are none.",
                sample.stale_for.map_or(0, |age| {
                    usize::try_from(age.as_secs()).unwrap_or(usize::MAX)
                }),
            ),
            (
                "not_ready_reasons",
                "Reasons why the node is not ready.",
                self.not_ready,
            ),
            (
                "dns_clients",
                "DNS processes that follow the zone.",
                sample.dns_clients,
            ),
            (
                "nat_ports_capacity",
                "Ports of the node's address that may stand for others towards one peer; one pod may have half of them.",
                self.nat_ports,
            ),
            (
                "policy_epoch",
                "Grows whenever flows are judged again.",
                sample.epoch as usize,
            ),
        ] {
            one(&mut to, name, help, &ConstGauge::new(value as i64))?;
        }
        let mut family = to.encode_descriptor(
            "pod_limited",
            "Packets of a pod that were dropped since it had opened more than one pod may; those that have none are left out.",
            None,
            MetricType::Counter,
        )?;
        for (pod, packets) in &self.limited {
            let labels = [("namespace", &*pod.namespace), ("pod", &*pod.name)];
            ConstCounter::new(*packets).encode(family.encode_family(&labels)?)?;
        }
        one(
            &mut to,
            "agent_restarts",
            "How often the agent was killed and its parent started it again.",
            &ConstCounter::new(sample.restarts),
        )?;
        one(
            &mut to,
            "second_lock_drops",
            "Packets of pods that no program of ours had passed, dropped by the second lock.",
            &ConstCounter::new(self.second_lock_drops),
        )?;
        one(
            &mut to,
            "drifted_rows",
            "Rows that somebody else changed in our tables, found and repaired.",
            &ConstCounter::new(sample.drifted_rows as u64),
        )
    }
}

pub(super) fn one<M: EncodeMetric + TypedMetric>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    metric: &M,
) -> Result<(), fmt::Error> {
    metric.encode(to.encode_descriptor(name, help, None, M::TYPE)?)
}

fn family<'a>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    values: impl Iterator<Item = (&'a str, u64)>,
) -> Result<(), fmt::Error> {
    let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (value, count) in values {
        let labels = [(label, value)];
        ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauges<'a>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    values: impl Iterator<Item = (&'a str, usize)>,
) -> Result<(), fmt::Error> {
    let mut family = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (value, count) in values {
        let labels = [(label, value)];
        ConstGauge::new(count as i64).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
