//! What each pod of this node holds of the tables of conversations. Programs count while we do, so both
//! add and nobody writes.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use weir_common::share::{self, Share};
use weir_common::{limits, shared};

use super::mapped::MappedRows;

/// Rows of `SHARES`.
#[derive(Debug)]
pub struct Shares {
    rows: MappedRows,
}

/// The words of a row.
const WORDS: usize = size_of::<Share>() / size_of::<shared::AtomicU64>();
const ROWS: usize = std::mem::offset_of!(Share, rows) / size_of::<shared::AtomicU64>();
const REFUSED: usize = std::mem::offset_of!(Share, refused) / size_of::<shared::AtomicU64>();

impl Shares {
    /// # Errors
    /// The kernel refuses to map the table.
    pub(super) fn new(table: &OwnedFd) -> io::Result<Self> {
        let rows =
            MappedRows::writable(table.as_fd(), limits::SHARES as usize, size_of::<Share>())?;
        Ok(Self { rows })
    }

    /// Packets of the pod behind an interface index that were dropped since it had used up its share.
    pub fn refused(&self, ifindex: u32) -> u64 {
        self.rows.word(Self::at(ifindex) + REFUSED).unwrap_or(0)
    }

    /// Rows of `TCP_WAYS` that count for the pod behind an interface index.
    pub fn rows(&self, ifindex: u32) -> i64 {
        self.rows.word(Self::at(ifindex) + ROWS).unwrap_or(0) as i64
    }

    /// Counts rows of a pod, or, backwards, that they are gone.
    pub(super) fn count(&self, ifindex: u32, rows: i64) {
        if ifindex != 0 {
            self.rows.add(Self::at(ifindex) + ROWS, rows as u64);
        }
    }

    fn at(ifindex: u32) -> usize {
        share::row(ifindex) as usize * WORDS
    }
}
