//! The reconciled table: the one type through which user space fills a map. What the rows mean, and in
//! which order several tables are written, is not here.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;

use super::delta::{Delta, Drift};
use super::status::Fill;

/// A table as the kernel offers it. `kernel` implements it on maps, `fake` in memory.
///
/// An array has a row of every index; one of all zero bytes counts as absent, and removing a row
/// writes zeros.
pub trait KernelTable<K, V> {
    /// Every row.
    fn load(&mut self) -> Result<Vec<(K, V)>, TableError>;

    /// Writes the rows in their order, each of them atomically, and stops at the first that fails.
    fn set(&mut self, rows: &[(K, V)]) -> Result<(), Stopped>;

    /// Removes the rows in their order and stops at the first that fails. One that is not there is no
    /// failure.
    fn remove(&mut self, keys: &[K]) -> Result<(), Stopped>;

    /// Rows that fit.
    fn capacity(&self) -> usize;
}

/// What went wrong with a table.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error("the table is full")]
    Full,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A batch ended early.
#[derive(Debug, thiserror::Error)]
#[error("after {done} rows: {cause}")]
pub struct Stopped {
    /// Rows before this index were done; the one at it failed; those behind it were not tried.
    pub done: usize,
    pub cause: TableError,
}

/// Failures in a row after which the rest of a batch is not tried: a table that refuses this many
/// refuses them all, and each attempt costs a system call.
const PATIENCE: usize = 32;

/// Desired rows, what the kernel holds, and the kernel's table itself.
#[derive(Debug)]
pub struct Table<K, V, T> {
    name: &'static str,
    kernel: T,
    delta: Delta<K, V>,
}

/// Desired against kernel, in rows.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Comparison {
    pub desired: usize,
    pub kernel: usize,
    /// Desired and not there.
    pub missing: usize,
    /// There and not desired.
    pub unexpected: usize,
    /// There with another value.
    pub different: usize,
}

/// What a pass over a table did.
#[derive(Debug)]
pub struct Written<K> {
    /// Rows written or removed.
    pub rows: usize,
    /// Rows that were not, and why. They are tried again at the next pass.
    pub failed: Vec<(K, TableError)>,
}

impl<K> Written<K> {
    /// How many rows were written, and how many were not.
    pub fn counts(&self) -> (usize, usize) {
        (self.rows, self.failed.len())
    }
}

