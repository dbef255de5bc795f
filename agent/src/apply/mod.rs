//! Desired against actual: the one writer of what the agent's tables hold. Knows neither aya nor
//! netlink: a table is anything that implements [`KernelTable`].

mod delta;
pub mod fake;
mod services;
mod status;
mod table;

pub use delta::{Delta, Drift};
pub use services::{GRACE, Pass, ServiceChange, Services};
pub use status::{Deletes, Fill, Status, Statuses};
pub use table::{KernelTable, Stopped, Table, TableError, Written};
