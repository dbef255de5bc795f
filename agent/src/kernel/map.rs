//! Pinned maps as tables of typed rows.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::mapped::{MMAPABLE, MappedRows};
use super::sys::{self, Cursor};
use crate::apply::{KernelTable, Stopped, TableError};

/// Rows that go to the kernel in one call.
const BATCH: usize = 1024;
/// Rows that are read in one call at first. More when a bucket of a hash holds more.
const READ_BATCH: usize = 1024;
/// The kernel's own ENOTSUPP, which libc does not know: this kind of map has no batches.
const ENOTSUPP: i32 = 524;
/// Rows of one bucket that are believed.
const MOST_ROOM: usize = 1 << 20;

/// A map. What is written to it is there for every program at once.
pub struct MapTable<K, V> {
    map: OwnedFd,
    shape: Shape,
    /// Can its rows be read without a call for each?
    is_mapped: bool,
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
            is_mapped: shape == Shape::Array && layout.flags & MMAPABLE != 0,
            capacity: layout.max_entries as usize,
            row: PhantomData,
        })
    }

    /// The rows of an array that are not all zeros. Whoever else writes one meanwhile may leave half of it for the
    /// next reader.
    fn load_mapped(&self) -> Result<Vec<(K, V)>, TableError> {
        let stride = MappedRows::stride(size_of::<V>());
        let mapped = MappedRows::new(self.map.as_fd(), self.capacity, size_of::<V>())?;
        let mut rows = Vec::new();
        let mut row = vec![0u64; stride / 8];
        for index in 0..self.capacity {
            let mut any = 0;
            for (at, word) in row.iter_mut().enumerate() {
                *word = mapped.word(index * (stride / 8) + at).unwrap_or(0);
                any |= *word;
            }
            if any == 0 {
                continue;
            }
            let (key, value) = ((index as u32).to_ne_bytes(), row.as_bytes());
            if let (Ok(key), Ok((value, _))) =
                (K::read_from_bytes(&key), V::read_from_prefix(value))
            {
                rows.push((key, value));
            }
        }
        Ok(rows)
    }

    fn write(&self, keys: &[K], values: &[V]) -> Result<(), Stopped> {
        let mut done = 0;
        while done < keys.len() {
            let end = keys.len().min(done + BATCH);
            let (k, v) = (&keys[done..end], &values[done..end]);
            let count = (end - done) as u32;
            match sys::update_batch(self.map.as_fd(), k.as_bytes(), v.as_bytes(), count) {
                Ok(()) => done = end,
                Err((_, error)) if has_no_batches(&error) => {
                    for (key, value) in k.iter().zip(v) {
                        sys::update(self.map.as_fd(), key.as_bytes(), value.as_bytes()).map_err(
                            |error| Stopped {
                                done,
                                cause: cause(error),
                            },
                        )?;
                        done += 1;
                    }
                }
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
        if self.is_mapped {
            return self.load_mapped();
        }
        let mut rows = Vec::new();
        let is_array = self.shape == Shape::Array;
        for_each(
            self.map.as_fd(),
            size_of::<K>(),
            size_of::<V>(),
            |key, value| {
                if is_array && is_zero(value) {
                    return;
                }
                if let (Ok(key), Ok(value)) = (K::read_from_bytes(key), V::read_from_bytes(value)) {
                    rows.push((key, value));
                }
            },
        )?;
        Ok(rows)
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

fn has_no_batches(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(ENOTSUPP | libc::EOPNOTSUPP))
}

fn is_zero(value: &[u8]) -> bool {
    value.iter().all(|byte| *byte == 0)
}

/// Hands every row of a map to `row`, as bytes that are valid for the call. Rows that come and go
/// meanwhile may be missed or seen twice.
pub(super) fn for_each(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    mut row: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    let mut room = READ_BATCH;
    let mut cursor = Cursor::new(key_size);
    let mut keys = vec![0; key_size * room];
    let mut values = vec![0; value_size * room];
    loop {
        let read = sys::lookup_batch(map, &mut cursor, &mut keys, &mut values, room as u32);
        let (count, is_over) = match read {
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && room < MOST_ROOM => {
                room *= 2;
                keys.resize(key_size * room, 0);
                values.resize(value_size * room, 0);
                continue;
            }
            Err(error) if has_no_batches(&error) => {
                return for_each_key(map, key_size, value_size, row);
            }
            read => read?,
        };
        let keys = keys.chunks_exact(key_size).take(count as usize);
        for (key, value) in keys.zip(values.chunks_exact(value_size)) {
            row(key, value);
        }
        if is_over {
            return Ok(());
        }
    }
}

fn for_each_key(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    mut row: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    let (mut key, mut next) = (None, vec![0; key_size]);
    let mut value = vec![0; value_size];
    while sys::next_key(map, key.as_deref(), &mut next)? {
        match sys::lookup(map, &next, &mut value) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            other => {
                other?;
                row(&next, &value);
            }
        }
        key = Some(next.clone());
    }
    Ok(())
}
