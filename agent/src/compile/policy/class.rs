//! What a class is: what is true of its addresses, of all that the rules of this node ask. Who asks is in `question`.

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::encode::{Canonical, Encoder, long_hash};
use super::predicate::Predicate;

/// A predicate that holds for somebody. Quick to compare: nearly always its hash decides.
#[derive(Clone, Debug)]
pub(super) struct Fact {
    hash: u64,
    predicate: Arc<Predicate>,
}

/// Everything that is true of an address, in one order.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Facts(Arc<[Fact]>);

/// What policy sees of an address.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) enum Class {
    /// It is of this node, and no rule is asked.
    OwnNode,
    Of(Facts),
}

impl Fact {
    pub(super) fn new(predicate: Arc<Predicate>) -> Self {
        Self {
            hash: long_hash(&*predicate),
            predicate,
        }
    }

    pub(super) fn predicate(&self) -> &Predicate {
        &self.predicate
    }
}

impl Facts {
    pub(super) fn of(facts: impl IntoIterator<Item = Fact>) -> Self {
        let mut facts: Vec<Fact> = facts.into_iter().collect();
        facts.sort();
        facts.dedup();
        Self(facts.into())
    }

    /// What is true by the one or the other.
    pub(super) fn and(&self, other: &Self) -> Self {
        match (self.is_empty(), other.is_empty()) {
            (_, true) => self.clone(),
            (true, false) => other.clone(),
            (false, false) => Self::of(self.0.iter().chain(&*other.0).cloned()),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contains(&self, fact: &Fact) -> bool {
        self.0.binary_search(fact).is_ok()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Fact> {
        self.0.iter()
    }

    /// What is true by only one of them.
    pub(super) fn difference<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a Fact> {
        let only = |of: &'a Self, not: &'a Self| of.iter().filter(|fact| !not.contains(fact));
        only(self, other).chain(only(other, self))
    }
}

impl Class {
    /// Nothing is true of it that anybody asks: it needs no row.
    pub(super) fn world() -> Self {
        Self::Of(Facts::default())
    }
}

impl PartialEq for Fact {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Fact {}

impl PartialOrd for Fact {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Fact {
    fn cmp(&self, other: &Self) -> Ordering {
        self.hash.cmp(&other.hash).then_with(|| {
            match Arc::ptr_eq(&self.predicate, &other.predicate) {
                true => Ordering::Equal,
                false => self.predicate.cmp(&other.predicate),
            }
        })
    }
}

impl Hash for Fact {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.hash.hash(state);
    }
}

impl Canonical for Facts {
    fn encode(&self, to: &mut Encoder) {
        let mut predicates: Vec<&Arc<Predicate>> =
            self.0.iter().map(|fact| &fact.predicate).collect();
        predicates.sort();
        to.list(predicates.into_iter());
    }
}
