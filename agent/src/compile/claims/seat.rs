//! One address, and those who ask for it.

use crate::compile::{Owner, Way};

/// Who asks, in what way. The least one is the best: of equal ways the older object, then the name.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Claim {
    way: Way,
    /// Seconds since 1970.
    created: u64,
    owner: Owner,
}

impl Claim {
    /// Who does not say how old he is counts as the youngest.
    pub(super) fn new(way: Way, created: Option<u64>, owner: &Owner) -> Self {
        Self {
            way,
            created: created.unwrap_or(u64::MAX),
            owner: owner.clone(),
        }
    }
}

/// An address that somebody asks for.
#[derive(Clone, Debug)]
pub(super) struct Seat {
    /// Sorted, the best one first.
    claims: Vec<Claim>,
    /// Who has had it longest, if he still asks for it.
    incumbent: Option<Claim>,
    /// The kernel holds it for somebody who may still ask.
    is_awaited: bool,
}

impl Seat {
    /// Nobody asks yet.
    pub(super) fn new(is_awaited: bool) -> Self {
        Self {
            claims: Vec::with_capacity(1),
            incumbent: None,
            is_awaited,
        }
    }

    /// One more asks, who had it before if he is known.
    pub(super) fn add(&mut self, claim: Claim, is_known: bool) {
        if is_known && self.incumbent.as_ref().is_none_or(|other| claim < *other) {
            self.incumbent = Some(claim.clone());
        }
        if let Err(place) = self.claims.binary_search(&claim) {
            self.claims.insert(place, claim);
        }
    }

    /// One does not ask any more.
    pub(super) fn remove(&mut self, claim: &Claim) {
        if let Ok(place) = self.claims.binary_search(claim) {
            self.claims.remove(place);
        }
        if self.incumbent.as_ref() == Some(claim) {
            self.incumbent = None;
        }
    }

    /// One asks in another way than before.
    pub(super) fn replace(&mut self, claim: &Claim, now: Claim) {
        let had_it = self.incumbent.as_ref() == Some(claim);
        self.remove(claim);
        self.add(now, had_it);
    }

    /// Who has it. Nobody has what is awaited, but a cluster IP, which is given out once only.
    pub(super) fn holder(&self) -> Option<&Owner> {
        Some(&self.granted()?.owner)
    }

    fn granted(&self) -> Option<&Claim> {
        let best = self.claims.first()?;
        match &self.incumbent {
            Some(incumbent) if incumbent.way == best.way => Some(incumbent),
            None if self.is_awaited && best.way != Way::ClusterIp => None,
            _ => Some(best),
        }
    }

    /// Who has it now keeps it.
    pub(super) fn settle(&mut self) {
        self.is_awaited = false;
        self.incumbent = self.granted().cloned();
    }

    /// Everybody who asks.
    pub(super) fn owners(&self) -> impl Iterator<Item = &Owner> {
        self.claims.iter().map(|claim| &claim.owner)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }
}
