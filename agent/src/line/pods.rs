//! The pods' side of the line: what the CNI server needs done for an attachment.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use tokio::sync::oneshot;
use tracing::{info, warn};
use weir_common::{Addr, Mac};

use super::{Handle, Line, Published, Waiting};
use crate::apply::{Outcome, PodLease, PolicyTarget, Status};
use crate::compile::PodRules;
use crate::compile::policy::Compiled;
use crate::kernel::census::State;
use crate::kernel::netlink;
use crate::model::ObjectName;
use crate::pods::{Datapath, Device, Devices, Lease, PodRef};
use crate::watch::manifests::PodAddresses;

/// The kernel, as the CNI server sees it.
#[derive(Clone, Debug)]
pub struct NodeDatapath {
    line: Handle,
    published: Arc<Published>,
    /// With the manifests source: who hears of this node's addresses.
    addresses: Option<PodAddresses>,
}

impl NodeDatapath {
    pub fn new(line: Handle, published: Arc<Published>, addresses: Option<PodAddresses>) -> Self {
        Self {
            line,
            published,
            addresses,
        }
    }
}

/// Is there anything of an earlier agent that may go later?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Left {
    Nothing,
    Something,
}

impl Datapath for NodeDatapath {
    fn ready(&self) -> Result<(), String> {
        match self.published.closed_to_pods.load().first() {
            None => Ok(()),
            Some(reason) => Err(reason.clone()),
        }
    }

    async fn protect(&self, device: &str, devices: Devices) -> Result<()> {
        let device = device.to_owned();
        self.line
            .ask(move |line| line.kernel.join(&device, devices.host_ifindex))
            .await?
    }

    async fn await_policy(&self, lease: &Lease) -> Result<()> {
        let Some(pod) = lease.pod.clone() else {
            return Ok(());
        };
        let (known, heard) = oneshot::channel();
        self.line
            .tell(move |line| {
                line.waiting.push(Waiting { pod, known });
                line.answer_waiting();
            })
            .await?;
        heard.await.context("the agent is going down")
    }

    async fn open(&self, lease: &Lease) -> Result<()> {
        let lease = Arc::new(lease.clone());
        let opened = lease.clone();
        self.line.ask(move |line| line.open_pod(opened)).await??;
        if let (Some(addresses), Some(pod)) = (&self.addresses, &lease.pod) {
            addresses.report(pod_name(pod), lease.addresses.clone());
        }
        Ok(())
    }

    async fn close(&self, lease: &Lease) -> Result<()> {
        let lease = lease.clone();
        if let (Some(addresses), Some(pod)) = (&self.addresses, &lease.pod) {
            addresses.remove(&pod_name(pod));
        }
        self.line.ask(move |line| line.close_pod(&lease)).await?
    }

    async fn delete_device(&self, name: &str) -> Result<()> {
        netlink::delete_device(name).await
    }

    async fn devices(&self) -> Result<Vec<Device>> {
        netlink::pod_devices().await
    }
}

impl Line {
    /// Resumes the attachments that an earlier agent opened. Until it is called no row of a pod is touched.
    pub fn resume_pods(&mut self, leases: impl IntoIterator<Item = Arc<Lease>>) {
        for lease in leases {
            if lease.devices().is_some() {
                self.remember(lease);
            }
        }
        self.are_pods_resumed = true;
        self.desire_leases();
    }

