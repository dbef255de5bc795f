//! What Weir puts on a node's disk for the container runtime: the CNI plugin, then the network
//! configuration that makes the runtime call it; and how both go again. Nothing here touches the
//! kernel, and no file that is not ours is renamed or removed. And what else on the node stands in the way of it.

mod file;
mod network;
mod plugin;
mod removal;
pub mod surroundings;

pub use network::{Expected, FILE, Network, Pace, announce, keep_announced};
pub use plugin::{Installed, PLUGIN, install, is_installed, keep_installed, own_plugin};
pub use removal::{Leases, Places, Removed, close, remove};
