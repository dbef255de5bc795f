//! A lease: which attachment has which addresses, and everything a restarted agent must know about
//! it. The record on disk is this, as JSON.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weir_cni::attachment::Attachment;
use weir_cni::wire::{Leased, Mac, Macs, Pod};

/// The network of one attachment on this node.
#[derive(Clone, Debug, Eq, PartialEq, Deserialize, Serialize)]
pub struct Lease {
    pub attachment: Attachment,
    /// The name of the CNI network configuration it belongs to.
    pub network: String,
    /// The inode of the pod's network namespace.
    pub netns: u64,
    /// The pod, if the runtime named one. Its uid tells it from an earlier pod of the same name.
    pub pod: Option<Pod>,
    /// One address, or one of each family, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Of both ends of its veth pair.
    pub macs: Macs,
    /// Not on disk: an agent that starts learns it from the devices that exist.
    #[serde(skip)]
    pub state: LeaseState,
    /// `/proc/sys/kernel/random/boot_id` when it was leased.
    pub boot_id: String,
    /// Seconds since 1970.
    pub leased_at: u64,
}

/// How far an attachment is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LeaseState {
    /// The addresses are its own; its devices are not known to exist.
    #[default]
    Leased,
    /// Both devices exist; the node's end has this index.
    Attached { host_ifindex: u32 },
}

/// Both ends of a pod's veth pair.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Devices {
    /// The index of the node's end, in the node's namespace.
    pub host_ifindex: u32,
    pub host_mac: Mac,
    pub pod_mac: Mac,
}

impl Lease {
    /// The name of the node's end of the pair.
    pub fn device(&self) -> String {
        self.attachment.device()
    }

    /// Both ends, once they exist.
    pub fn devices(&self) -> Option<Devices> {
        match self.state {
            LeaseState::Leased => None,
            LeaseState::Attached { host_ifindex } => Some(Devices {
                host_ifindex,
                host_mac: self.macs.host,
                pod_mac: self.macs.pod,
            }),
        }
    }

    /// What the plugin hears of it.
    pub(super) fn answer(&self, mtu: u32) -> Leased {
        Leased {
            addresses: self.addresses.iter().map(|it| IpNet::from(*it)).collect(),
            mtu,
            device: self.device(),
            macs: self.macs,
        }
    }
}
