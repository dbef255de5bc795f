//! Desired against actual: the one writer of what the agent's tables hold. Knows neither aya nor
//! netlink: a table is anything that implements [`KernelTable`].

mod delta;
mod devices;
pub mod fake;
mod node_addresses;
mod policy;
pub mod routes;
mod services;
mod status;
mod table;
mod uplinks;

pub use delta::{Delta, Drift};
pub use devices::{DevicePass, Devices, Outcome, PodLease};
pub use node_addresses::NodeAddresses;
pub use policy::{Policies, PolicyPass};
pub use services::{Departed, GRACE, Pass, ServiceChange, Services};
pub use status::{Deletes, Fill, Origin, Status, Statuses};
pub use table::{Comparison, KernelTable, Stopped, Table, TableError, Written};
pub use uplinks::Uplinks;
