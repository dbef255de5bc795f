//! The node's uplinks: tables first, then programs on the devices.

use std::collections::BTreeMap;

use tracing::{info, warn};
use weir_common::nat::Uplink;

use super::{Line, Programs};
use crate::apply::Deletes;
use crate::compile::masquerade::{self, Outlet};

impl Line {
    /// The devices that could lead out of the node.
    pub fn know_outlets(&mut self, outlets: Vec<Outlet>) {
        self.outlets = Some(outlets);
        self.pass_uplinks();
    }

    /// Tables and programs of the uplinks. Not before every input has been said: a pod's traffic to a
    /// node that is not known yet would be masqueraded.
    pub(super) fn pass_uplinks(&mut self) {
        let Some(outlets) = self.outlets.as_ref().filter(|_| self.is_complete) else {
            return;
        };
        let snapshot = self.inputs.snapshot();
        let own = snapshot.nodes.get(&self.settings.node);
        let own = own.map_or(&[][..], |node| &node.addresses);
        let mut found = masquerade::uplinks(outlets, own, &self.settings.devices);
        let cluster = masquerade::cluster(snapshot, &self.ranges.borrow(), &self.node_addresses);
        // A default route that is away for a moment must not end conversations: a device stays an uplink
        // as long as it is there, if nobody has chosen others.
        if self.settings.devices.is_empty() {
            for (index, row) in self.uplinks.known() {
                if let Some(outlet) = outlets.iter().find(|outlet| outlet.ifindex == index) {
                    found.entry(index).or_insert((outlet.name.clone(), row));
                }
            }
        }
        let rows: BTreeMap<u32, Uplink> = found
            .iter()
            .map(|(index, (_, row))| (*index, *row))
            .collect();
        for problem in self.uplinks.apply(&rows, &cluster, Deletes::Allowed) {
            warn!(problem, "an uplink's row cannot be written");
        }
        let devices: BTreeMap<u32, String> = found
            .into_iter()
            .map(|(index, (name, _))| (index, name))
            .collect();
        let is_new = devices != *self.kernel.uplinks();
        self.kernel.know_uplinks(devices);
        if is_new && self.programs == Programs::Ours {
            self.place_net_hooks();
        }
    }

    /// Programs on the uplinks, and on no other device.
    pub(super) fn place_net_hooks(&self) {
        let uplinks = self.kernel.uplinks().values();
        info!(uplinks = ?uplinks, "these devices lead out of the node");
        if let Err(error) = self.kernel.settle_net_hooks() {
            warn!(error = format!("{error:#}"), "an uplink has no program yet");
        }
    }
}
