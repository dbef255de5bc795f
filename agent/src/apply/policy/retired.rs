//! Rows of one table that nothing points to any more, and since when. Removing them is not here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use crate::apply::GRACE;

/// Rows that are to go when no program can be on its way to them any more. How many there are depends on what was
/// retired within the last [`GRACE`], however often something changes.
#[derive(Debug)]
pub(super) struct Retired<K> {
    since: BTreeMap<K, Instant>,
    /// Longest retired first. A key that came back and went again is here twice; the later time counts.
    queue: VecDeque<(Instant, Vec<K>)>,
    overdue: BTreeSet<K>,
}

impl<K> Default for Retired<K> {
    fn default() -> Self {
        Self {
            since: BTreeMap::new(),
            queue: VecDeque::new(),
            overdue: BTreeSet::new(),
        }
    }
}

impl<K: Copy + Ord> Retired<K> {
    /// Nothing points to these from `now` on. The time of those that are here already stays.
    pub(super) fn retire(&mut self, keys: impl IntoIterator<Item = K>, now: Instant) {
        let mut fresh = Vec::new();
        for key in keys {
            self.since.entry(key).or_insert_with(|| {
                fresh.push(key);
                now
            });
        }
        if !fresh.is_empty() {
            self.queue.push_back((now, fresh));
        }
    }

    /// Takes back those that are needed again.
    pub(super) fn revive(&mut self, is_needed: impl Fn(&K) -> bool) {
        self.since.retain(|key, _| !is_needed(key));
        self.overdue.retain(|key| !is_needed(key));
    }

    /// Those that may go. They are said again until [`Self::forget`].
    pub(super) fn due(&mut self, now: Instant) -> Vec<K> {
        while let Some((since, _)) = self.queue.front()
            && now.saturating_duration_since(*since) >= GRACE
        {
            let Some((since, keys)) = self.queue.pop_front() else {
                break;
            };
            let due = keys
                .into_iter()
                .filter(|key| self.since.get(key) == Some(&since));
            self.overdue.extend(due);
        }
        self.overdue.iter().copied().collect()
    }

    /// It has gone.
    pub(super) fn forget(&mut self, key: &K) {
        self.since.remove(key);
        self.overdue.remove(key);
    }
}
