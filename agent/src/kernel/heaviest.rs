//! Who is seen most often, in memory that does not grow with how many are seen.

use std::collections::HashMap;
use std::hash::Hash;

/// A summary after Misra and Gries ("Finding repeated elements", 1982): of `n` that were seen it holds at most
/// [`Self::ROOM`], each counted too low by [`Self::error`] at most, which is `n / (ROOM + 1)` at most. Whoever was seen more
/// often than that is among them. Exact as long as no more than `ROOM` different ones are seen.
#[derive(Debug)]
pub(super) struct Heaviest<K> {
    counts: HashMap<K, u64>,
    error: u64,
}

impl<K> Default for Heaviest<K> {
    fn default() -> Self {
        Self {
            counts: HashMap::new(),
            error: 0,
        }
    }
}

impl<K: Copy + Eq + Hash + Ord> Heaviest<K> {
    pub(super) const ROOM: usize = 1024;

    pub(super) fn see(&mut self, key: K) {
        if let Some(count) = self.counts.get_mut(&key) {
            *count += 1;
        } else if self.counts.len() < Self::ROOM {
            self.counts.insert(key, 1);
        } else {
            // Each round takes off one of every count, so there are no more rounds than it takes to count that.
            self.error += 1;
            self.counts.retain(|_, count| {
                *count -= 1;
                *count > 0
            });
        }
    }

    /// By how much each count may be too low, and how often somebody may have been seen who is not held.
    pub(super) fn error(&self) -> u64 {
        self.error
    }

    /// How often anybody was seen at the most: too high by [`Self::error`] at most, never too low.
    pub(super) fn most(&self) -> u64 {
        self.counts.values().max().copied().unwrap_or(0) + self.error
    }

    /// Those that were seen most often, the first of them first, with their counts.
    pub(super) fn first(&self, many: usize) -> Vec<(K, u64)> {
        let mut all = self.all();
        all.sort_unstable_by_key(|&(key, count)| (std::cmp::Reverse(count), key));
        all.truncate(many);
        all
    }

    /// All that are held, in no order.
    pub(super) fn all(&self) -> Vec<(K, u64)> {
        let all = self.counts.iter();
        all.map(|(key, count)| (*key, *count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u64 = Heaviest::<u64>::ROOM as u64;

    #[test]
    fn it_is_exact_while_there_is_room_and_says_how_wrong_it_is_after() {
        for (others, times) in [(0, 1), (ROOM - 1, 1), (ROOM, 1), (50_000, 1), (5_000, 9)] {
            let mut heaviest = Heaviest::default();
            // One of them is seen 500 times, spread over all that is seen.
            for i in 0..others.max(500) {
                if i * 500 / others.max(500) < (i + 1) * 500 / others.max(500) {
                    heaviest.see(u64::MAX);
                }
                if i < others {
                    (0..times).for_each(|_| heaviest.see(i));
                }
            }
            let seen = 500 + others * times;
            let (error, case) = (heaviest.error(), (others, times));
            assert!(error <= seen / (ROOM + 1), "{case:?}: {error}");
            assert_eq!(error == 0, others < ROOM, "{case:?}: {error}");
            assert!(heaviest.counts.len() as u64 <= ROOM, "{case:?}");
            assert!(
                (500..=500 + error).contains(&heaviest.most()),
                "{case:?}: {}",
                heaviest.most()
            );
            let (first, count) = heaviest.first(3)[0];
            assert_eq!(first, u64::MAX, "{case:?}");
            assert!((500 - error..=500).contains(&count), "{case:?}: {count}");
        }
    }
}
