//! The nodes' side of the line: which addresses are nodes', which devices lead out of this one, which ranges
//! its pods get their addresses from, and where those of other nodes are reached. The kernel's routes are
//! `apply::routes`'.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tracing::{info, warn};
use weir_cli::views::{Nodes as NodesView, UnreachableNode};
use weir_common::nat::{InCluster, Uplink};
use weir_common::service::NodeAddress;
use weir_common::{Addr, Prefix};

use super::machine::Machine;
use super::{Dirty, Line, Programs};
use crate::apply::routes::Wanted;
use crate::apply::{Deletes, NodeAddresses, Status, Uplinks};
use crate::compile::masquerade::{self, Outlet};
use crate::compile::{node_addresses, route};
use crate::conditions::{About, Condition, NodeFault};
use crate::config::PodCidrs;
use crate::model::Kind;

/// The state of nodes, this one's uplinks included.
#[derive(Debug)]
pub(super) struct Nodes<M: Machine> {
    pub(super) table: NodeAddresses<M::Table<Addr, NodeAddress>>,
    pub(super) uplinks: Uplinks<M::Table<u32, Uplink>, M::Table<Prefix, InCluster>>,
    /// The devices that could lead out of the node, once somebody has looked.
    pub(super) outlets: Option<Vec<Outlet>>,
    /// Those that do, by interface index.
    pub(super) devices: BTreeMap<u32, String>,
    /// This node's own addresses, sorted.
    pub(super) addresses: Vec<IpAddr>,
    /// Rows of uplinks that could not be written.
    pub(super) problems: Vec<String>,
}

impl<M: Machine> Nodes<M> {
    pub(super) fn resume(
        table: NodeAddresses<M::Table<Addr, NodeAddress>>,
        uplinks: Uplinks<M::Table<u32, Uplink>, M::Table<Prefix, InCluster>>,
        addresses: Vec<IpAddr>,
    ) -> Self {
        Self {
            table,
            uplinks,
            outlets: None,
            devices: BTreeMap::new(),
            addresses,
            problems: Vec::new(),
        }
    }
}

impl<M: Machine> Line<M> {
    /// Writes what changed about nodes, or says it to those who make it so.
    pub(super) fn pass_nodes(&mut self, dirty: &Dirty) {
        if dirty.nodes {
            self.pass_node_addresses();
            self.publish_pod_cidrs();
            self.publish_routes();
            self.pass_uplinks();
        }
    }

    /// The node's own addresses, sorted: its traffic with its pods is always allowed.
    pub(super) fn know_addresses(&mut self, addresses: Vec<IpAddr>) {
        if addresses != self.nodes.addresses {
            info!(?addresses, "the node's addresses changed");
            self.nodes.addresses = addresses;
            self.inputs.mark_own_addresses();
        }
    }

    /// The devices that could lead out of the node.
    pub(super) fn know_outlets(&mut self, outlets: Vec<Outlet>) {
        self.nodes.outlets = Some(outlets);
        self.pass_uplinks();
    }

    /// Which addresses are nodes', for ports that all nodes have.
    pub(super) fn pass_node_addresses(&mut self) {
        let nodes = self.inputs.snapshot().nodes.values();
        let (own, dns) = (&self.nodes.addresses, &self.settings.dns.addresses);
        let rows = node_addresses::compile(nodes, &self.settings.node, own, dns);
        self.nodes.table.apply(rows);
    }

    /// No route goes before every Node has been said.
    pub(super) fn publish_routes(&mut self) {
        let snapshot = self.inputs.snapshot();
        let nodes = snapshot.nodes.values().map(|node| &**node);
        let wanted = Wanted {
            plan: route::compile(nodes, &self.settings.node, self.inputs.ranges()),
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

    /// Tables and programs of the uplinks. Not before every input has been said: a pod's traffic to a
    /// node that is not known yet would be masqueraded.
    pub(super) fn pass_uplinks(&mut self) {
        let nodes = &mut self.nodes;
        let Some(outlets) = nodes.outlets.as_ref().filter(|_| self.is_complete) else {
            return;
        };
        let snapshot = self.inputs.snapshot();
        let own = snapshot.nodes.get(&self.settings.node);
        let own = own.map_or(&[][..], |node| &node.addresses);
        let mut found = masquerade::uplinks(outlets, own, &self.settings.devices);
        let cluster = masquerade::cluster(snapshot, self.inputs.ranges(), &nodes.addresses);
        // A default route that is away for a moment must not end conversations: a device stays an uplink
        // as long as it is there, if nobody has chosen others.
        if self.settings.devices.is_empty() {
            for (index, row) in nodes.uplinks.known() {
                if let Some(outlet) = outlets.iter().find(|outlet| outlet.ifindex == index) {
                    found.entry(index).or_insert((outlet.name.clone(), row));
                }
            }
        }
        let rows: BTreeMap<u32, Uplink> = found
            .iter()
            .map(|(index, (_, row))| (*index, *row))
            .collect();
        nodes.problems = nodes.uplinks.apply(&rows, &cluster, Deletes::Allowed);
        let devices: BTreeMap<u32, String> = found
            .into_iter()
            .map(|(index, (name, _))| (index, name))
            .collect();
        let is_new = devices != nodes.devices;
        nodes.devices = devices;
        if is_new && self.programs == Programs::Ours {
            self.place_net_hooks();
        }
    }

    /// Programs on the uplinks, and on no other device. Do all hold theirs?
    pub(super) fn place_net_hooks(&self) -> bool {
        let uplinks = &self.nodes.devices;
        info!(uplinks = ?uplinks.values(), "these devices lead out of the node");
        let placed = self.machine.place_net_hooks(uplinks);
        if let Err(error) = &placed {
            warn!(error = format!("{error:#}"), "an uplink has no program yet");
        }
        placed.is_ok()
    }

    /// How many nodes are known, and whose pods are not reached.
    pub(super) fn nodes_view(&self) -> NodesView {
        let held = self.board.all().into_iter();
        let unreachable = held.filter_map(|held| match held.condition.about {
            About::Peer(node, _) => Some(UnreachableNode {
                node: node.to_string(),
                reason: held.condition.text,
            }),
            _ => None,
        });
        NodesView {
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

    /// What is wrong with addresses and ranges.
    pub(super) fn report_nodes(&self) {
        let fault = NodeFault::NodesNotWritten;
        let mut found = Vec::new();
        if let Status::Failed(why) = self.nodes.table.status() {
            found.push(Condition::part(fault, "addresses of nodes", why.as_str()));
        }
        if !self.nodes.problems.is_empty() {
            let text = self.nodes.problems.join("; ");
            found.push(Condition::part(fault, "uplinks", text));
        }
        let range = self.lacks_range();
        found.extend(range.map(|why| Condition::node(NodeFault::NoPodRange, why)));
        self.said.nodes.replace(found);
    }

    /// Why no pod can be given an address, when it is for want of a range.
    fn lacks_range(&self) -> Option<String> {
        if !self.inputs.ranges().is_empty() || self.settings.pod_cidrs != PodCidrs::OfNode {
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
