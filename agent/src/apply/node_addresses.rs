//! Whose addresses are nodes': rows of `NODES`. Which they are is the compiler's.

use std::collections::BTreeMap;

use weir_common::Addr;
use weir_common::service::NodeAddress;

use super::status::{Deletes, Fill, Status};
use super::table::{Comparison, KernelTable, Table, TableError};

/// The addresses of all nodes.
#[derive(Debug)]
pub struct NodeAddresses<T> {
    table: Table<Addr, NodeAddress, T>,
    deletes: Deletes,
    status: Status,
}

impl<T: KernelTable<Addr, NodeAddress>> NodeAddresses<T> {
    /// Starts from what the kernel holds.
    ///
    /// # Errors
    /// The table could not be read.
    pub fn resume(table: T) -> Result<Self, TableError> {
        Ok(Self {
            table: Table::resume("NODES", table)?,
            deletes: Deletes::Held,
            status: Status::Done,
        })
    }

    /// Every input has been synced: a node that nobody has named is gone.
    pub fn allow_deletes(&mut self) {
        self.deletes = Deletes::Allowed;
    }

    /// Exactly these addresses are nodes'. Writes the difference.
    pub fn apply(&mut self, rows: BTreeMap<Addr, NodeAddress>) {
        self.table.desire_exactly(rows);
        self.tick();
    }

    /// Tries again what failed.
    pub fn tick(&mut self) {
        let written = self.table.write();
        let mut failed = written.failed;
        if self.deletes == Deletes::Allowed {
            failed.extend(self.table.remove_stale().failed);
        }
        self.status = match failed.first() {
            None => Status::Done,
            Some((_, cause)) => Status::Failed(format!("NODES: {} rows: {cause}", failed.len())),
        };
    }

    /// Does the kernel hold every address?
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Reads the table again: how many rows were not as we believed. The next [`Self::tick`] repairs them.
    ///
    /// # Errors
    /// The table could not be read.
    pub fn audit(&mut self) -> Result<usize, TableError> {
        Ok(self.table.audit()?.rows())
    }

    /// Desired against kernel. Changes nothing.
    ///
    /// # Errors
    /// The table could not be read.
    pub fn compare(&mut self) -> Result<(&'static str, Comparison), TableError> {
        Ok((self.table.name(), self.table.compare()?))
    }

    /// How full the table is.
    pub fn fill(&self) -> Fill {
        self.table.fill()
    }
}

#[cfg(test)]
mod tests {
    use weir_common::service::NodeFlags;

    use super::*;
    use crate::apply::fake::FakeTable;

    #[test]
    fn addresses_stay_until_every_input_is_synced() {
        let kernel: FakeTable<Addr, NodeAddress> = FakeTable::empty(8);
        let [a, b] = [Addr::v4([192, 0, 2, 1]), Addr::v4([192, 0, 2, 2])];
        let own = NodeAddress {
            flags: NodeFlags::OWN,
        };
        let both = BTreeMap::from([(a, own), (b, NodeAddress::default())]);
        let mut before = NodeAddresses::resume(kernel.clone()).unwrap();
        before.apply(both.clone());
        assert_eq!(kernel.rows(), both);

        let mut after = NodeAddresses::resume(kernel.clone()).unwrap();
        after.apply(BTreeMap::from([(a, own)]));
        assert_eq!(kernel.rows(), both, "not synced is not empty");
        after.allow_deletes();
        after.tick();
        assert_eq!(kernel.rows(), BTreeMap::from([(a, own)]));
        assert_eq!(*after.status(), Status::Done);
    }
}
