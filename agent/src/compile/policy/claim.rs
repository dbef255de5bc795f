//! Whose an address is, as far as policy cares. What class that gives is `graph`'s.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use weir_common::Addr;

use super::group::GroupId;
use super::report::{self, Report};
use crate::model::{Node, ObjectName, Pod, PodNetwork, PodPhase};

/// This node, as far as policy must know it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NodeView {
    pub name: Arc<str>,
    /// Every address that the devices of the node have. Those of its Node object are added.
    pub addresses: Vec<IpAddr>,
    /// Where the node answers DNS for its pods. The node's devices have these too, and they are not its own for
    /// that: nothing comes from them but answers, and asking is up to policy.
    pub dns: Vec<IpAddr>,
}

/// Who says that an address is its own, in the order in which they are believed.
///
/// A node's address is the node's whatever a pod says: a node satisfies no selector, so a stale or
/// false claim can only lose permissions. An address at which DNS is answered is the node's own only where the
/// Node object says that it is, and before other nodes': these addresses mean this node on every node. Between pods, one that is
/// not being deleted wins, then the greater uid.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Claimant {
    /// This node, by its object or by its devices.
    OwnNode(Said),
    Dns(GroupId),
    /// Another node, or a pod in the network of one.
    Node(Said),
    Pod {
        is_leaving: bool,
        age: Reverse<(Arc<str>, ObjectName)>,
        group: GroupId,
    },
}

/// By what.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Said {
    Devices,
    Node(Arc<str>),
    Pod(ObjectName),
}

/// Every claim that there is.
#[derive(Debug, Default)]
pub(super) struct Claims {
    claimants: BTreeMap<Addr, Vec<Claimant>>,
    /// Of the addresses of which somebody loses a claim.
    reports: BTreeMap<Addr, Vec<Report>>,
}

impl Claims {
    pub(super) fn add(&mut self, address: Addr, claimant: Claimant) {
        if address == Addr::ABSENT {
            return;
        }
        let all = self.claimants.entry(address).or_default();
        if let Err(at) = all.binary_search(&claimant) {
            all.insert(at, claimant);
        }
        self.report(address);
    }

    pub(super) fn remove(&mut self, address: Addr, claimant: &Claimant) {
        let Some(all) = self.claimants.get_mut(&address) else {
            return;
        };
        if let Ok(at) = all.binary_search(claimant) {
            all.remove(at);
        }
        if all.is_empty() {
            self.claimants.remove(&address);
        }
        self.report(address);
    }

    pub(super) fn holder(&self, address: &Addr) -> Option<&Claimant> {
        self.claimants.get(address)?.first()
    }

    /// Addresses that somebody claims.
    pub(super) fn addresses(
        &self,
        range: std::ops::RangeInclusive<Addr>,
    ) -> impl Iterator<Item = Addr> {
        self.claimants.range(range).map(|(address, _)| *address)
    }

    /// The claims of pods that lost.
    pub(super) fn reports(&self) -> impl Iterator<Item = &Report> {
        self.reports.values().flatten()
    }

    fn report(&mut self, address: Addr) {
        let all = self.claimants.get(&address).map_or(&[][..], |all| all);
        let lost = match all {
            [] | [_] => Vec::new(),
            [holder, others @ ..] => lost(address, holder, others),
        };
        match lost.is_empty() {
            true => self.reports.remove(&address),
            false => self.reports.insert(address, lost),
        };
    }
}

fn lost(address: Addr, holder: &Claimant, others: &[Claimant]) -> Vec<Report> {
    let holder = match holder {
        Claimant::OwnNode(_) | Claimant::Node(_) => report::Claimant::Node,
        Claimant::Dns(_) => report::Claimant::Dns,
        Claimant::Pod { age, .. } => report::Claimant::Pod(age.0.1.clone()),
    };
    let pods: BTreeSet<&ObjectName> = others
        .iter()
        .filter_map(|it| match it {
            Claimant::Pod { age, .. } => Some(&age.0.1),
            _ => None,
        })
        .collect();
    pods.into_iter()
        .map(|pod| Report::AddressTaken {
            pod: pod.clone(),
            address: IpAddr::from(address),
            holder: holder.clone(),
        })
        .collect()
}

/// Is the pod alive, in such a network? A finished pod's addresses may be another's already.
fn lives_in(pod: &Pod, network: PodNetwork) -> bool {
    pod.network == network && pod.phase != PodPhase::Finished
}

/// Is it alive, in a network of its own?
pub(super) fn is_of_its_own(pod: &Pod) -> bool {
    lives_in(pod, PodNetwork::Own)
}

/// The claims of a pod. The group is that of one with a network of its own.
pub(super) fn of_pod(
    pod: &Pod,
    group: Option<GroupId>,
) -> impl Iterator<Item = (Addr, Claimant)> + use<> {
    let claimant = match group {
        Some(group) if is_of_its_own(pod) => Some(Claimant::Pod {
            is_leaving: pod.phase == PodPhase::Terminating,
            age: Reverse((pod.uid.clone(), pod.id.clone())),
            group,
        }),
        _ if lives_in(pod, PodNetwork::Host) => Some(Claimant::Node(Said::Pod(pod.id.clone()))),
        _ => None,
    };
    let addresses: Vec<Addr> = pod.addresses.iter().map(|ip| Addr::from(*ip)).collect();
    let claims = claimant.map(|it| addresses.into_iter().map(move |addr| (addr, it.clone())));
    claims.into_iter().flatten()
}

/// The claims of a Node object.
pub(super) fn of_node<'a>(
    node: &'a Node,
    own: &'a NodeView,
) -> impl Iterator<Item = (Addr, Claimant)> + 'a {
    let said = Said::Node(node.name.clone());
    let claimant = match node.name == own.name {
        true => Claimant::OwnNode(said),
        false => Claimant::Node(said),
    };
    let addresses = node.addresses.iter();
    addresses.map(move |ip| (Addr::from(*ip), claimant.clone()))
}

impl NodeView {
    /// Does this node enforce the policies of the pod? Not for pods in the network of the node, which
    /// no policy selects.
    pub(super) fn enforces(&self, pod: &Pod) -> bool {
        is_of_its_own(pod) && pod.node.as_ref() == Some(&self.name)
    }

    /// The claims of its devices, and of its DNS.
    pub(super) fn claims(&self, dns: GroupId) -> impl Iterator<Item = (Addr, Claimant)> {
        let devices = self.addresses.iter().filter(|ip| !self.dns.contains(ip));
        let devices = devices.map(|ip| (Addr::from(*ip), Claimant::OwnNode(Said::Devices)));
        let answers = self.dns.iter();
        devices.chain(answers.map(move |ip| (Addr::from(*ip), Claimant::Dns(dns))))
    }
}
