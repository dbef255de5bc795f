//! The node, as the server of the CNI plugin sees it: what is quick is done by the kernel at once, and what tables
//! are needed for goes in at the beginning of the line.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Error, Result};

use crate::conditions::Board;
use crate::kernel::{Kernel, netlink};
use crate::line::{Handle, Input};
use crate::model::ObjectName;
use crate::pods::{Attachment, Datapath, Device, Devices, Lease, LeaseTable};
use crate::watch::manifests::PodAddresses;

/// The node.
#[derive(Clone, Debug)]
pub(super) struct NodeDatapath {
    pub(super) kernel: Arc<Kernel>,
    pub(super) line: Handle,
    pub(super) board: Arc<Board>,
    /// With the manifests source: who hears of this node's addresses.
    pub(super) addresses: Option<PodAddresses>,
}

impl Datapath for NodeDatapath {
    fn ready(&self) -> Result<(), String> {
        match self.board.node().stops_pods.first() {
            None => Ok(()),
            Some(condition) => Err(condition.to_string()),
        }
    }

    fn protect(&self, device: &str, devices: Devices) -> Result<()> {
        self.kernel.join(device, devices.host_ifindex)
    }

    async fn open(&self, lease: &Arc<Lease>) -> Result<()> {
        let lease = lease.clone();
        let opened = self.line.ask(|opened| Input::Leased { lease, opened });
        opened.await?.map_err(Error::msg)
    }

    fn opened(&self, lease: &Lease) {
        report(self.addresses.as_ref(), lease);
    }

    async fn close(&self, lease: &Arc<Lease>) -> Result<()> {
        if let (Some(addresses), Some(pod)) = (&self.addresses, &lease.pod) {
            addresses.remove(&ObjectName::new(pod.namespace.as_str(), pod.name.as_str()));
        }
        let lease = lease.clone();
        let closed = self.line.ask(|closed| Input::Released { lease, closed });
        closed.await?.map_err(Error::msg)
    }

    async fn delete_device(&self, name: &str) -> Result<()> {
        netlink::delete_device(name).await
    }

    async fn devices(&self) -> Result<Vec<Device>> {
        netlink::pod_devices().await
    }

    fn device(&self, name: &str) -> Result<Option<u32>> {
        Ok(netlink::device_index(name)?)
    }

    async fn orphans(
        &self,
        leases: Arc<LeaseTable>,
        devices: BTreeMap<String, u32>,
    ) -> Result<Vec<Attachment>> {
        let orphans = self.line.ask(|orphans| Input::Devices {
            leases,
            devices,
            orphans,
        });
        Ok(orphans.await?)
    }
}

/// Tells the manifests source which addresses a pod of this node has.
pub(super) fn report(addresses: Option<&PodAddresses>, lease: &Lease) {
    if let (Some(addresses), Some(pod)) = (addresses, &lease.pod) {
        let name = ObjectName::new(pod.namespace.as_str(), pod.name.as_str());
        addresses.report(name, lease.addresses.clone());
    }
}
