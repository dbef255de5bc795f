//! Everything that is known, and what of it changed since the last compilation. Whose an address is, where
//! cluster and node say different things, is decided here. Pure: changes in, dirty keys out.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::compile::policy::Touched;
use crate::events::Names;
use crate::model::{
    Change, Kind, Namespace, NamespacePhase, Node, Object, ObjectId, ObjectName, Pod, PodNetwork,
    PodPhase, Snapshot,
};
use crate::pods::{Attachment, Lease, PodRef};
use crate::tell::Roster;

/// The snapshot, in which every address is whose it is.
///
/// Addresses of this node's ranges are those of its leases, and a lease is of the pod with its name *and* its
/// uid on this node. What the pod of another node says of itself counts within the ranges of its node.
#[derive(Debug)]
pub struct Inputs {
    node: Arc<str>,
    /// What addresses of this node's pods are leased from.
    ranges: Vec<IpNet>,
    snapshot: Snapshot,
    /// Pods as the source has said them, where the snapshot has other addresses.
    said: HashMap<ObjectName, Arc<Pod>>,
    /// This node's leases; the last of a pod is the one that counts.
    leases: BTreeMap<ObjectName, Vec<Arc<Lease>>>,
    /// How many pods each namespace has.
    pods_of: HashMap<Arc<str>, usize>,
    /// Namespaces that the source says are gone, and whose pods are not.
    leaving: BTreeSet<Arc<str>>,
    quarantined: BTreeMap<String, String>,
    dirty: Dirty,
    names: Names,
    roster: Roster,
}

/// What has to be compiled again.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Dirty {
    /// Services whose own object or slices changed, or went.
    pub services: BTreeSet<ObjectName>,
    /// Pods of this node that changed, or went.
    pub pods: BTreeSet<ObjectName>,
    /// Policy has to be looked at again, although nothing was touched.
    pub policy: bool,
    /// What policy looks at.
    pub touched: Touched,
    /// Namespaces that appeared or went.
    pub namespaces: BTreeSet<Arc<str>>,
    /// A Node, an address or a range of this one, or whether all of them have been said.
    pub nodes: bool,
    /// Objects that are quarantined now, or no longer.
    pub quarantined: BTreeSet<String>,
}

impl Inputs {
    /// Of the node of this name. `names` and `roster` are kept as objects change.
    pub fn new(node: Arc<str>, names: Names, roster: Roster) -> Self {
        Self {
            node,
            ranges: Vec::new(),
            snapshot: Snapshot::default(),
            said: HashMap::new(),
            leases: BTreeMap::new(),
            pods_of: HashMap::new(),
            leaving: BTreeSet::new(),
            quarantined: BTreeMap::new(),
            dirty: Dirty::default(),
            names,
            roster,
        }
    }

    /// Takes a change in.
    pub fn take(&mut self, change: Change) {
        match change {
            Change::Applied(Object::Pod(pod)) => self.take_pod(pod),
            Change::Applied(Object::Node(node)) => self.take_node(node),
            Change::Applied(object) => {
                if let Object::Namespace(namespace) = &object {
                    self.leaving.remove(&namespace.name);
                }
                self.put(object);
            }
            Change::Deleted(id) if id.kind == Kind::Namespace => self.let_go(&id),
            Change::Deleted(id) => {
                if id.kind == Kind::Pod {
                    self.said.remove(&id.name);
                }
                self.remove(&id);
                let namespace = &id.name.namespace;
                if !self.pods_of.contains_key(namespace) && self.leaving.remove(namespace) {
                    self.remove(&namespace_id(namespace));
                }
            }
            Change::Synced(kind) => {
                self.snapshot.mark_synced(kind);
                if kind == Kind::Node {
                    self.dirty.nodes = true;
                    // Until here a pod's node may have been unknown.
                    self.admit_again(|_| true);
                }
            }
            Change::Quarantined { object, reason } => {
                self.dirty.quarantined.insert(object.clone());
                self.quarantined.insert(object, reason);
            }
            Change::Released { object } => {
                self.quarantined.remove(&object);
                self.dirty.quarantined.insert(object);
            }
        }
    }

