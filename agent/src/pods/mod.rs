//! The pods of this node: what the CNI plugin asks for, which addresses are whose, and the record of
//! it on disk. What a pod's device needs in the kernel is behind `Datapath`.

mod audit;
mod claims;
mod datapath;
mod frames;
mod lease;
mod leases;
mod pool;
mod releases;
mod server;
mod socket;
mod store;

pub use datapath::{Datapath, Device};
pub use lease::{Devices, Lease, LeaseState};
pub use leases::{LeaseError, LeaseTable, Leases, Places, Ranges};
pub use pool::{Exhausted, InvalidCidr};
pub use server::{Pods, Settings};
pub use socket::listen;
pub use weir_cni::attachment::Attachment;
pub use weir_cni::wire::{Mac, Macs, Pod as PodRef};
