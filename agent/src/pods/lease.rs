//! A lease: which attachment has which addresses, and everything a restarted agent must know about
//! it. The record on disk is this, as JSON.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weir_cni::attachment::Attachment;
use weir_cni::wire::{Devices, Leased, Pod};

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
    pub state: LeaseState,
    /// `/proc/sys/kernel/random/boot_id` when it was leased.
    pub boot_id: String,
    /// Seconds since 1970.
    pub leased_at: u64,
}

/// How far an attachment is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseState {
    /// The addresses are its own; there may be no device yet. An agent that starts takes these back:
    /// the connection that wanted them has ended.
    Leased,
    /// The devices exist.
    Attached(Devices),
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
            LeaseState::Attached(devices) => Some(devices),
        }
    }

    /// What the plugin hears of it.
    pub(super) fn answer(&self, mtu: u32) -> Leased {
        Leased {
            addresses: self.addresses.iter().map(|it| IpNet::from(*it)).collect(),
            mtu,
            device: self.device(),
            devices: self.devices(),
        }
    }
}
