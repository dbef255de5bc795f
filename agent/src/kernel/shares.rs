//! What each pod of this node holds of the tables of conversations. Programs count while we do, so both
//! add and nobody writes.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Mutex, PoisonError};

use weir_common::share::{self, Share};
use weir_common::{limits, shared};

use super::mapped::MappedRows;

/// Rows of `SHARES`.
#[derive(Debug)]
pub struct Shares {
    rows: MappedRows,
    /// By how much each row was off when it was last looked at.
    off: Mutex<HashMap<u32, i64>>,
}

/// Rows of `TCP_WAYS`, counted by whose they are.
#[derive(Debug, Default)]
pub(super) struct Held(HashMap<u32, i64>);

impl Held {
    pub(super) fn count(&mut self, ifindex: u32) {
        if ifindex != 0 {
            *self.0.entry(share::row(ifindex)).or_default() += 1;
        }
    }
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
        Ok(Self {
            rows,
            off: Mutex::default(),
        })
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

    /// Puts right what was counted wrong: by an agent that was killed between a row and its count, or when conversations of
    /// earlier tables were taken over. Programs go on while rows are counted, so only what two counts in a row agree on is.
    pub(super) fn correct(&self, held: &Held) {
        let mut last = self.off.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = HashMap::new();
        for row in 0..limits::SHARES {
            let off = held.0.get(&row).copied().unwrap_or(0) - self.rows(row);
            let correction = agreed(last.get(&row).copied().unwrap_or(0), off);
            if correction != 0 {
                self.rows.add(Self::at(row) + ROWS, correction as u64);
            }
            if off != correction {
                now.insert(row, off - correction);
            }
        }
        *last = now;
    }

    fn at(ifindex: u32) -> usize {
        share::row(ifindex) as usize * WORDS
    }
}

/// The part of two differences that both have.
fn agreed(a: i64, b: i64) -> i64 {
    if a.signum() == b.signum() {
        a.signum() * a.abs().min(b.abs())
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::agreed;

    #[test]
    fn what_two_counts_agree_on_is_put_right() {
        for (a, b, expected) in [
            (0, 0, 0),
            (5, 5, 5),
            (5, 3, 3),
            (-5, -7, -5),
            (5, -5, 0),
            (0, 9, 0),
        ] {
            assert_eq!(agreed(a, b), expected, "{a} {b}");
        }
    }
}
