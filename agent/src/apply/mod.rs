//! Desired against actual: the one writer of what the agent's tables hold. Knows neither aya nor
//! netlink: a table is anything that implements [`KernelTable`].

mod delta;
pub mod fake;
mod status;
mod table;

pub use delta::{Delta, Drift};
pub use status::{Deletes, Fill, Status, Statuses};
pub use table::{KernelTable, Stopped, Table, TableError, Written};
