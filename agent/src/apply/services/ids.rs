//! Numbers of backends and how often each is used. Their generations stand in `LIVE`.

use std::collections::{HashMap, VecDeque};

use weir_common::Protocol;
use weir_common::service::{BackendId, Generation};

use super::draining::Draining;
use crate::apply::{KernelTable, Table};
use crate::compile::BackendAddr;

/// The number that is never given out: it is what an empty row says.
pub(super) const NO_BACKEND: BackendId = 0;

/// What makes two rows of `BACKENDS` the same backend.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Identity {
    /// The number of the service.
    pub service: u32,
    pub addr: BackendAddr,
    pub protocol: Protocol,
}

/// Backends in use, those that drain, and numbers that are free.
#[derive(Debug)]
pub(super) struct BackendIds {
    /// Of backends in a run, and of those that drain.
    by_identity: HashMap<Identity, BackendId>,
    uses: HashMap<BackendId, Use>,
    draining: Draining,
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
    /// No backend yet.
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            by_identity: HashMap::new(),
            uses: HashMap::new(),
            draining: Draining::default(),
            gone: VecDeque::new(),
            next: NO_BACKEND + 1,
            capacity,
            first: Generation::FIRST,
            offered: HashMap::new(),
        }
    }

    /// Generations begin after this one.
    pub(super) fn begin_with(&mut self, first: Generation) {
        self.first = first.next();
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

    /// A number that may still have connections, of nobody knows whom.
    pub(super) fn adopt_draining(&mut self, id: BackendId) {
        self.pass_over(id);
        self.draining.insert(id, None);
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

    /// Is there a number for each of these? One that drains is as good as a free one: it is either one of theirs, or
    /// makes room for them.
    pub(super) fn have_room(&self, identities: impl ExactSizeIterator<Item = Identity>) -> bool {
        let unused = self.capacity.saturating_sub(self.next) as usize;
        let room = unused + self.gone.len() + self.draining.len();
        // Mostly there is room even if none of them has a number yet.
        identities.len() <= room || {
            let is_used =
                |it: &Identity| self.by_identity.get(it).is_some_and(|id| self.is_used(*id));
            identities.filter(|it| !is_used(it)).count() <= room
        }
    }

    /// Is it in a run?
    pub(super) fn is_used(&self, id: BackendId) -> bool {
        self.uses.contains_key(&id)
    }

    /// Those that drain.
    pub(super) fn draining(&self) -> &Draining {
        &self.draining
    }

    pub(super) fn draining_mut(&mut self) -> &mut Draining {
        &mut self.draining
    }

    /// One more use of a backend that has a number. If it was draining, it is the same one again, and what remembers
    /// it goes on. `None` if it has none.
    pub(super) fn acquire_known<T: KernelTable<BackendId, Generation>>(
        &mut self,
        identity: Identity,
        live: &mut Table<BackendId, Generation, T>,
    ) -> Option<BackendId> {
        let id = match self.by_identity.get(&identity) {
            Some(id) => *id,
            None => {
                let offered = self.offered.remove(&identity.addr)?;
                (!self.is_used(offered)).then_some(offered)?
            }
        };
        if let Some(used) = self.uses.get_mut(&id) {
            used.runs += 1;
            return Some(id);
        }
        self.draining.remove(id);
        if let Some(last) = live.desired(&id) {
            live.desire(id, last.usable());
        }
        self.use_first(id, identity);
        Some(id)
    }

    /// The first use of a backend that has no number. It gets one, with a generation that nothing remembers. `None`
    /// when no number is free and none drains.
    pub(super) fn acquire_new<T: KernelTable<BackendId, Generation>>(
        &mut self,
        identity: Identity,
        live: &mut Table<BackendId, Generation, T>,
    ) -> Option<BackendId> {
        let id = if self.next < self.capacity {
            self.next += 1;
            self.next - 1
        } else {
            if self.gone.is_empty() {
                self.end(self.draining.longest()?, live);
            }
            self.gone.pop_front()?
        };
        let generation = live.desired(&id).map_or(self.first, Generation::next);
        live.desire(id, generation);
        self.use_first(id, identity);
        Some(id)
    }

    fn use_first(&mut self, id: BackendId, identity: Identity) {
        self.by_identity.insert(identity, id);
        self.uses.insert(id, Use { identity, runs: 1 });
    }

    /// One use less. A backend without any drains; which it is is returned then.
    pub(super) fn release<T: KernelTable<BackendId, Generation>>(
        &mut self,
        id: BackendId,
        live: &mut Table<BackendId, Generation, T>,
    ) -> Option<Identity> {
        let used = self.uses.get_mut(&id)?;
        used.runs -= 1;
        if used.runs > 0 {
            return None;
        }
        let identity = used.identity;
        self.uses.remove(&id);
        self.draining.insert(id, Some(identity));
        live.desire(id, live.desired(&id).unwrap_or_default().drained());
        Some(identity)
    }

    /// A backend that drains is gone, for everything that remembers it.
    pub(super) fn end<T: KernelTable<BackendId, Generation>>(
        &mut self,
        id: BackendId,
        live: &mut Table<BackendId, Generation, T>,
    ) {
        if let Some(identity) = self.draining.remove(id)
            && self.by_identity.get(&identity) == Some(&id)
        {
            self.by_identity.remove(&identity);
        }
        live.desire(id, live.desired(&id).unwrap_or_default().gone());
        self.gone.push_back(id);
    }
}
