//! Desired against actual rows of one table: a pure structure. Who writes the difference is not here.
//!
//! Two overlapping sets, of which each row is kept once:
//!
//! ```text
//!        desired                actual
//!   ┌───────────────┬───────────┬──────────────┐
//!   │    pending    │  settled  │    stale     │
//!   └───────────────┴───────────┴──────────────┘
//! ```
//!
//! A key that is pending and stale at once has another value in the kernel than it should.

use std::collections::BTreeMap;

/// The rows of a table, sorted by what is left to do.
#[derive(Clone, Debug)]
pub struct Delta<K, V> {
    settled: BTreeMap<K, V>,
    pending: BTreeMap<K, V>,
    stale: BTreeMap<K, V>,
}

impl<K, V> Default for Delta<K, V> {
    fn default() -> Self {
        Self {
            settled: BTreeMap::new(),
            pending: BTreeMap::new(),
            stale: BTreeMap::new(),
        }
    }
}

impl<K: Copy + Ord, V: Copy + PartialEq> Delta<K, V> {
    /// The row should be there.
    pub fn desire(&mut self, key: K, value: V) {
        let actual = self.take_actual(&key);
        self.pending.remove(&key);
        match actual {
            Some(actual) if actual == value => {
                self.settled.insert(key, value);
            }
            actual => {
                self.pending.insert(key, value);
                if let Some(actual) = actual {
                    self.stale.insert(key, actual);
                }
            }
        }
    }

    /// No row of this key should be there.
    pub fn withdraw(&mut self, key: &K) {
        self.pending.remove(key);
        if let Some(actual) = self.settled.remove(key) {
            self.stale.insert(*key, actual);
        }
    }

    /// The kernel holds this row, or none of this key.
    pub fn observe(&mut self, key: K, actual: Option<V>) {
        let desired = self.desired(&key);
        self.settled.remove(&key);
        self.stale.remove(&key);
        self.pending.remove(&key);
        match (desired, actual) {
            (Some(desired), Some(actual)) if desired == actual => {
                self.settled.insert(key, actual);
            }
            (desired, actual) => {
                if let Some(desired) = desired {
                    self.pending.insert(key, desired);
                }
                if let Some(actual) = actual {
                    self.stale.insert(key, actual);
                }
            }
        }
    }

    /// The kernel holds exactly these rows. Returns what of that is news.
    pub fn observe_all(&mut self, rows: impl IntoIterator<Item = (K, V)>) -> Drift {
        let mut rows: Vec<(K, V)> = rows.into_iter().collect();
        // A hash is read in the order of its buckets. Sorted, both sides are gone through once, side by side.
        rows.sort_unstable_by_key(|(key, _)| *key);
        rows.dedup_by_key(|(key, _)| *key);
        let mut rows = rows.into_iter().peekable();
        let mut drift = Drift::default();
        let mut news = Vec::new();
        for (key, believed) in self.believed() {
            while let Some((unknown, value)) = rows.next_if(|(it, _)| it < key) {
                drift.unexpected += 1;
                news.push((unknown, Some(value)));
            }
            match rows.next_if(|(it, _)| it == key) {
                None => {
                    drift.missing += 1;
                    news.push((*key, None));
                }
                Some((_, value)) if value != *believed => {
                    drift.different += 1;
                    news.push((*key, Some(value)));
                }
                Some(_) => {}
            }
        }
        for (unknown, value) in rows {
            drift.unexpected += 1;
            news.push((unknown, Some(value)));
        }
        for (key, actual) in news {
            self.observe(key, actual);
        }
        drift
    }

    /// Every row that the kernel holds, as far as we know, in the order of the keys.
    fn believed(&self) -> impl Iterator<Item = (&K, &V)> {
        let mut settled = self.settled.iter().peekable();
        let mut stale = self.stale.iter().peekable();
        std::iter::from_fn(move || match (settled.peek(), stale.peek()) {
            (Some((one, _)), Some((other, _))) if other < one => stale.next(),
            (None, _) => stale.next(),
            _ => settled.next(),
        })
    }

    /// What the row of this key should be.
    pub fn desired(&self, key: &K) -> Option<V> {
        self.pending
            .get(key)
            .or_else(|| self.settled.get(key))
            .copied()
    }

    /// What the kernel holds under this key, as far as we know.
    pub fn actual(&self, key: &K) -> Option<V> {
        self.stale
            .get(key)
            .or_else(|| self.settled.get(key))
            .copied()
    }

    /// Is the row of this key as it should be?
    pub fn is_settled(&self, key: &K) -> bool {
        self.settled.contains_key(key)
            || !(self.pending.contains_key(key) || self.stale.contains_key(key))
    }

    /// Rows to write where the kernel already holds another value, then those that need room.
    pub fn to_write(&self) -> Vec<(K, V)> {
        let (mut changed, added): (Vec<_>, Vec<_>) = self
            .pending
            .iter()
            .map(|(k, v)| (*k, *v))
            .partition(|(k, _)| self.stale.contains_key(k));
        changed.extend(added);
        changed
    }

