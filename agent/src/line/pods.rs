//! The pods of this node: from a lease whose device is there to packets that are judged, and back. What the
//! plugin is told, and addresses, are `pods`'.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::oneshot;
use tracing::info;
use weir_common::device::{Device as DeviceRow, LocalPod};
use weir_common::{Addr, Mac};

use super::Line;
use super::inputs::{Inputs, name_of};
use super::machine::Machine;
use crate::apply::{Devices, PodLease, Status};
use crate::conditions::{About, Condition, PodFault};
use crate::config::PodCidrs;
use crate::model::ObjectName;
use crate::pods::{Attachment, Lease, LeaseTable};

/// What became of an ADD or a DEL, for whoever waits for it.
type Answer = oneshot::Sender<Result<(), String>>;

/// The state of this node's pods.
#[derive(Debug)]
pub(super) struct Pods<M: Machine> {
    pub(super) devices: Devices<M::Table<u32, DeviceRow>, M::Table<Addr, LocalPod>>,
    /// Attachments that have rows, or get them at this pass.
    pub(super) open: BTreeMap<Attachment, Arc<Lease>>,
    /// Those whose ADD is not answered yet.
    waiting: BTreeMap<Attachment, Waiting>,
    closing: Vec<(Arc<Lease>, Answer)>,
    /// Those whose device is gone.
    gone: BTreeSet<Attachment>,
    /// Addresses whose flows are still to be forgotten.
    pub(super) closed: BTreeSet<Addr>,
    pub(super) are_resumed: bool,
}

#[derive(Debug)]
struct Waiting {
    lease: Arc<Lease>,
    opened: Answer,
}

impl<M: Machine> Pods<M> {
    pub(super) fn resume(
        devices: Devices<M::Table<u32, DeviceRow>, M::Table<Addr, LocalPod>>,
    ) -> Self {
        Self {
            devices,
            open: BTreeMap::new(),
            waiting: BTreeMap::new(),
            closing: Vec::new(),
            gone: BTreeSet::new(),
            closed: BTreeSet::new(),
            are_resumed: false,
        }
    }

    /// Devices of attachments that have rows, by name and interface index; not those that are gone.
    pub(super) fn devices_of_open(&self) -> Vec<(String, u32)> {
        let open = self.open.values();
        let open = open.filter(|lease| !self.gone.contains(&lease.attachment));
        open.filter_map(|lease| Some((lease.device(), lease.devices()?.host_ifindex)))
            .collect()
    }

    /// Whose device it is.
    pub(super) fn of_device(&self, device: &str) -> Option<Arc<Lease>> {
        let mut open = self.open.values();
        open.find(|lease| lease.device() == device).cloned()
    }

    /// The devices of these are gone: somebody inside has deleted them, or their namespaces have ended.
    pub(super) fn lost(&mut self, attachments: BTreeSet<Attachment>) {
        self.gone.extend(attachments);
    }

    /// How far a pod is.
    pub(super) fn status(&self, lease: &Lease) -> Option<&Status> {
        self.devices.status(lease.devices()?.host_ifindex)
    }

    /// A lease has the rules of its very pod. One of an earlier pod of the same name keeps what it holds.
    pub(super) fn desire(&mut self, inputs: &Inputs) {
        let pod = |lease: &Lease| match lease.pod.is_none() || inputs.pod_of(lease).is_some() {
            true => subject(lease),
            false => ObjectName::cluster(lease.attachment.to_string()),
        };
        let open = self.open.values();
        let leases: Vec<_> = open.filter_map(|it| pod_lease(it, pod(it))).collect();
        self.devices.desire_leases(leases);
    }
}

impl<M: Machine> Line<M> {
    /// The attachments that an earlier agent opened.
    pub(super) fn resume_pods(&mut self, leases: Vec<Arc<Lease>>) {
        for lease in leases {
            if lease.devices().is_some() {
                self.remember(lease);
            }
        }
        self.pods.are_resumed = true;
        self.pods.desire(&self.inputs);
    }

