//! The nodes' side of the line: which ranges this node's pods get their addresses from. What is leased of
//! them is `pods`'.

use super::{Dirty, Line};
use crate::config::PodCidrs;
use crate::model::Kind;

impl Line {
    /// Says what changed about nodes to those who make it so.
    pub(super) fn pass_nodes(&mut self, dirty: &Dirty) {
        if dirty.nodes {
            self.publish_pod_cidrs();
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
