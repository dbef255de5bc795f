//! The nodes' side of the line: which ranges this node's pods get their addresses from, and where those of
//! other nodes are reached. Leases are `pods`', and the kernel's routes are `apply::routes`'.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tracing::info;
use weir_cli::views::{Nodes, UnreachableNode};

use super::pods::name_of;
use super::{Dirty, Line};
use crate::apply::Deletes;
use crate::apply::routes::Wanted;
use crate::compile::{node_addresses, route};
use crate::config::PodCidrs;
use crate::model::Kind;

impl Line {
    /// Says what changed about nodes to those who make it so.
    pub(super) fn pass_nodes(&mut self, dirty: &Dirty) {
        if dirty.nodes {
            self.publish_pod_cidrs();
        }
        if dirty.nodes || self.ranges.has_changed().unwrap_or_default() {
            self.publish_routes();
            self.pass_uplinks();
        }
    }

    /// The node's own addresses, sorted: its traffic with its pods is always allowed.
    pub fn know_addresses(&mut self, addresses: Vec<IpAddr>) {
        if addresses != self.node_addresses {
            info!(?addresses, "the node's addresses changed");
            self.node_addresses = addresses;
            self.inputs.mark_own_addresses();
        }
    }

    /// Which addresses are nodes', for ports that all nodes have.
    pub(super) fn pass_node_addresses(&mut self) {
        let nodes = self.inputs.snapshot().nodes.values();
        let dns = &self.settings.dns.addresses;
        let rows = node_addresses::compile(nodes, &self.settings.node, &self.node_addresses, dns);
        self.nodes.apply(rows);
    }

    /// No route goes before every Node has been said.
    pub(super) fn publish_routes(&mut self) {
        let own = self.ranges.borrow_and_update().clone();
        let snapshot = self.inputs.snapshot();
        let nodes = snapshot.nodes.values().map(|node| &**node);
        let wanted = Wanted {
            plan: route::compile(nodes, &self.settings.node, &own),
            deletes: if snapshot.missing().any(|kind| kind == Kind::Node) {
                Deletes::Held
            } else {
                Deletes::Allowed
            },
        };
        self.published.routes.send_if_modified(|last| {
            let is_new = *last != wanted;
            *last = wanted;
            is_new
        });
    }

    /// How many nodes are known, and whose pods are not reached.
    pub(super) fn nodes(&self) -> Nodes {
        let wanted = self.published.routes.borrow();
        let mut reasons: BTreeMap<_, _> = wanted
            .plan
            .problems
            .iter()
            .map(|problem| (problem.node.clone(), problem.reason.clone()))
            .collect();
        reasons.extend(self.published.route_report.load().unreachable.clone());
        let unreachable = reasons.into_iter().map(|(node, reason)| UnreachableNode {
            node: node.to_string(),
            reason,
        });
        Nodes {
            known: self.inputs.snapshot().nodes.len(),
            unreachable: unreachable.collect(),
        }
    }

    /// A node that has lost its Node object, or its ranges, keeps those that it had.
    fn publish_pod_cidrs(&self) {
        let own = self.inputs.snapshot().nodes.get(&self.settings.node);
        let Some(own) = own.filter(|own| !own.pod_cidrs.is_empty()) else {
            return;
        };
        self.published.pod_cidrs.send_if_modified(|said| {
            let is_new = *said != own.pod_cidrs;
            said.clone_from(&own.pod_cidrs);
            is_new
        });
    }

    /// Pods that were started when this node had another range: other nodes have no route to them.
    pub(super) fn left_behind(&self) -> Option<String> {
        let ranges = self.ranges.borrow();
        if ranges.is_empty() || self.settings.pod_cidrs != PodCidrs::OfNode {
            return None;
        }
        let is_outside = |ip: &IpAddr| !ranges.iter().any(|range| range.contains(ip));
        let mut pods = self
            .open
            .values()
            .filter(|lease| lease.addresses.iter().any(is_outside));
        let first = name_of(pods.next()?);
        let others = pods.count();
        Some(format!(
            "pod {first} and {others} others have addresses outside of this node's pod CIDRs: other nodes \
             reach them again when they have been replaced"
        ))
    }

    /// Why no pod can be given an address, when it is for want of a range.
    pub(super) fn lacks_range(&self) -> Option<String> {
        if !self.ranges.borrow().is_empty() || self.settings.pod_cidrs != PodCidrs::OfNode {
            return None;
        }
        let node = &self.settings.node;
        let snapshot = self.inputs.snapshot();
        Some(match snapshot.nodes.get(node) {
            Some(own) if own.pod_cidrs.is_empty() => format!(
                "Node {node} has no spec.podCIDRs yet: is the controller manager run with \
                 --allocate-node-cidrs?"
            ),
            Some(_) => format!("the pod CIDRs of Node {node} are not written down yet"),
            None if snapshot.missing().any(|kind| kind == Kind::Node) => return None,
            None => format!("there is no Node {node} yet: is that what its kubelet calls it?"),
        })
    }
}