    /// An ADD: its rows come once its pod is known.
    pub(super) fn take_lease(&mut self, lease: Arc<Lease>, opened: Answer) {
        if opened.is_closed() {
            // Its release may have come before, and another ADD.
            return;
        }
        let attachment = lease.attachment.clone();
        self.pods
            .waiting
            .insert(attachment, Waiting { lease, opened });
    }

    /// The first half of every waiting ADD: who is known gets rows, which this pass compiles.
    pub(super) fn admit_pods(&mut self) {
        if !self.is_complete {
            return;
        }
        let pods = &mut self.pods;
        // Who has stopped waiting takes back what was done, by a release.
        pods.waiting.retain(|_, it| !it.opened.is_closed());
        let inputs = &self.inputs;
        let is_new = |it: &&Waiting| !pods.open.contains_key(&it.lease.attachment);
        // What an administrator denies may hang on the labels of its Namespace.
        let snapshot = inputs.snapshot();
        let mut tiers = snapshot.cluster_policies.values();
        let has_tiers = tiers.any(|it| !it.is_audit);
        let is_placed = |namespace: &str| !has_tiers || snapshot.namespaces.contains_key(namespace);
        let is_known = |it: &&Waiting| match &it.lease.pod {
            None => true,
            Some(pod) => inputs.pod_of(&it.lease).is_some() && is_placed(&pod.namespace),
        };
        let waiting = pods.waiting.values().filter(is_new).filter(is_known);
        let admitted: Vec<Arc<Lease>> = waiting.map(|it| it.lease.clone()).collect();
        if admitted.is_empty() {
            return;
        }
        for lease in admitted {
            self.remember(lease);
        }
        self.pods.desire(&self.inputs);
        self.inputs.mark_policy();
    }

    /// The second half: whose packets are judged by now is told so.
    pub(super) fn answer_pods(&mut self) {
        let pods = &mut self.pods;
        let waiting = std::mem::take(&mut pods.waiting);
        for (attachment, it) in waiting {
            let answer = match (pods.open.get(&attachment), pods.status(&it.lease)) {
                (Some(_), Some(Status::Done)) => Ok(()),
                (Some(_), Some(Status::Failed(why))) => Err(why.clone()),
                _ => {
                    pods.waiting.insert(attachment, it);
                    continue;
                }
            };
            let is_open = answer.is_ok();
            // An ADD that ran out of time has stopped listening: then nobody is told.
            it.opened.send(answer).unwrap_or_default();
            // Written when nobody waits any more.
            if is_open {
                let (pod, device) = (subject(&it.lease), it.lease.device());
                info!(%pod, device, addresses = ?it.lease.addresses, "opened");
            }
        }
        let closing = std::mem::take(&mut pods.closing);
        if closing.is_empty() {
            return;
        }
        pods.devices.write();
        for (lease, closed) in closing {
            let addresses = lease.addresses.iter().map(|ip| Addr::from(*ip));
            let ifindex = lease.devices().map(|devices| devices.host_ifindex);
            let answer = match ifindex.is_none_or(|index| pods.devices.is_gone(index, addresses)) {
                true => Ok(()),
                false => Err(format!("rows of {} could not be removed", subject(&lease))),
            };
            closed.send(answer).unwrap_or_default();
        }
    }

    /// When it is answered no packet passes the device and no table names its addresses.
    pub(super) fn take_release(&mut self, lease: Arc<Lease>, closed: Answer) {
        let pods = &mut self.pods;
        pods.waiting.remove(&lease.attachment);
        pods.gone.remove(&lease.attachment);
        if pods.open.remove(&lease.attachment).is_some() {
            info!(pod = %subject(&lease), device = lease.device(), "closed");
        }
        if let Some(devices) = lease.devices() {
            self.inputs.names().device_is_gone(devices.host_ifindex);
        }
        if let Some(pod) = &lease.pod {
            self.inputs.release(pod, &lease.attachment);
        }
        let addresses = lease.addresses.iter().map(|ip| Addr::from(*ip));
        pods.closed.extend(addresses);
        if !pods.are_resumed {
            // Rows of all pods are still those of the agent before; they are settled together.
            closed.send(Ok(())).unwrap_or_default();
            return;
        }
        pods.desire(&self.inputs);
        pods.closing.push((lease, closed));
        self.inputs.mark_policy();
    }

