//! Numbers for contents: the same content the same number, always. What the contents are is not here.

use std::collections::BTreeMap;

use super::encode::{Canonical, preferred};

/// Numbers below this one have a meaning of their own in some table.
pub(super) const FIRST: u32 = weir_common::policy::Class::FIRST_COMPILED;

/// Which number each content in use has.
///
/// A content gets the number that its hash asks for. Two contents that ask for the same one are told
/// apart by their content, not by their hash: the later one takes the next free number. A content keeps
/// its number as long as somebody uses it, and longer: rows that say what it meant are in the kernel for some time after nobody
/// points to them any more, so one that nobody uses is given out again only after two times [`Self::settle`]. (After a restart nothing is remembered;
/// then numbers agree with those before it unless two contents collided.)
#[derive(Clone, Debug)]
pub(super) struct Numbers<K> {
    in_use: BTreeMap<K, InUse>,
    by_number: BTreeMap<u32, K>,
    /// Those that nobody uses any more.
    resting: BTreeMap<K, Resting>,
    /// Numbers without a content that rows in the kernel may still have: not given out until they have rested, too. Was it so at the
    /// last [`Self::settle`]?
    withheld: BTreeMap<u32, bool>,
    mask: u32,
}

#[derive(Clone, Copy, Debug)]
struct Resting {
    number: u32,
    /// Was it so at the last [`Numbers::settle`]?
    is_settled: bool,
}

#[derive(Clone, Copy, Debug)]
struct InUse {
    number: u32,
    users: usize,
}

impl<K: Ord + Clone + Canonical> Numbers<K> {
    /// Only bits of `mask` are used of a hash: all, outside of tests.
    pub(super) fn with_mask(mask: u32) -> Self {
        Self {
            in_use: BTreeMap::new(),
            by_number: BTreeMap::new(),
            resting: BTreeMap::new(),
            withheld: BTreeMap::new(),
            mask,
        }
    }

    /// One more user. Its number, and whether it is the first.
    pub(super) fn take(&mut self, content: &K) -> (u32, bool) {
        if let Some(it) = self.in_use.get_mut(content) {
            it.users += 1;
            return (it.number, false);
        }
        let rested = self.resting.remove(content).map(|it| it.number);
        let number =
            rested.unwrap_or_else(|| free(preferred(content) & self.mask, |it| self.is_taken(it)));
        self.in_use
            .insert(content.clone(), InUse { number, users: 1 });
        self.by_number.insert(number, content.clone());
        (number, true)
    }

    /// One user less. Its number if it was the last.
    pub(super) fn leave(&mut self, content: &K) -> Option<u32> {
        let it = self.in_use.get_mut(content)?;
        it.users -= 1;
        if it.users > 0 {
            return None;
        }
        let number = it.number;
        self.in_use.remove(content);
        let resting = Resting {
            number,
            is_settled: false,
        };
        self.resting.insert(content.clone(), resting);
        Some(number)
    }

    /// Time has passed, at least as long as rows stay that nothing points to.
    pub(super) fn settle(&mut self) {
        let by_number = &mut self.by_number;
        self.resting.retain(|_, it| {
            if it.is_settled {
                by_number.remove(&it.number);
            }
            !std::mem::replace(&mut it.is_settled, true)
        });
        self.withheld
            .retain(|_, is_settled| !std::mem::replace(is_settled, true));
    }

    /// Somebody has written rows with this number who had it only for a while.
    pub(super) fn withhold(&mut self, number: u32) {
        self.withheld.insert(number, false);
    }

    /// The number of a content in use, or that rests.
    pub(super) fn number(&self, content: &K) -> Option<u32> {
        let in_use = self.in_use.get(content).map(|it| it.number);
        in_use.or_else(|| self.resting.get(content).map(|it| it.number))
    }

    /// What a number stands for, also one that rests.
    pub(super) fn content(&self, number: u32) -> Option<&K> {
        self.by_number.get(&number)
    }

    /// May a number not be given out?
    pub(super) fn is_taken(&self, number: u32) -> bool {
        self.by_number.contains_key(&number) || self.withheld.contains_key(&number)
    }

    /// Those in use.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, u32)> {
        self.in_use.iter().map(|(content, it)| (content, it.number))
    }
}

/// The first number from `wanted` on that is not taken, around the end if need be.
pub(super) fn free(wanted: u32, is_taken: impl Fn(u32) -> bool) -> u32 {
    let mut number = wanted.max(FIRST);
    while is_taken(number) {
        number = number.wrapping_add(1).max(FIRST);
    }
    number
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectName;

    fn name(name: &str) -> ObjectName {
        ObjectName::new("ns", name)
    }

    #[test]
    fn contents_that_ask_for_the_same_number_get_different_ones() {
        let mut numbers = Numbers::with_mask(0);
        let given = ["a", "b", "c"].map(|it| numbers.take(&name(it)).0);
        assert_eq!(given, [FIRST, FIRST + 1, FIRST + 2]);
    }

    #[test]
    fn a_number_keeps_its_meaning_while_contents_that_collide_come_and_go() {
        let mut numbers = Numbers::with_mask(0);
        let [b, c] = ["b", "c"].map(|it| numbers.take(&name(it)).0);
        numbers.leave(&name("b"));
        assert_ne!(numbers.take(&name("a")).0, b);
        assert_eq!(numbers.number(&name("c")), Some(c));
        numbers.settle();
        assert_ne!(numbers.take(&name("d")).0, b, "its rows may still be there");
        numbers.settle();
        assert_eq!(numbers.take(&name("e")).0, b);
    }

    #[test]
    fn a_number_that_was_used_on_the_way_rests_too() {
        let mut numbers = Numbers::with_mask(0);
        numbers.withhold(FIRST);
        for name_of in ["a", "b"] {
            assert_ne!(numbers.take(&name(name_of)).0, FIRST);
            numbers.settle();
        }
        assert_eq!(numbers.take(&name("c")).0, FIRST);
    }

    #[test]
    fn a_content_has_its_number_until_its_last_user_leaves() {
        let mut numbers = Numbers::with_mask(u32::MAX);
        let (number, is_first) = numbers.take(&name("a"));
        assert!(is_first);
        assert_eq!(numbers.take(&name("a")), (number, false));
        assert_eq!(numbers.leave(&name("a")), None);
        assert_eq!(numbers.leave(&name("a")), Some(number));
        assert_eq!(numbers.leave(&name("a")), None);
        assert_eq!(numbers.number(&name("a")), Some(number));
        numbers.settle();
        assert_eq!(numbers.take(&name("a")), (number, true), "it comes back");
        assert_eq!(numbers.leave(&name("a")), Some(number));
        numbers.settle();
        numbers.settle();
        assert_eq!(numbers.number(&name("a")), None);
    }

    #[test]
    fn the_search_for_a_free_number_goes_around_the_end() {
        let taken = [u32::MAX, FIRST];
        assert_eq!(free(u32::MAX, |it| taken.contains(&it)), FIRST + 1);
    }
}