    /// An attachment of this node has these addresses from now on.
    pub fn lease(&mut self, lease: Arc<Lease>) {
        let Some(pod) = lease.pod.as_ref().map(name_of) else {
            return;
        };
        let leases = self.leases.entry(pod.clone()).or_default();
        leases.retain(|other| other.attachment != lease.attachment);
        leases.push(lease);
        self.admit_one(&pod);
    }

    /// It has them no longer: the pod is what the cluster says it is.
    pub fn release(&mut self, pod: &PodRef, attachment: &Attachment) {
        let pod = name_of(pod);
        let Some(leases) = self.leases.get_mut(&pod) else {
            return;
        };
        leases.retain(|lease| lease.attachment != *attachment);
        if leases.is_empty() {
            self.leases.remove(&pod);
        }
        self.admit_one(&pod);
    }

    /// What addresses of this node's pods are leased from.
    pub fn know_ranges(&mut self, ranges: Vec<IpNet>) {
        if ranges != self.ranges {
            self.ranges = ranges;
            self.dirty.nodes = true;
            self.admit_again(|_| true);
        }
    }

    /// The same.
    pub fn ranges(&self) -> &[IpNet] {
        &self.ranges
    }

    /// All that is known.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The pod of a lease, if the cluster knows it on this node.
    pub fn pod_of(&self, lease: &Lease) -> Option<&Pod> {
        let pod = lease.pod.as_ref()?;
        let known = self.snapshot.pods.get(&name_of(pod))?;
        self.is_of(lease, known).then_some(&**known)
    }

    /// Why an object is quarantined, if it is.
    pub fn quarantined(&self) -> &BTreeMap<String, String> {
        &self.quarantined
    }

    /// Who has which address.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// What changed since the last call.
    pub fn take_dirty(&mut self) -> Dirty {
        std::mem::take(&mut self.dirty)
    }

    /// Policy has to be compiled again, although nothing has changed that it looks at.
    pub fn mark_policy(&mut self) {
        self.dirty.policy = true;
    }

    /// This node's own addresses changed.
    pub fn mark_own_addresses(&mut self) {
        self.dirty.policy = true;
        self.dirty.nodes = true;
    }

    fn take_pod(&mut self, said: Arc<Pod>) {
        let addresses = self.admitted(&said);
        if addresses == said.addresses {
            self.said.remove(&said.id);
            self.put(Object::Pod(said));
            return;
        }
        let admitted = Arc::new(Pod {
            addresses,
            ..(*said).clone()
        });
        self.said.insert(said.id.clone(), said);
        self.put(Object::Pod(admitted));
    }

    fn take_node(&mut self, node: Arc<Node>) {
        let ranges = |node: &Arc<Node>| node.pod_cidrs.clone();
        let before = self.snapshot.nodes.get(&node.name).map(ranges);
        let has_new_ranges = before.unwrap_or_default() != node.pod_cidrs;
        let name = node.name.clone();
        self.put(Object::Node(node));
        let are_nodes_said = self.snapshot.missing().all(|kind| kind != Kind::Node);
        if has_new_ranges && are_nodes_said {
            let is_without = |inputs: &Self, pod: &Pod| inputs.ranges_of(pod).is_empty();
            let moved = |inputs: &Self, pod: &Pod| {
                pod.node.as_ref() == Some(&name) || is_without(inputs, pod)
            };
            let pods = self.snapshot.pods.values();
            let pods: Vec<_> = pods
                .filter(|pod| moved(self, pod))
                .map(|pod| pod.id.clone())
                .collect();
            for pod in pods {
                self.admit_one(&pod);
            }
        }
    }

