//! Which rows of `BACKENDS` are free: an allocator of runs. What is in them is not here.

use std::collections::{BTreeMap, BTreeSet};

use weir_common::service::Segment;

/// Free rows of an array, as runs that never touch each other.
#[derive(Debug)]
pub(super) struct Runs {
    /// Start to length.
    by_start: BTreeMap<u32, u32>,
    /// Length and start: the smallest run that fits is the first in range.
    by_len: BTreeSet<(u32, u32)>,
}

impl Runs {
    /// All of `capacity` rows are free.
    pub(super) fn new(capacity: u32) -> Self {
        let mut runs = Self {
            by_start: BTreeMap::new(),
            by_len: BTreeSet::new(),
        };
        runs.insert(0, capacity);
        runs
    }

    /// Takes a run of this length, the tightest that fits. A run of nothing takes nothing.
    pub(super) fn allocate(&mut self, len: u32) -> Option<Segment> {
        if len == 0 {
            return Some(Segment::default());
        }
        let &(found, start) = self.by_len.range((len, 0)..).next()?;
        self.remove(start, found);
        self.insert(start + len, found - len);
        Some(Segment { start, len })
    }

    /// Takes exactly this run. False if some row of it is taken or does not exist.
    pub(super) fn claim(&mut self, segment: Segment) -> bool {
        if segment.len == 0 {
            return true;
        }
        let Some(end) = segment.start.checked_add(segment.len) else {
            return false;
        };
        let Some((&start, &len)) = self.by_start.range(..=segment.start).next_back() else {
            return false;
        };
        if end > start + len {
            return false;
        }
        self.remove(start, len);
        self.insert(start, segment.start - start);
        self.insert(end, start + len - end);
        true
    }

    /// Gives a run back.
    pub(super) fn free(&mut self, segment: Segment) {
        let (mut start, mut len) = (segment.start, segment.len);
        if len == 0 {
            return;
        }
        if let Some((&before, &before_len)) = self.by_start.range(..start).next_back()
            && before + before_len == start
        {
            self.remove(before, before_len);
            start = before;
            len += before_len;
        }
        if let Some(&after_len) = self.by_start.get(&(start + len)) {
            self.remove(start + len, after_len);
            len += after_len;
        }
        self.insert(start, len);
    }

    fn insert(&mut self, start: u32, len: u32) {
        if len > 0 {
            self.by_start.insert(start, len);
            self.by_len.insert((len, start));
        }
    }

    fn remove(&mut self, start: u32, len: u32) {
        self.by_start.remove(&start);
        self.by_len.remove(&(len, start));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use weir_common::service::Segment;

    use super::Runs;

    const CAPACITY: u32 = 32;

    proptest! {
        #[test]
        fn no_row_is_given_out_twice_and_none_is_lost(
            ops in prop::collection::vec((any::<bool>(), 0..8u32, any::<prop::sample::Index>()), 0..80),
        ) {
            let mut runs = Runs::new(CAPACITY);
            let mut held: Vec<Segment> = Vec::new();
            for (take, len, which) in ops {
                if take || held.is_empty() {
                    let used: u32 = held.iter().map(|s| s.len).sum();
                    match runs.allocate(len) {
                        Some(segment) => {
                            prop_assert_eq!(segment.len, len);
                            for other in &held {
                                let disjoint = segment.start + segment.len <= other.start
                                    || other.start + other.len <= segment.start;
                                prop_assert!(disjoint || len == 0 || other.len == 0);
                            }
                            held.push(segment);
                        }
                        None => prop_assert!(used + len > CAPACITY || !held.is_empty()),
                    }
                } else {
                    runs.free(held.swap_remove(which.index(held.len())));
                }
                let free: u32 = runs.by_start.values().sum();
                prop_assert_eq!(free + held.iter().map(|s| s.len).sum::<u32>(), CAPACITY);
                prop_assert_eq!(runs.by_start.len(), runs.by_len.len());
            }
            let mut again = Runs::new(CAPACITY);
            for segment in &held {
                prop_assert!(again.claim(*segment));
                prop_assert!(segment.len == 0 || !again.claim(*segment));
            }
            prop_assert_eq!(&again.by_start, &runs.by_start);
        }
    }

    #[test]
    fn a_run_beyond_the_end_is_not_there_to_claim() {
        let mut runs = Runs::new(8);
        for (start, len) in [(7, 2), (8, 1), (u32::MAX, 2)] {
            assert!(!runs.claim(Segment { start, len }));
        }
        assert!(runs.claim(Segment { start: 0, len: 8 }));
        assert_eq!(runs.allocate(1), None);
    }
}
