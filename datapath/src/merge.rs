//! Where paths of a program become one again. The verifier follows every combination of branches as
//! long as it knows values in which they differ, and gives up after a million instructions. It does not
//! follow what is in a map: a number that passes through one is any number, and all paths that differ
//! only in it are walked once.

use core::sync::atomic::Ordering::Relaxed;

use weir_common::shared::AtomicU32;

/// A place in memory that numbers pass through.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Merge(AtomicU32);

impl Merge {
    /// The same number, of which the verifier knows nothing any more.
    #[inline(always)]
    pub fn pass(&self, number: u32) -> u32 {
        self.0.store(number, Relaxed);
        self.0.load(Relaxed)
    }
}