impl<K, V, T> Table<K, V, T>
where
    K: Copy + Ord + Debug,
    V: Copy + PartialEq,
    T: KernelTable<K, V>,
{
    /// Resumes from what the kernel holds: rows that turn out to be desired are not written again.
    pub fn resume(name: &'static str, mut kernel: T) -> Result<Self, TableError> {
        let mut delta = Delta::default();
        delta.observe_all(kernel.load()?);
        Ok(Self {
            name,
            kernel,
            delta,
        })
    }

    /// Its name in the BPF object.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The row should be there.
    pub fn desire(&mut self, key: K, value: V) {
        self.delta.desire(key, value);
    }

    /// No row of this key should be there.
    pub fn withdraw(&mut self, key: &K) {
        self.delta.withdraw(key);
    }

    /// Exactly these rows should be there.
    pub fn desire_exactly(&mut self, rows: impl IntoIterator<Item = (K, V)>) {
        let mut superfluous: std::collections::BTreeSet<K> =
            self.delta.all_desired().map(|(k, _)| *k).collect();
        for (key, value) in rows {
            superfluous.remove(&key);
            self.delta.desire(key, value);
        }
        for key in superfluous {
            self.delta.withdraw(&key);
        }
    }

    /// Writes the rows that the kernel lacks or holds differently.
    pub fn write(&mut self) -> Written<K> {
        let rows = self.delta.to_write();
        let (done, failed) = attempt(&rows, |rest| self.kernel.set(rest));
        for &i in &done {
            let (key, value) = rows[i];
            self.delta.observe(key, Some(value));
        }
        Written {
            rows: done.len(),
            failed: failed.into_iter().map(|(i, e)| (rows[i].0, e)).collect(),
        }
    }

    /// Removes the rows that should not be there.
    pub fn remove_stale(&mut self) -> Written<K> {
        let keys = self.delta.to_remove();
        self.remove_all(keys)
    }

    /// Removes those of these rows that are there and should not be.
    pub fn remove(&mut self, keys: &[K]) -> Written<K> {
        let is_stale =
            |key: &&K| self.delta.desired(key).is_none() && self.delta.actual(key).is_some();
        let keys = keys.iter().filter(is_stale).copied().collect();
        self.remove_all(keys)
    }

    fn remove_all(&mut self, keys: Vec<K>) -> Written<K> {
        let (done, failed) = attempt(&keys, |rest| self.kernel.remove(rest));
        for &i in &done {
            self.delta.observe(keys[i], None);
        }
        Written {
            rows: done.len(),
            failed: failed.into_iter().map(|(i, e)| (keys[i], e)).collect(),
        }
    }

    /// Reads the kernel again. What is not as we believed is put right by the next pass.
    pub fn audit(&mut self) -> Result<Drift, TableError> {
        let rows = self.kernel.load()?;
        Ok(self.delta.observe_all(rows))
    }

    /// What the row of this key should be.
    pub fn desired(&self, key: &K) -> Option<V> {
        self.delta.desired(key)
    }

    /// What the kernel holds under this key, as far as we know.
    pub fn actual(&self, key: &K) -> Option<V> {
        self.delta.actual(key)
    }

    /// Every row that the kernel holds, as far as we know.
    pub fn all_actual(&self) -> impl Iterator<Item = (&K, &V)> {
        self.delta.all_actual()
    }

    /// Every row that should be there.
    pub fn all_desired(&self) -> impl Iterator<Item = (&K, &V)> {
        self.delta.all_desired()
    }

    /// Is the row of this key as it should be?
    pub fn is_settled(&self, key: &K) -> bool {
        self.delta.is_settled(key)
    }

    /// Rows to write, without those to remove.
    pub fn to_write(&self) -> Vec<(K, V)> {
        self.delta.to_write()
    }

    /// Keys of rows that should not be there.
    pub fn to_remove(&self) -> Vec<K> {
        self.delta.to_remove()
    }

    /// How many rows there are at most while the difference is written, additions first.
    pub fn peak_len(&self) -> usize {
        self.delta.peak_len()
    }

    /// Reads the kernel's rows and compares them with those that should be there. Changes nothing.
    ///
    /// # Errors
    /// The table could not be read.
    pub fn compare(&mut self) -> Result<Comparison, TableError> {
        let kernel: BTreeMap<K, V> = self.kernel.load()?.into_iter().collect();
        let mut found = Comparison {
            kernel: kernel.len(),
            ..Comparison::default()
        };
        for (key, value) in self.delta.all_desired() {
            found.desired += 1;
            match kernel.get(key) {
                None => found.missing += 1,
                Some(held) if held != value => found.different += 1,
                Some(_) => {}
            }
        }
        found.unexpected = found.kernel + found.missing - found.desired;
        Ok(found)
    }

    /// How full it is.
    pub fn fill(&self) -> Fill {
        Fill {
            table: self.name,
            rows: self.delta.actual_len(),
            capacity: self.kernel.capacity(),
        }
    }
}

/// Tries every item, batch by batch, going on behind one that fails: indexes of those done, and of
/// those not done with the reason.
fn attempt<I>(
    items: &[I],
    mut batch: impl FnMut(&[I]) -> Result<(), Stopped>,
) -> (Vec<usize>, Vec<(usize, TableError)>) {
    let (mut done, mut failed) = (Vec::with_capacity(items.len()), Vec::new());
    let mut next = 0;
    let mut in_a_row = 0;
    while next < items.len() {
        match batch(&items[next..]) {
            Ok(()) => {
                done.extend(next..items.len());
                break;
            }
            Err(stopped) => {
                // A table that failed without saying where has nothing of the batch for sure.
                let past_the_end = stopped.done >= items.len() - next;
                let at = next + if past_the_end { 0 } else { stopped.done };
                in_a_row = if at == next { in_a_row + 1 } else { 1 };
                done.extend(next..at);
                failed.push((at, stopped.cause));
                next = at + 1;
            }
        }
        if in_a_row == PATIENCE {
            failed.extend((next..items.len()).map(|i| (i, given_up())));
            break;
        }
    }
    (done, failed)
}