    fn admit_again(&mut self, which: impl Fn(&Pod) -> bool) {
        let pods = self.snapshot.pods.values().filter(|pod| which(pod));
        let pods: Vec<ObjectName> = pods.map(|pod| pod.id.clone()).collect();
        for pod in pods {
            self.admit_one(&pod);
        }
    }

    /// Decides again which addresses a pod has.
    fn admit_one(&mut self, pod: &ObjectName) {
        let said = self.said.get(pod).or_else(|| self.snapshot.pods.get(pod));
        if let Some(said) = said.cloned() {
            self.take_pod(said);
        }
    }

    /// The addresses that a pod has, of those that it says.
    fn admitted(&self, pod: &Pod) -> Vec<IpAddr> {
        if pod.phase == PodPhase::Finished {
            return pod.addresses.clone();
        }
        let is_leased_here = |ip: &IpAddr| contains(&self.ranges, ip);
        let is_anothers = |ip: &IpAddr| {
            let mut nodes = self.snapshot.nodes.values();
            is_leased_here(ip) || nodes.any(|node| contains(&node.pod_cidrs, ip))
        };
        if pod.network == PodNetwork::Own && pod.node.as_ref() == Some(&self.node) {
            let leases = self.leases.get(&pod.id).into_iter().flatten();
            if let Some(lease) = leases.rev().find(|lease| self.is_of(lease, pod)) {
                return lease.addresses.clone();
            }
            // A pod of this node that has no lease has none of our addresses; another plugin may have
            // given it one, but none of another node's pods.
            return except(&pod.addresses, is_anothers);
        }
        let ranges = self.ranges_of(pod);
        if pod.network == PodNetwork::Own && !ranges.is_empty() {
            return except(&pod.addresses, |ip| {
                !contains(ranges, ip) || is_leased_here(ip)
            });
        }
        // Nobody has said where these belong: only not to another node's pods.
        except(&pod.addresses, is_anothers)
    }

    /// The ranges of the node that a pod is on; none if they are not known.
    fn ranges_of(&self, pod: &Pod) -> &[IpNet] {
        let node = pod
            .node
            .as_ref()
            .and_then(|node| self.snapshot.nodes.get(node));
        node.map_or(&[], |node| &node.pod_cidrs)
    }

    /// Is the lease this very pod's, and not that of an earlier or later one of its name?
    fn is_of(&self, lease: &Lease, pod: &Pod) -> bool {
        let uid = lease.pod.as_ref().and_then(|pod| pod.uid.as_deref());
        pod.node.as_ref() == Some(&self.node) && uid.is_none_or(|uid| pod.is_called(uid))
    }

    /// A namespace goes after its pods. The watches of the two have no common order, and without its labels a policy that
    /// selects by them would let go of pods that are still there.
    fn let_go(&mut self, id: &ObjectId) {
        let namespace = self.snapshot.namespaces.get(&id.name.name);
        let Some(last) = namespace.filter(|it| self.pods_of.contains_key(&it.name)) else {
            self.remove(id);
            return;
        };
        let last = Namespace {
            phase: NamespacePhase::Terminating,
            ..(**last).clone()
        };
        self.leaving.insert(last.name.clone());
        self.put(Object::Namespace(Arc::new(last)));
    }

    fn remove(&mut self, id: &ObjectId) {
        let before = self.snapshot.get(id);
        if self.snapshot.delete(id) {
            self.changed(id, before.as_ref(), None);
        }
    }

    fn count(&mut self, namespace: &Arc<str>, before: Option<&Object>, after: Option<&Object>) {
        match (before, after) {
            (None, Some(_)) => *self.pods_of.entry(namespace.clone()).or_default() += 1,
            (Some(_), None) => {
                let Some(pods) = self.pods_of.get_mut(namespace) else {
                    return;
                };
                *pods -= 1;
                if *pods == 0 {
                    self.pods_of.remove(namespace);
                }
            }
            _ => {}
        }
    }

    fn put(&mut self, object: Object) {
        let id = object.id();
        let before = self.snapshot.get(&id);
        if self.snapshot.apply(object.clone()) {
            self.changed(&id, before.as_ref(), Some(&object));
        }
    }