    /// Lets nothing pass the devices that no lease explains: whoever is behind them has no policy.
    pub fn protect_unexplained<'a>(&self, devices: impl IntoIterator<Item = &'a Device>) {
        for Device { name, ifindex, .. } in devices {
            match self.kernel.join(name, *ifindex) {
                Ok(()) => warn!(device = name, "a device of ours without a lease is closed"),
                Err(error) => warn!(
                    device = name,
                    error = format!("{error:#}"),
                    "a device of ours without a lease cannot be closed"
                ),
            }
        }
    }

    /// Removes what an earlier agent left and no longer serves, and says what it found.
    pub fn settle(&self, devices: &[Device]) -> Left {
        let known: Vec<_> = devices
            .iter()
            .map(|device| (device.name.clone(), device.ifindex))
            .collect();
        let found = match self.kernel.census(&known) {
            Ok(found) => found,
            Err(error) => {
                warn!(
                    error = format!("{error:#}"),
                    "what an earlier agent left is not known"
                );
                return Left::Something;
            }
        };
        let (current, others): (Vec<_>, Vec<_>) =
            found.iter().partition(|it| it.state == State::Current);
        info!(found = current.len(), "links and tables are in place");
        let mut left = Left::Nothing;
        for it in others {
            let what = &it.what;
            match it.state {
                State::Stale | State::Stray | State::Unused => match it.remove() {
                    Ok(()) => info!(what, state = ?it.state, "removed"),
                    Err(error) => {
                        warn!(what, state = ?it.state, error = format!("{error:#}"), "cannot be removed")
                    }
                },
                State::InUse => {
                    info!(what, "of another version and still in use, left alone");
                    left = Left::Something;
                }
                State::Unknown => warn!(what, "not ours, left alone"),
                State::Current => {}
            }
        }
        left
    }

    /// The rows of a pod: its device is under our programs already, and closed without them.
    fn open_pod(&mut self, lease: Arc<Lease>) -> Result<()> {
        lease
            .devices()
            .context("a lease without devices cannot be opened")?;
        let name = name_of(&lease);
        self.remember(lease.clone());
        self.desire_leases();
        self.inputs.mark_policy();
        self.pass(Instant::now());
        match self.devices.statuses().get(&name) {
            Some(Status::Done) => {}
            Some(Status::Failed(why)) => bail!("{name}: {why}"),
            Some(Status::Pending) | None => bail!("the policy of {name} is not in the tables yet"),
        }
        info!(pod = %name, device = lease.device(), addresses = ?lease.addresses, "opened");
        Ok(())
    }

    /// When it returns no packet passes the device and no table names its addresses.
    fn close_pod(&mut self, lease: &Lease) -> Result<()> {
        if self.open.remove(&lease.attachment).is_some() {
            info!(pod = %name_of(lease), device = lease.device(), "closed");
        }
        if let Some(pod) = &lease.pod {
            let name = pod_name(pod);
            let is_replaced = self.open.values().any(|other| name_of(other) == name);
            if !is_replaced {
                self.inputs.lease(&name, Vec::new());
            }
        }
        self.closed
            .extend(lease.addresses.iter().map(|ip| Addr::from(*ip)));
        if !self.are_pods_resumed {
            // Rows of all pods are still those of the agent before; they are settled together.
            return Ok(());
        }
        self.desire_leases();
        self.inputs.mark_policy();
        self.pass(Instant::now());
        let left = self.devices.write();
        if left.outcome == Outcome::Unfinished {
            bail!("rows of {} could not be removed", name_of(lease));
        }
        Ok(())
    }

    fn remember(&mut self, lease: Arc<Lease>) {
        if let Some(pod) = &lease.pod {
            self.inputs.lease(&pod_name(pod), lease.addresses.clone());
        }
        self.open.insert(lease.attachment.clone(), lease);
    }

    fn desire_leases(&mut self) {
        let leases: Vec<_> = self
            .open
            .values()
            .filter_map(|lease| pod_lease(lease))
            .collect();
        self.devices.desire_leases(leases);
        self.publish_names();
    }

    /// Tells every ADD whose pod is known by now.
    pub(super) fn answer_waiting(&mut self) {
        if !self.is_complete {
            return;
        }
        let pods = &self.inputs.snapshot().pods;
        let rules = &self.compiled.rows().rules;
        let is_known = |pod: &PodRef| {
            let name = pod_name(pod);
            let is_it =
                |known: &crate::model::Pod| pod.uid.as_deref().is_none_or(|uid| *uid == *known.uid);
            rules.contains_key(&name) && pods.get(&name).is_some_and(|known| is_it(known))
        };
        let (known, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|w| is_known(&w.pod));
        self.waiting = waiting;
        self.waiting.retain(|w| !w.known.is_closed());
        for waited in known {
            // An ADD that ran out of time has stopped listening: then nobody is told.
            waited.known.send(()).unwrap_or_default();
        }
    }

    /// Moves the tables from one compilation to the next, such that every packet on the way is judged as
    /// before or as after (`compile::policy::Transition`).
    pub(super) fn write_policy(&mut self, before: &Compiled, now: Instant) {
        let rows = self.compiled.rows();
        // The first is compiled after nothing, but the kernel holds what an earlier agent compiled.
        let way = match self.is_complete {
            true => self.compiled.transition_from(before),
            false => self.compiled.without_transition(),
        };
        let pods = self.rules_of_pods();
        let is_direct = way.classes == rows.classes;
        let last = PolicyTarget {
            classes: rows.classes.clone(),
            transitional: way
                .verdicts
                .iter()
                .filter(|(key, _)| !rows.verdicts.contains_key(key))
                .map(|(key, row)| (*key, *row))
                .collect(),
            verdicts: rows.verdicts.clone(),
            ports: rows.ports.clone(),
            pods: pods.clone(),
        };
        if !is_direct {
            self.policies.desire(PolicyTarget {
                classes: way.classes,
                verdicts: way.verdicts,
                transitional: BTreeMap::new(),
                ports: way.ports,
                pods,
            });
            if !self.reach(before, now) {
                if self.policy_refused.is_none() {
                    warn!(status = ?self.policies.status(), "a change of policy is half way; it goes on");
                    self.policy_after = Some(last);
                }
                return;
            }
        }
        self.policy_after = None;
        self.policies.desire(last);
        self.reach(before, now);
    }

    /// Writes what policy desires. If it has no room the compilation before stays the one that holds, so
    /// that the next change starts from what the kernel has.
    fn reach(&mut self, before: &Compiled, now: Instant) -> bool {
        let pass = self.policies.reconcile(&mut self.devices, now);
        self.policy_refused = self.policies.abandon_refused();
        if let Some(reason) = &self.policy_refused {
            warn!(reason, "a change of policy is refused");
            self.compiled = before.clone();
        }
        pass.outcome == Outcome::Complete
    }

    /// Is a change of policy half way? Then no other may start.
    pub(super) fn is_policy_half_way(&self) -> bool {
        self.policy_after.is_some()
    }

    /// Goes on with a change of policy, or tries again one that had no room.
    pub(super) fn continue_policy(&mut self, now: Instant) {
        if self.policy_refused.is_some() {
            self.inputs.mark_policy();
        }
        let pass = self.policies.reconcile(&mut self.devices, now);
        if pass.outcome == Outcome::Complete
            && let Some(last) = self.policy_after.take()
        {
            self.policies.desire(last);
            self.policies.reconcile(&mut self.devices, now);
        }
    }

    /// Containers that belong to no pod have no policy.
    fn rules_of_pods(&self) -> BTreeMap<ObjectName, PodRules> {
        let mut rules = self.compiled.rows().rules.clone();
        let others = self.open.values().filter(|lease| lease.pod.is_none());
        rules.extend(others.map(|lease| (name_of(lease), PodRules::default())));
        rules
    }
}

/// The name of the pod in our nouns.
fn pod_name(pod: &PodRef) -> ObjectName {
    ObjectName::new(pod.namespace.as_str(), pod.name.as_str())
}

/// Whose attachment it is: a pod's, or a container's by itself.
pub(super) fn name_of(lease: &Lease) -> ObjectName {
    match &lease.pod {
        Some(pod) => pod_name(pod),
        None => ObjectName::cluster(lease.attachment.to_string()),
    }
}

fn pod_lease(lease: &Lease) -> Option<PodLease> {
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
        pod: name_of(lease),
        ifindex: devices.host_ifindex,
        ipv4: v4,
        ipv6: v6,
        mac: Mac(devices.pod_mac.0),
    })
}