fn given_up() -> TableError {
    TableError::Io(io::Error::other(
        "not tried: the kernel refused the rows before it",
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::fake::{FakeTable, FaultyTable};
    use super::{Comparison, Drift, Table, TableError};

    fn table(fake: &FakeTable<u32, u32>) -> Table<u32, u32, FakeTable<u32, u32>> {
        Table::resume("T", fake.clone()).unwrap()
    }

    #[test]
    fn a_comparison_counts_each_difference_once() {
        let fake = FakeTable::empty(8);
        let mut table = table(&fake);
        table.desire_exactly([(1, 1), (2, 2), (3, 3)]);
        table.write();
        fake.tamper(|rows| {
            rows.remove(&1);
            rows.insert(2, 20);
            rows.insert(9, 9);
        });
        let expected = Comparison {
            desired: 3,
            kernel: 3,
            missing: 1,
            unexpected: 1,
            different: 1,
        };
        assert_eq!(table.compare().unwrap(), expected);
    }

    #[test]
    fn a_resumed_table_writes_only_the_difference() {
        let fake = FakeTable::with_rows(8, [(1, 1), (2, 2), (3, 3)]);
        let mut table = table(&fake);
        table.desire_exactly([(1, 1), (2, 20), (4, 4)]);
        assert_eq!(table.write().rows, 2);
        assert_eq!(table.remove_stale().rows, 1);
        assert_eq!(fake.rows(), BTreeMap::from([(1, 1), (2, 20), (4, 4)]));
        assert_eq!(fake.writes(), 3);
    }

    #[test]
    fn a_full_table_keeps_what_it_has_and_names_the_rows_that_lost() {
        let fake = FakeTable::with_rows(2, [(1, 1), (2, 2)]);
        let mut table = table(&fake);
        table.desire_exactly([(1, 10), (2, 2), (3, 3), (4, 4)]);
        let written = table.write();
        assert_eq!(written.rows, 1);
        let lost: Vec<u32> = written.failed.iter().map(|(k, _)| *k).collect();
        assert_eq!(lost, vec![3, 4]);
        assert!(matches!(written.failed[0].1, TableError::Full));
        assert_eq!(fake.rows(), BTreeMap::from([(1, 10), (2, 2)]));
        assert_eq!(table.fill().rows, 2);
    }

    #[test]
    fn a_table_that_refuses_everything_is_not_asked_for_each_row() {
        let fake = FakeTable::with_rows(0, []);
        let mut table = table(&fake);
        table.desire_exactly((0..10_000).map(|k| (k, k)));
        assert_eq!(table.write().failed.len(), 10_000);
        assert!(fake.refusals() <= super::PATIENCE);
    }

    #[test]
    fn an_audit_finds_what_somebody_else_did_and_the_next_pass_repairs_it() {
        let fake = FakeTable::with_rows(8, []);
        let mut table = table(&fake);
        table.desire_exactly([(1, 1), (2, 2)]);
        table.write();
        fake.tamper(|rows| {
            rows.remove(&1);
            rows.insert(2, 9);
            rows.insert(5, 5);
        });
        let drift = Drift {
            missing: 1,
            different: 1,
            unexpected: 1,
        };
        assert_eq!(table.audit().unwrap(), drift);
        table.write();
        table.remove_stale();
        assert_eq!(fake.rows(), BTreeMap::from([(1, 1), (2, 2)]));
        assert!(table.audit().unwrap().is_none());
    }

    /// Fails its first batch as the kernel does when it has not looked at a row yet: the count of rows
    /// comes back as it went in.
    struct FailsFirst(FakeTable<u32, u32>, usize);

    impl super::KernelTable<u32, u32> for FailsFirst {
        fn load(&mut self) -> Result<Vec<(u32, u32)>, TableError> {
            self.0.load()
        }

        fn set(&mut self, rows: &[(u32, u32)]) -> Result<(), super::Stopped> {
            self.1 += 1;
            if self.1 == 1 {
                return Err(super::Stopped {
                    done: rows.len(),
                    cause: TableError::Io(std::io::Error::from_raw_os_error(libc::ENOMEM)),
                });
            }
            self.0.set(rows)
        }

        fn remove(&mut self, keys: &[u32]) -> Result<(), super::Stopped> {
            self.0.remove(keys)
        }

        fn capacity(&self) -> usize {
            self.0.capacity()
        }
    }

    #[test]
    fn rows_of_a_batch_that_never_began_are_not_believed_written() {
        let fake = FakeTable::empty(8);
        let mut table = Table::resume("T", FailsFirst(fake.clone(), 0)).unwrap();
        table.desire_exactly([(1, 1), (2, 2), (3, 3)]);
        assert_eq!(table.write().rows, 2);
        assert!(
            table.audit().unwrap().is_none(),
            "believed to be there and is not"
        );
        table.write();
        assert_eq!(fake.rows(), BTreeMap::from([(1, 1), (2, 2), (3, 3)]));
    }

    proptest! {
        #[test]
        fn it_converges_however_often_the_kernel_fails(
            before in prop::collection::btree_map(0..20u32, 0..4u32, 0..20),
            desired in prop::collection::btree_map(0..20u32, 0..4u32, 0..20),
            every in 2..6usize,
        ) {
            let fake = FakeTable::with_rows(64, before);
            let mut table = Table::resume("T", FaultyTable::new(fake.clone(), every)).unwrap();
            table.desire_exactly(desired.clone());
            for _ in 0..64 {
                table.write();
                table.remove_stale();
            }
            prop_assert_eq!(fake.rows(), desired);
        }
    }
}
