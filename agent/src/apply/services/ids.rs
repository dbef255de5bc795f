//! Numbers of backends and how often each is used. Their generations stand in `LIVE`.

use std::collections::{HashMap, VecDeque};

use weir_common::Protocol;
use weir_common::service::{BackendId, Generation};

use crate::apply::{KernelTable, Table};
use crate::compile::BackendAddr;

/// What makes two rows of `BACKENDS` the same backend.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Identity {
    /// The number of the service.
    pub service: u32,
    pub addr: BackendAddr,
    pub protocol: Protocol,
}

/// Backends in use, and numbers that are free.
#[derive(Debug)]
pub(super) struct BackendIds {
    by_identity: HashMap<Identity, BackendId>,
    uses: HashMap<BackendId, Use>,
    /// Longest gone first, so that a number is reused as late as possible.
    gone: VecDeque<BackendId>,
    next: BackendId,
    capacity: BackendId,
    /// The generation of a number that was never used.
    first: Generation,
    /// Backends that are remembered under a number although no run holds it.
    offered: HashMap<BackendAddr, BackendId>,
}

#[derive(Debug)]
struct Use {
    identity: Identity,
    runs: u32,
}

impl BackendIds {
    /// No backend yet. Number 0 is never given out: it is what an empty row says.
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            by_identity: HashMap::new(),
            uses: HashMap::new(),
            gone: VecDeque::new(),
            next: 1,
            capacity,
            // 0 is what a row says that was never used.
            first: Generation(2),
            offered: HashMap::new(),
        }
    }

    /// Generations begin here.
    pub(super) fn begin_with(&mut self, first: Generation) {
        self.first = usable_after(Some(first));
    }

    /// Backends, with the number and the generation that stand for them, to be used for the next Service with
    /// such a backend, whichever it is: what is remembered is an address, and that stays.
    pub(super) fn offer(&mut self, backends: HashMap<BackendAddr, BackendId>) {
        self.offered = backends;
    }

    /// A use that the kernel holds already.
    pub(super) fn adopt(&mut self, id: BackendId, identity: Identity) {
        self.pass_over(id);
        self.by_identity.entry(identity).or_insert(id);
        self.uses
            .entry(id)
            .or_insert(Use { identity, runs: 0 })
            .runs += 1;
    }

    /// A number that was in use once.
    pub(super) fn adopt_gone(&mut self, id: BackendId) {
        self.pass_over(id);
        self.gone.push_back(id);
    }

    /// A number that is not to be given out for now.
    pub(super) fn pass_over(&mut self, id: BackendId) {
        self.next = self.next.max(id.saturating_add(1));
    }

    /// Every number that is in a run.
    pub(super) fn used(&self) -> impl Iterator<Item = BackendId> + '_ {
        self.uses.keys().copied()
    }

    /// Is there a number for each of these?
    pub(super) fn have_room(&self, identities: impl ExactSizeIterator<Item = Identity>) -> bool {
        let room = self.capacity.saturating_sub(self.next) as usize + self.gone.len();
        // Mostly there is room even if none of them has a number yet.
        identities.len() <= room || {
            let fresh = identities.filter(|identity| !self.by_identity.contains_key(identity));
            fresh.count() <= room
        }
    }

    /// Is it in a run?
    pub(super) fn is_used(&self, id: BackendId) -> bool {
        self.uses.contains_key(&id)
    }

    /// One more use of a backend. A new one gets a number and a generation that nothing remembers.
    /// `None` when no number is free.
    pub(super) fn acquire<T: KernelTable<BackendId, Generation>>(
        &mut self,
        identity: Identity,
        live: &mut Table<BackendId, Generation, T>,
    ) -> Option<BackendId> {
        if let Some(&id) = self.by_identity.get(&identity) {
            if let Some(used) = self.uses.get_mut(&id) {
                used.runs += 1;
            }
            return Some(id);
        }
        if let Some(id) = self.offered.remove(&identity.addr)
            && !self.is_used(id)
        {
            self.by_identity.insert(identity, id);
            self.uses.insert(id, Use { identity, runs: 1 });
            return Some(id);
        }
        let id = if self.next < self.capacity {
            self.next += 1;
            self.next - 1
        } else {
            self.gone.pop_front()?
        };
        let generation = match live.desired(&id) {
            None => self.first,
            last => usable_after(last),
        };
        live.desire(id, generation);
        self.by_identity.insert(identity, id);
        self.uses.insert(id, Use { identity, runs: 1 });
        Some(id)
    }

    /// One use less. A backend without any is gone, for everything that remembers it.
    pub(super) fn release<T: KernelTable<BackendId, Generation>>(
        &mut self,
        id: BackendId,
        live: &mut Table<BackendId, Generation, T>,
    ) {
        let Some(used) = self.uses.get_mut(&id) else {
            return;
        };
        used.runs -= 1;
        if used.runs > 0 {
            return;
        }
        let identity = used.identity;
        self.uses.remove(&id);
        if self.by_identity.get(&identity) == Some(&id) {
            self.by_identity.remove(&identity);
        }
        live.desire(id, gone_after(live.desired(&id)));
        self.gone.push_back(id);
    }
}

/// The next even generation. The first is 2: 0 is what a row says that was never used.
pub(super) fn usable_after(last: Option<Generation>) -> Generation {
    let last = last.unwrap_or_default().0;
    Generation((last | 1).wrapping_add(1).max(2))
}

/// The next odd generation.
pub(super) fn gone_after(last: Option<Generation>) -> Generation {
    Generation(last.unwrap_or_default().0.wrapping_add(1) | 1)
}

#[cfg(test)]
mod tests {
    use weir_common::service::Generation;

    use super::{gone_after, usable_after};

    #[test]
    fn generations_only_grow_and_say_what_they_mean() {
        let cases = [
            (None, 2, 1),
            (Some(1), 2, 3),
            (Some(2), 4, 3),
            (Some(3), 4, 5),
            (Some(u32::MAX), 2, 1),
        ];
        for (last, usable, gone) in cases {
            let last = last.map(Generation);
            assert_eq!(usable_after(last), Generation(usable), "after {last:?}");
            assert_eq!(gone_after(last), Generation(gone), "after {last:?}");
        }
    }
}
