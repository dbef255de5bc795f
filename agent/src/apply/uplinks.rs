//! The tables of the node's uplinks: `UPLINKS` and `CLUSTER`. Programs on devices are not here.

use std::collections::{BTreeMap, BTreeSet};

use weir_common::Prefix;
use weir_common::nat::{InCluster, Uplink};

use super::status::{Deletes, Fill};
use super::table::{Comparison, KernelTable, Table, TableError};

/// Value of every row of `CLUSTER`.
const THERE: InCluster = 1;

/// Both tables.
#[derive(Debug)]
pub struct Uplinks<U, C> {
    uplinks: Table<u32, Uplink, U>,
    cluster: Table<Prefix, InCluster, C>,
}

impl<U, C> Uplinks<U, C>
where
    U: KernelTable<u32, Uplink>,
    C: KernelTable<Prefix, InCluster>,
{
    /// Starts from what the kernel holds.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn resume(uplinks: U, cluster: C) -> Result<Self, TableError> {
        Ok(Self {
            uplinks: Table::resume("UPLINKS", uplinks)?,
            cluster: Table::resume("CLUSTER", cluster)?,
        })
    }

    /// Makes the tables so. What belongs to the cluster is written before an uplink would masquerade it.
    /// Returns the rows that could not be written, in words.
    pub fn apply(
        &mut self,
        uplinks: &BTreeMap<u32, Uplink>,
        cluster: &BTreeSet<Prefix>,
        deletes: Deletes,
    ) -> Vec<String> {
        self.cluster
            .desire_exactly(cluster.iter().map(|key| (*key, THERE)));
        self.uplinks
            .desire_exactly(uplinks.iter().map(|(index, row)| (*index, *row)));
        let words = |name: &'static str| move |error: TableError| format!("{name}: {error}");
        let mut failed = Vec::new();
        let written = self.cluster.write().failed.into_iter();
        failed.extend(written.map(|(_, error)| error).map(words("CLUSTER")));
        let written = self.uplinks.write().failed.into_iter();
        failed.extend(written.map(|(_, error)| error).map(words("UPLINKS")));
        if deletes == Deletes::Allowed {
            let removed = self.uplinks.remove_stale().failed.into_iter();
            failed.extend(removed.map(|(_, error)| error).map(words("UPLINKS")));
            let removed = self.cluster.remove_stale().failed.into_iter();
            failed.extend(removed.map(|(_, error)| error).map(words("CLUSTER")));
        }
        failed
    }

    /// The uplinks that the kernel knows.
    pub fn known(&self) -> BTreeMap<u32, Uplink> {
        self.uplinks
            .all_actual()
            .map(|(index, row)| (*index, *row))
            .collect()
    }

    /// Compares with the kernel, and will write what differs. Returns how many rows do.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn audit(&mut self) -> Result<usize, TableError> {
        Ok(self.uplinks.audit()?.rows() + self.cluster.audit()?.rows())
    }

    /// Desired against kernel, by table. Changes nothing.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn compare(&mut self) -> Result<[(&'static str, Comparison); 2], TableError> {
        Ok([
            (self.uplinks.name(), self.uplinks.compare()?),
            (self.cluster.name(), self.cluster.compare()?),
        ])
    }

    /// How full the two tables are.
    pub fn fills(&self) -> [Fill; 2] {
        [self.uplinks.fill(), self.cluster.fill()]
    }
}
