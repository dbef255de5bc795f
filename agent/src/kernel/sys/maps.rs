//! The rows of a map: one by one, in batches, in a walk.

use std::io;
use std::os::fd::BorrowedFd;

use zerocopy::{Immutable, IntoBytes};

use super::{bpf, number};

const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const MAP_GET_NEXT_KEY: libc::c_long = 4;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const MAP_UPDATE_BATCH: libc::c_long = 26;
/// `BPF_NOEXIST`.
const NOEXIST: u64 = 1;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Elem {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

/// Reads one row of a map whose value has `value.len()` bytes (for a per-CPU map: times the possible
/// CPUs, each rounded up to 8).
pub(crate) fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<()> {
    let mut elem = Elem {
        map: number(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    bpf(MAP_LOOKUP_ELEM, &mut elem).map(drop)
}

/// Writes one row.
pub(crate) fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut elem = Elem {
        map: number(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        flags: 0,
    };
    bpf(MAP_UPDATE_ELEM, &mut elem).map(drop)
}

/// Writes one row, if there is none of that key.
pub(crate) fn insert(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut elem = Elem {
        map: number(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        flags: NOEXIST,
    };
    bpf(MAP_UPDATE_ELEM, &mut elem).map(drop)
}

/// Removes one row.
pub(crate) fn delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<()> {
    let mut elem = Elem {
        map: number(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: 0,
        flags: 0,
    };
    bpf(MAP_DELETE_ELEM, &mut elem).map(drop)
}

/// Writes `count` rows whose keys and values stand one behind the other. The error carries how many
/// were written before the one that failed.
pub(crate) fn update_batch(
    map: BorrowedFd<'_>,
    keys: &[u8],
    values: &[u8],
    count: u32,
) -> Result<(), (u32, io::Error)> {
    let mut batch = Batch {
        from: 0,
        to: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count,
        map: number(map),
        elem_flags: 0,
        flags: 0,
    };
    // The kernel writes back how many rows it did, unless it fails before the first: then the count is
    // as it was.
    bpf(MAP_UPDATE_BATCH, &mut batch)
        .map(drop)
        .map_err(|error| (if batch.count < count { batch.count } else { 0 }, error))
}

/// Where a walk over a map stands.
#[derive(Debug)]
pub(crate) struct Cursor {
    at: Vec<u8>,
    next: Vec<u8>,
    started: bool,
}

impl Cursor {
    /// At the start of a map with keys of this size.
    pub(crate) fn new(key_size: usize) -> Self {
        // A hash keeps a bucket number of 4 bytes here, other maps a key.
        let size = key_size.max(4);
        Self {
            at: vec![0; size],
            next: vec![0; size],
            started: false,
        }
    }
}

/// Reads the next rows into `keys` and `values`, which have room for `count`. Returns how many there
/// were, and whether the walk is over. ENOSPC when a bucket of a hash holds more; the walk stays where it
/// is then.
pub(crate) fn lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> io::Result<(u32, bool)> {
    let mut batch = Batch {
        from: if cursor.started {
            cursor.at.as_ptr() as u64
        } else {
            0
        },
        to: cursor.next.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map: number(map),
        elem_flags: 0,
        flags: 0,
    };
    let is_over = match bpf(MAP_LOOKUP_BATCH, &mut batch) {
        Ok(_) => false,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    cursor.started = true;
    std::mem::swap(&mut cursor.at, &mut cursor.next);
    Ok((batch.count, is_over))
}

/// Puts the key behind this one, or the first, into `next`. False at the end.
pub(crate) fn next_key(
    map: BorrowedFd<'_>,
    key: Option<&[u8]>,
    next: &mut [u8],
) -> io::Result<bool> {
    let mut elem = Elem {
        map: number(map),
        pad: 0,
        key: key.map_or(0, |key| key.as_ptr() as u64),
        value: next.as_mut_ptr() as u64,
        flags: 0,
    };
    match bpf(MAP_GET_NEXT_KEY, &mut elem) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}