    /// Compares attachments with the devices that exist. Answers with those that have no device and no pod any
    /// more: their DEL never came.
    pub(super) fn audit_pods(
        &mut self,
        leases: &LeaseTable,
        devices: &BTreeMap<String, u32>,
    ) -> Vec<Attachment> {
        let is_there = |lease: &&Arc<Lease>| {
            let ifindex = lease.devices().map(|devices| devices.host_ifindex);
            ifindex.is_some_and(|ifindex| devices.get(&lease.device()) == Some(&ifindex))
        };
        let open = self.pods.open.values();
        // One that was given its device since then has it, although it is not listed.
        let had_device = |lease: &&Arc<Lease>| {
            let then = leases.get(&lease.attachment);
            then.is_some_and(|then| then.devices().is_some())
        };
        let open = open.filter(had_device);
        let gone: Vec<Arc<Lease>> = open.filter(|lease| !is_there(lease)).cloned().collect();
        self.pods.gone = gone.iter().map(|it| it.attachment.clone()).collect();
        let is_said = self.is_complete && self.stale_for().is_none();
        let is_needed =
            |lease: &&Arc<Lease>| lease.pod.is_none() || self.inputs.pod_of(lease).is_some();
        let orphans = gone.iter().filter(|lease| is_said && !is_needed(lease));
        orphans.map(|lease| lease.attachment.clone()).collect()
    }

    /// What is wrong with this node's pods, each by itself.
    pub(super) fn report_pods(&self) {
        let pods = &self.pods;
        let mut found: BTreeMap<About, Condition> = BTreeMap::new();
        let mut say = |lease: &Lease, fault, text: String| {
            let condition = Condition::pod(subject(lease), fault, text);
            found.entry(condition.about.clone()).or_insert(condition);
        };
        let ranges = self.inputs.ranges();
        let judges_ranges = !ranges.is_empty() && self.settings.pod_cidrs == PodCidrs::OfNode;
        let is_outside = |ip: &IpAddr| !ranges.iter().any(|range| range.contains(ip));
        for lease in pods.open.values() {
            if let Some(Status::Failed(why)) = pods.status(lease) {
                say(lease, PodFault::NotWritten, why.clone());
            }
            if pods.gone.contains(&lease.attachment) {
                let text = format!("its device {} is gone", lease.device());
                say(lease, PodFault::DeviceGone, text);
            }
            if judges_ranges && let Some(ip) = lease.addresses.iter().find(|ip| is_outside(ip)) {
                let text = format!("its address {ip} is outside of this node's pod CIDRs");
                say(lease, PodFault::OutsideRange, text);
            }
        }
        self.said.pods.replace(found.into_values());
    }

    fn remember(&mut self, lease: Arc<Lease>) {
        self.inputs.lease(lease.clone());
        if let Some(devices) = lease.devices() {
            let names = self.inputs.names();
            names.device_is(devices.host_ifindex, lease.device());
        }
        self.pods.open.insert(lease.attachment.clone(), lease);
    }
}

/// Whose attachment it is: a pod's, or a container's by itself.
pub(super) fn subject(lease: &Lease) -> ObjectName {
    match &lease.pod {
        Some(pod) => name_of(pod),
        None => ObjectName::cluster(lease.attachment.to_string()),
    }
}

fn pod_lease(lease: &Lease, pod: ObjectName) -> Option<PodLease> {
    let devices = lease.devices()?;
    let v4 = lease.addresses.iter().find_map(|ip| match ip {
        IpAddr::V4(v4) => Some(*v4),
        IpAddr::V6(_) => None,
    });
    let v6 = lease.addresses.iter().find_map(|ip| match ip {
        IpAddr::V6(v6) => Some(*v6),
        IpAddr::V4(_) => None,
    });
    Some(PodLease {
        pod,
        ifindex: devices.host_ifindex,
        ipv4: v4,
        ipv6: v6,
        mac: Mac(devices.pod_mac.0),
    })
}
