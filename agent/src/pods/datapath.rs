//! What the CNI server needs done in the kernel. `app` implements it with `kernel` and `apply`; tests
//! with a fake.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Result;

use super::{Attachment, Devices, Lease, LeaseTable};

/// A device of the node with a name of ours (`weir_cni::attachment::is_device`).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Device {
    pub name: String,
    pub ifindex: u32,
    /// Host addresses that are routed over it.
    pub addresses: Vec<IpAddr>,
}

/// For one attachment `protect` and `open` come first, beside each other, then `close`, then `delete_device`, one after the
/// other. For different attachments they overlap. After a failure, at the deadline and after a crash of the agent, `close`
/// follows whatever was done, so it must accept a lease of which the kernel knows half or nothing.
pub trait Datapath: Send + Sync + 'static {
    /// Whether an ADD could be served now; if not, why, in words for STATUS.
    fn ready(&self) -> Result<(), String>;

    /// Puts the node's end, which is down, under the programs of all pods, which let nothing pass that no table
    /// names. Called where it may block.
    fn protect(&self, device: &str, devices: Devices) -> Result<()>;

    /// Returns when the pod that the lease names, by its uid if it has one, is known, its policy is in the tables and packets
    /// of its device are judged by it. Who does not wait any longer drops the future; nothing is opened then. A lease without a
    /// pod has no policy to wait for.
    fn open(&self, lease: &Arc<Lease>) -> impl Future<Output = Result<()>> + Send;

    /// The lease's pod is open, and the disk knows of it.
    fn opened(&self, lease: &Lease);

    /// The reverse: when it returns, no packet passes the device and nothing in the tables names its
    /// addresses, so they may be leased again. The device may still exist. It is on the way of DEL:
    /// whatever waits for an RCU grace period belongs in `delete_device`.
    fn close(&self, lease: &Arc<Lease>) -> impl Future<Output = Result<()>> + Send;

    /// Deletes a device of the node, what is attached to it, and its pins. One that does not exist is
    /// no error. Many may be asked for at once; batching them is worth while.
    fn delete_device(&self, name: &str) -> impl Future<Output = Result<()>> + Send;

    /// All devices of the node with a name of ours.
    fn devices(&self) -> impl Future<Output = Result<Vec<Device>>> + Send;

    /// The interface index of a device, if it exists: asked for by name, since a list may lack one (a dump of an old
    /// kernel that is interrupted, an attribute that nobody here can read).
    fn device(&self, name: &str) -> Result<Option<u32>>;

    /// Those of the leases that have neither one of these devices (interface indices by name) nor a pod any more: their
    /// DEL never came. The leases are from before the devices were looked for.
    fn orphans(
        &self,
        leases: Arc<LeaseTable>,
        devices: BTreeMap<String, u32>,
    ) -> impl Future<Output = Result<Vec<Attachment>>> + Send;
}