    fn changed(&mut self, id: &ObjectId, before: Option<&Object>, after: Option<&Object>) {
        self.names.changed(before, after);
        self.roster.changed(before, after);
        if id.kind == Kind::Pod {
            self.count(&id.name.namespace, before, after);
        }
        let dirty = &mut self.dirty;
        let both = || before.into_iter().chain(after);
        match id.kind {
            Kind::Service => {
                dirty.services.insert(id.name.clone());
            }
            Kind::EndpointSlice => {
                dirty.services.extend(both().filter_map(service_of_slice));
            }
            Kind::Pod => {
                let pods = || both().filter_map(pod);
                if pods().any(|pod| pod.node.as_ref() == Some(&self.node)) {
                    dirty.pods.insert(id.name.clone());
                }
                let of_policy = |object| of_policy(object, &self.node);
                let is_touched = match (before.and_then(of_policy), after.and_then(of_policy)) {
                    // One that goes may have been looked at before it lost its addresses.
                    (None, None) => after.is_none(),
                    (Some(before), Some(after)) => !before.policy_facts_equal(after),
                    _ => true,
                };
                if is_touched {
                    dirty.touched.add(id);
                }
            }
            Kind::Node => {
                // Labels of nodes are nothing to anybody here.
                let facts = |object| node_facts(object);
                if before.and_then(facts) != after.and_then(facts) {
                    dirty.nodes = true;
                    dirty.touched.add(id);
                }
            }
            Kind::Namespace => {
                let (before, after) = (before.and_then(namespace), after.and_then(namespace));
                let facts = |it: Option<&Namespace>| {
                    it.map(|it| (it.labels.clone(), it.phase, it.keeps_established))
                };
                if facts(before) != facts(after) {
                    dirty.touched.add(id);
                }
                if before.is_none() || after.is_none() {
                    dirty.namespaces.insert(id.name.name.clone());
                }
            }
            Kind::NetworkPolicy | Kind::ClusterNetworkPolicy => dirty.touched.add(id),
        }
    }
}

/// The name of the pod in our nouns.
pub(super) fn name_of(pod: &PodRef) -> ObjectName {
    ObjectName::new(pod.namespace.as_str(), pod.name.as_str())
}

fn namespace_id(name: &Arc<str>) -> ObjectId {
    ObjectId {
        kind: Kind::Namespace,
        name: ObjectName::cluster(name.clone()),
    }
}

fn contains(ranges: &[IpNet], ip: &IpAddr) -> bool {
    ranges.iter().any(|range| range.contains(ip))
}

fn except(addresses: &[IpAddr], is_out: impl Fn(&IpAddr) -> bool) -> Vec<IpAddr> {
    addresses.iter().filter(|ip| !is_out(ip)).copied().collect()
}

fn pod(object: &Object) -> Option<&Pod> {
    match object {
        Object::Pod(pod) => Some(pod),
        _ => None,
    }
}

fn namespace(object: &Object) -> Option<&Namespace> {
    match object {
        Object::Namespace(namespace) => Some(namespace),
        _ => None,
    }
}

/// What is compiled of a node.
fn node_facts(object: &Object) -> Option<(&[IpAddr], &[IpAddr], &[IpNet])> {
    match object {
        Object::Node(node) => Some((&node.addresses, &node.internal, &node.pod_cidrs)),
        _ => None,
    }
}

fn service_of_slice(object: &Object) -> Option<ObjectName> {
    match object {
        Object::EndpointSlice(slice) => slice.service.clone(),
        _ => None,
    }
}

/// The pod, if policy looks at it: of those elsewhere it does so by their addresses.
fn of_policy<'a>(object: &'a Object, node: &Arc<str>) -> Option<&'a Pod> {
    let pod = pod(object)?;
    let is_here = pod.node.as_ref() == Some(node);
    (is_here || !pod.addresses.is_empty()).then_some(pod)
}
