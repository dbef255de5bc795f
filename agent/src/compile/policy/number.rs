//! Numbers for contents: the same content the same number, always. What the contents are is not here.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::encode::{Canonical, preferred};

/// Numbers below this one have a meaning of their own in some table.
pub(super) const FIRST: u32 = weir_common::policy::Class::FIRST_COMPILED;

/// Which number each content has.
///
/// A content gets the number that its hash asks for. Two contents that ask for the same one are told
/// apart by their content, not by their hash: the later one in order takes the next free number. A
/// content keeps the number it had, and a number that stood for another content a moment ago is not
/// given out, so during a transition a number has one meaning. (After a restart nothing is remembered;
/// then numbers agree with those before it unless two contents collided.)
#[derive(Clone, Debug)]
pub(super) struct Numbers<K> {
    numbers: BTreeMap<K, u32>,
}

impl<K> Default for Numbers<K> {
    fn default() -> Self {
        Self {
            numbers: BTreeMap::new(),
        }
    }
}

impl<K: Ord + Canonical> Numbers<K> {
    /// Numbers `contents`, after `previous`. Only bits of `mask` are used of a hash: all, outside of tests.
    pub(super) fn assign(contents: BTreeSet<K>, previous: &Self, mask: u32) -> Self {
        let mut taken: HashSet<u32> = previous.numbers.values().copied().collect();
        let numbers = contents
            .into_iter()
            .map(|content| {
                let number = previous.numbers.get(&content).copied().unwrap_or_else(|| {
                    let free = free(preferred(&content) & mask, &taken);
                    taken.insert(free);
                    free
                });
                (content, number)
            })
            .collect();
        Self { numbers }
    }

    /// The number of a content; 0 for one that was not numbered.
    pub(super) fn number(&self, content: &K) -> u32 {
        self.numbers.get(content).copied().unwrap_or(0)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, u32)> {
        self.numbers
            .iter()
            .map(|(content, number)| (content, *number))
    }
}

/// The first number from `wanted` on that is not taken, around the end if need be.
pub(super) fn free(wanted: u32, taken: &HashSet<u32>) -> u32 {
    let mut number = wanted.max(FIRST);
    while taken.contains(&number) {
        number = number.wrapping_add(1).max(FIRST);
    }
    number
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectName;

    fn names(names: &[&str]) -> BTreeSet<ObjectName> {
        names
            .iter()
            .map(|name| ObjectName::new("ns", *name))
            .collect()
    }

    #[test]
    fn contents_that_ask_for_the_same_number_get_different_ones() {
        let numbers = Numbers::assign(names(&["a", "b", "c"]), &Numbers::default(), 0);
        let given: Vec<u32> = numbers.iter().map(|(_, number)| number).collect();
        assert_eq!(given, [FIRST, FIRST + 1, FIRST + 2]);
    }

    #[test]
    fn a_number_keeps_its_meaning_while_contents_that_collide_come_and_go() {
        let first = Numbers::assign(names(&["b", "c"]), &Numbers::default(), 0);
        let second = Numbers::assign(names(&["a", "c"]), &first, 0);
        let b = ObjectName::new("ns", "b");
        let c = ObjectName::new("ns", "c");
        assert_eq!(second.number(&c), first.number(&c));
        assert_ne!(second.number(&ObjectName::new("ns", "a")), first.number(&b));
    }

    #[test]
    fn the_search_for_a_free_number_goes_around_the_end() {
        let taken = HashSet::from([u32::MAX, FIRST]);
        assert_eq!(free(u32::MAX, &taken), FIRST + 1);
    }
}
