//! Whose an address is, as far as policy cares. What class that gives is in `class`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use weir_common::Addr;

use super::report::{Claimant, Report};
use crate::model::{Pod, PodNetwork, PodPhase, Snapshot};

/// This node, as far as policy must know it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NodeView {
    pub name: Arc<str>,
    /// Every address that the devices of the node have. Those of its Node object are added.
    pub addresses: Vec<IpAddr>,
    /// Where the node answers DNS for its pods. The node's devices have these too, and they are not its own for
    /// that: nothing comes from them but answers, and asking is up to policy.
    pub dns: Vec<IpAddr>,
}

/// Who has an address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Holder<'a> {
    OwnNode,
    /// Another node, or a pod in the network of one.
    Node,
    Dns,
    Pod(&'a Pod),
}

/// The holder of every address that has one, and the claims that lost.
///
/// A node's address is the node's whatever a pod says: a node satisfies no selector, so a stale or
/// false claim can only lose permissions. An address at which DNS is answered is the node's own only where the
/// Node object says that it is. Between pods, one that is not being deleted wins, then the
/// greater uid.
pub(super) fn holders<'a>(
    snapshot: &'a Snapshot,
    node: &NodeView,
) -> (BTreeMap<Addr, Holder<'a>>, Vec<Report>) {
    let mut holders: BTreeMap<Addr, Holder<'a>> = BTreeMap::new();
    let own = snapshot.nodes.get(&node.name).into_iter();
    let devices = node.addresses.iter().filter(|ip| !node.dns.contains(ip));
    let own = own.flat_map(|own| &own.addresses).chain(devices);
    holders.extend(own.map(|ip| (Addr::from(*ip), Holder::OwnNode)));
    // Before other nodes: these addresses mean this node on every node, whatever an object says.
    for ip in &node.dns {
        holders.entry(Addr::from(*ip)).or_insert(Holder::Dns);
    }

    let others = snapshot.nodes.values().flat_map(|node| &node.addresses);
    let host = snapshot
        .pods
        .values()
        .filter(|p| lives_in(p, PodNetwork::Host));
    for ip in others.chain(host.flat_map(|pod| &pod.addresses)) {
        holders.entry(Addr::from(*ip)).or_insert(Holder::Node);
    }

    let mut pods: Vec<&Pod> = snapshot
        .pods
        .values()
        .map(|pod| &**pod)
        .filter(|pod| lives_in(pod, PodNetwork::Own))
        .collect();
    pods.sort_by_key(|pod| {
        let leaving = pod.phase == PodPhase::Terminating;
        (leaving, std::cmp::Reverse((&pod.uid, &pod.id)))
    });
    let mut reports = Vec::new();
    for pod in pods {
        for ip in &pod.addresses {
            let holder = match holders.entry(Addr::from(*ip)).or_insert(Holder::Pod(pod)) {
                Holder::Pod(holder) if holder.id == pod.id => continue,
                Holder::Pod(holder) => Claimant::Pod(holder.id.clone()),
                Holder::Dns => Claimant::Dns,
                Holder::OwnNode | Holder::Node => Claimant::Node,
            };
            reports.push(Report::AddressTaken {
                pod: pod.id.clone(),
                address: *ip,
                holder,
            });
        }
    }
    holders.remove(&Addr::ABSENT);
    (holders, reports)
}

/// Is the pod alive, in such a network? A finished pod's addresses may be another's already.
fn lives_in(pod: &Pod, network: PodNetwork) -> bool {
    pod.network == network && pod.phase != PodPhase::Finished
}

impl NodeView {
    /// Does this node enforce the policies of the pod? Not for pods in the network of the node, which
    /// no policy selects.
    pub(super) fn enforces(&self, pod: &Pod) -> bool {
        lives_in(pod, PodNetwork::Own) && pod.node.as_ref() == Some(&self.name)
    }
}
