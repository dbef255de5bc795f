//! Pinned maps as tables of typed rows.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::sys::{self, Cursor};
use crate::apply::{KernelTable, Stopped, TableError};

/// Rows that go to the kernel in one call.
const BATCH: usize = 1024;
/// Rows that are read in one call. A bucket of a hash must fit.
const READ_BATCH: usize = 4096;

/// A map. What is written to it is there for every program at once.
pub struct MapTable<K, V> {
    map: OwnedFd,
    shape: Shape,
    capacity: usize,
    row: PhantomData<fn() -> (K, V)>,
}

/// How absence looks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shape {
    /// A key is there or not: hashes and tries.
    Keyed,
    /// Every index is there, and a row of zeros counts as absent.
    Array,
}

impl<K, V> fmt::Debug for MapTable<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MapTable")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

/// What a row can be: plain bytes.
pub trait Plain: FromBytes + IntoBytes + Immutable + Copy {}
impl<T: FromBytes + IntoBytes + Immutable + Copy> Plain for T {}

impl<K: Plain, V: Plain> MapTable<K, V> {
    /// # Errors
    /// The sizes of key and value are not the map's: writing would be past the end of something.
    pub(super) fn new(map: OwnedFd, shape: Shape) -> io::Result<Self> {
        let layout = sys::map_layout(map.as_fd())?;
        if (layout.key_size as usize, layout.value_size as usize)
            != (size_of::<K>(), size_of::<V>())
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "rows are of {} and {} bytes, the map's of {} and {}",
                    size_of::<K>(),
                    size_of::<V>(),
                    layout.key_size,
                    layout.value_size
                ),
            ));
        }
        Ok(Self {
            map,
            shape,
            capacity: layout.max_entries as usize,
            row: PhantomData,
        })
    }

    fn write(&self, keys: &[K], values: &[V]) -> Result<(), Stopped> {
        let mut done = 0;
        while done < keys.len() {
            let end = keys.len().min(done + BATCH);
            let (k, v) = (&keys[done..end], &values[done..end]);
            let count = (end - done) as u32;
            match sys::update_batch(self.map.as_fd(), k.as_bytes(), v.as_bytes(), count) {
                Ok(()) => done = end,
                Err((written, error)) => {
                    return Err(Stopped {
                        done: done + written as usize,
                        cause: cause(error),
                    });
                }
            }
        }
        Ok(())
    }
}

impl<K: Plain, V: Plain + PartialEq> KernelTable<K, V> for MapTable<K, V> {
    fn load(&mut self) -> Result<Vec<(K, V)>, TableError> {
        // Nearly all rows of an array are absent: they are left out before they cost anything.
        let absent = vec![0; size_of::<V>()];
        let is_there = |value: &[u8]| self.shape == Shape::Keyed || value != absent;
        let all = read_all(self.map.as_fd(), size_of::<K>(), size_of::<V>(), is_there)?;
        let rows = all.into_iter().filter_map(|(key, value)| {
            Some((
                K::read_from_bytes(&key).ok()?,
                V::read_from_bytes(&value).ok()?,
            ))
        });
        Ok(rows.collect())
    }

    fn set(&mut self, rows: &[(K, V)]) -> Result<(), Stopped> {
        let (keys, values): (Vec<K>, Vec<V>) = rows.iter().copied().unzip();
        self.write(&keys, &values)
    }

    fn remove(&mut self, keys: &[K]) -> Result<(), Stopped> {
        if self.shape == Shape::Array {
            let zeros = vec![V::new_zeroed(); keys.len()];
            return self.write(keys, &zeros);
        }
        for (done, key) in keys.iter().enumerate() {
            match sys::delete(self.map.as_fd(), key.as_bytes()) {
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                    return Err(Stopped {
                        done,
                        cause: cause(error),
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn capacity(&self) -> usize {
        self.capacity
    }
}

/// A hash says E2BIG when it is full, a trie ENOSPC, a table without preallocation ENOMEM.
fn cause(error: io::Error) -> TableError {
    match error.raw_os_error() {
        Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM) => TableError::Full,
        _ => TableError::Io(error),
    }
}

/// Every row of a map whose value is wanted, as bytes. Rows that come and go meanwhile may be missed or seen twice; the last
/// value seen is kept.
pub(super) fn read_all(
    map: std::os::fd::BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    is_wanted: impl Fn(&[u8]) -> bool,
) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut rows = BTreeMap::new();
    let mut cursor = Cursor::new(key_size);
    let mut keys = vec![0; key_size * READ_BATCH];
    let mut values = vec![0; value_size * READ_BATCH];
    loop {
        let (count, is_over) =
            sys::lookup_batch(map, &mut cursor, &mut keys, &mut values, READ_BATCH as u32)?;
        let keys = keys.chunks_exact(key_size).take(count as usize);
        let both = keys.zip(values.chunks_exact(value_size));
        for (key, value) in both.filter(|(_, value)| is_wanted(value)) {
            rows.insert(key.to_vec(), value.to_vec());
        }
        if is_over {
            return Ok(rows);
        }
    }
}