    /// Keys in the kernel that should not be there.
    pub fn to_remove(&self) -> Vec<K> {
        self.stale
            .keys()
            .filter(|k| !self.pending.contains_key(k))
            .copied()
            .collect()
    }

    /// Every row that should be there.
    pub fn all_desired(&self) -> impl Iterator<Item = (&K, &V)> {
        self.settled.iter().chain(self.pending.iter())
    }

    /// Every row that the kernel holds, as far as we know.
    pub fn all_actual(&self) -> impl Iterator<Item = (&K, &V)> {
        self.settled.iter().chain(self.stale.iter())
    }

    /// How many rows the kernel holds, as far as we know.
    pub fn actual_len(&self) -> usize {
        self.settled.len() + self.stale.len()
    }

    /// How many rows there will be once everything pending is written and before anything is removed.
    pub fn peak_len(&self) -> usize {
        let added = self
            .pending
            .keys()
            .filter(|k| !self.stale.contains_key(k))
            .count();
        self.actual_len() + added
    }

    fn take_actual(&mut self, key: &K) -> Option<V> {
        self.stale.remove(key).or_else(|| self.settled.remove(key))
    }
}

/// How far the kernel was from what we believed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Drift {
    /// Rows that somebody removed.
    pub missing: usize,
    /// Rows that somebody changed.
    pub different: usize,
    /// Rows that somebody added.
    pub unexpected: usize,
}

impl Drift {
    /// Rows that were not as we believed.
    pub fn rows(&self) -> usize {
        self.missing + self.different + self.unexpected
    }

    /// Was everything as believed?
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::{Delta, Drift};

    #[derive(Clone, Debug)]
    enum Op {
        Desire(u8, u8),
        Withdraw(u8),
        Observe(u8, Option<u8>),
        ObserveAll(BTreeMap<u8, u8>),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..6u8, 0..3u8).prop_map(|(k, v)| Op::Desire(k, v)),
            (0..6u8).prop_map(Op::Withdraw),
            (0..6u8, prop::option::of(0..3u8)).prop_map(|(k, v)| Op::Observe(k, v)),
            prop::collection::btree_map(0..6u8, 0..3u8, 0..6).prop_map(Op::ObserveAll),
        ]
    }

    proptest! {
        #[test]
        fn it_agrees_with_two_plain_maps(ops in prop::collection::vec(op(), 0..60)) {
            let mut delta = Delta::default();
            let (mut desired, mut actual) = (BTreeMap::new(), BTreeMap::new());
            for op in ops {
                match op {
                    Op::Desire(k, v) => {
                        delta.desire(k, v);
                        desired.insert(k, v);
                    }
                    Op::Withdraw(k) => {
                        delta.withdraw(&k);
                        desired.remove(&k);
                    }
                    Op::Observe(k, v) => {
                        delta.observe(k, v);
                        match v {
                            Some(v) => actual.insert(k, v),
                            None => actual.remove(&k),
                        };
                    }
                    Op::ObserveAll(rows) => {
                        let drift = delta.observe_all(rows.clone());
                        let expected = Drift {
                            missing: actual.keys().filter(|k| !rows.contains_key(k)).count(),
                            different: rows
                                .iter()
                                .filter(|(k, v)| actual.get(k).is_some_and(|a| a != *v))
                                .count(),
                            unexpected: rows.keys().filter(|k| !actual.contains_key(k)).count(),
                        };
                        prop_assert_eq!(drift, expected);
                        actual = rows;
                    }
                }
                for k in 0..6u8 {
                    prop_assert_eq!(delta.desired(&k), desired.get(&k).copied());
                    prop_assert_eq!(delta.actual(&k), actual.get(&k).copied());
                    prop_assert_eq!(delta.is_settled(&k), desired.get(&k) == actual.get(&k));
                }
                prop_assert_eq!(delta.actual_len(), actual.len());
                let mut writes = delta.to_write();
                writes.sort_unstable();
                let expected: Vec<_> = desired
                    .iter()
                    .filter(|(k, v)| actual.get(k) != Some(v))
                    .map(|(k, v)| (*k, *v))
                    .collect();
                prop_assert_eq!(writes, expected);
                let removals: Vec<_> =
                    actual.keys().filter(|k| !desired.contains_key(k)).copied().collect();
                prop_assert_eq!(delta.to_remove(), removals);
                let mut union = actual.clone();
                union.extend(desired.clone());
                prop_assert_eq!(delta.peak_len(), union.len());
            }
        }
    }

    #[test]
    fn changes_of_existing_rows_come_before_rows_that_need_room() {
        let mut delta = Delta::default();
        delta.observe(9, Some(1));
        delta.desire(1, 1);
        delta.desire(9, 2);
        assert_eq!(delta.to_write(), vec![(9, 2), (1, 1)]);
    }
}
