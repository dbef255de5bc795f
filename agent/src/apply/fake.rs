//! Tables in memory, well-behaved and not: what tests put in the place of the kernel.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::table::{KernelTable, Stopped, TableError};

/// A table in memory. Clones share the rows, as two processes share a pinned map.
#[derive(Clone)]
pub struct FakeTable<K, V> {
    inner: Arc<Mutex<Inner<K, V>>>,
}

/// Called after every single write, outside of any lock.
pub type Observer = Arc<dyn Fn() + Send + Sync>;

struct Inner<K, V> {
    rows: BTreeMap<K, V>,
    capacity: usize,
    writes: usize,
    refusals: usize,
    observer: Option<Observer>,
}

impl<K, V> fmt::Debug for FakeTable<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeTable").finish_non_exhaustive()
    }
}

impl<K: Copy + Ord, V: Copy> FakeTable<K, V> {
    /// A table of this capacity with rows in it already.
    pub fn with_rows(capacity: usize, rows: impl IntoIterator<Item = (K, V)>) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                rows: rows.into_iter().collect(),
                capacity,
                writes: 0,
                refusals: 0,
                observer: None,
            })),
        }
    }

    /// An empty table.
    pub fn empty(capacity: usize) -> Self {
        Self::with_rows(capacity, [])
    }

    /// Has `observer` called after every single write.
    pub fn observe(&self, observer: Observer) {
        self.with(|inner| inner.observer = Some(observer));
    }

    /// What it holds.
    pub fn rows(&self) -> BTreeMap<K, V> {
        self.with(|inner| inner.rows.clone())
    }

    /// Single rows written or removed so far.
    pub fn writes(&self) -> usize {
        self.with(|inner| inner.writes)
    }

    /// Times that it was full.
    pub fn refusals(&self) -> usize {
        self.with(|inner| inner.refusals)
    }

    /// What somebody else does to it.
    pub fn tamper(&self, change: impl FnOnce(&mut BTreeMap<K, V>)) {
        self.with(|inner| change(&mut inner.rows));
    }

    fn with<R>(&self, f: impl FnOnce(&mut Inner<K, V>) -> R) -> R {
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn write_one(&self, key: K, value: Option<V>) -> Result<(), TableError> {
        let observer = self.with(|inner| {
            match value {
                Some(value) => {
                    if inner.rows.len() >= inner.capacity && !inner.rows.contains_key(&key) {
                        inner.refusals += 1;
                        return Err(TableError::Full);
                    }
                    inner.rows.insert(key, value);
                }
                None => {
                    inner.rows.remove(&key);
                }
            }
            inner.writes += 1;
            Ok(inner.observer.clone())
        })?;
        if let Some(observer) = observer {
            observer();
        }
        Ok(())
    }
}

impl<K: Copy + Ord, V: Copy> KernelTable<K, V> for FakeTable<K, V> {
    fn load(&mut self) -> Result<Vec<(K, V)>, TableError> {
        Ok(self.rows().into_iter().collect())
    }

    fn set(&mut self, rows: &[(K, V)]) -> Result<(), Stopped> {
        for (done, (key, value)) in rows.iter().enumerate() {
            self.write_one(*key, Some(*value))
                .map_err(|cause| Stopped { done, cause })?;
        }
        Ok(())
    }

    fn remove(&mut self, keys: &[K]) -> Result<(), Stopped> {
        for (done, key) in keys.iter().enumerate() {
            self.write_one(*key, None)
                .map_err(|cause| Stopped { done, cause })?;
        }
        Ok(())
    }

    fn capacity(&self) -> usize {
        self.with(|inner| inner.capacity)
    }
}

/// Fails every n-th single write, and then every write once a limit is set.
#[derive(Clone, Debug)]
pub struct FaultyTable<T> {
    inner: T,
    every: usize,
    fuse: Fuse,
    tried: usize,
}

/// Writes that several tables may still do together before all of them fail: the moment at which a
/// process dies. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Fuse(Arc<Mutex<Option<usize>>>);

impl Fuse {
    /// Burns after this many further writes; `None` never.
    pub fn set(&self, writes: Option<usize>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = writes;
    }

    fn burn(&self) -> bool {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match left.as_mut() {
            None => false,
            Some(0) => true,
            Some(n) => {
                *n -= 1;
                false
            }
        }
    }
}

impl<T> FaultyTable<T> {
    /// Fails every n-th write of `inner`; 0 for none.
    pub fn new(inner: T, every: usize) -> Self {
        Self::with_fuse(inner, every, Fuse::default())
    }

    /// The same, and every write once the fuse has burnt.
    pub fn with_fuse(inner: T, every: usize, fuse: Fuse) -> Self {
        Self {
            inner,
            every,
            fuse,
            tried: 0,
        }
    }

    fn fails(&mut self) -> bool {
        self.tried += 1;
        self.fuse.burn() || (self.every > 0 && self.tried.is_multiple_of(self.every))
    }
}

impl<K: Copy, V: Copy, T: KernelTable<K, V>> KernelTable<K, V> for FaultyTable<T> {
    fn load(&mut self) -> Result<Vec<(K, V)>, TableError> {
        self.inner.load()
    }

    fn set(&mut self, rows: &[(K, V)]) -> Result<(), Stopped> {
        for (done, row) in rows.iter().enumerate() {
            if self.fails() {
                return Err(broken(done));
            }
            self.inner.set(&[*row]).map_err(|s| Stopped { done, ..s })?;
        }
        Ok(())
    }

    fn remove(&mut self, keys: &[K]) -> Result<(), Stopped> {
        for (done, key) in keys.iter().enumerate() {
            if self.fails() {
                return Err(broken(done));
            }
            self.inner
                .remove(&[*key])
                .map_err(|s| Stopped { done, ..s })?;
        }
        Ok(())
    }

    fn capacity(&self) -> usize {
        self.inner.capacity()
    }
}

fn broken(done: usize) -> Stopped {
    Stopped {
        done,
        cause: TableError::Io(io::Error::other("injected")),
    }
}
