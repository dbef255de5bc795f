//! Backends that datagrams go to no more: those that drain, and those that are gone. A packet and a socket that is not
//! connected ask anew each time; a connected UDP socket of the node's own processes has asked once, and is to be looked for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation};

use super::{Deletes, GRACE, KernelTable, Services, Table};
use crate::compile::BackendAddr;

/// Where sockets may lead to that are to be looked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Departed {
    /// Backends of UDP that have just begun to drain.
    These(BTreeSet<BackendAddr>),
    /// Nobody knows which: some may have gone while no agent ran.
    Any,
}

/// How long after a look that failed the next one is.
const RETRY: Duration = Duration::from_secs(30);

/// What is still to be looked for.
#[derive(Debug, Default)]
pub(super) struct Departures {
    /// By number and what it was then: a number may be another's before the second look.
    these: BTreeMap<(BackendId, u32), (BackendAddr, Look)>,
    any: Option<Look>,
}

/// Looked for twice: a program may have chosen the backend just before, and its socket is connected a little later.
#[derive(Clone, Copy, Debug)]
enum Look {
    First,
    Again(Instant),
}

impl Look {
    fn is_due(self, now: Instant) -> bool {
        match self {
            Self::First => true,
            Self::Again(since) => now.saturating_duration_since(since) >= GRACE,
        }
    }

    /// The look after this one.
    fn next(self, now: Instant) -> Option<Self> {
        match self {
            Self::First => Some(Self::Again(now)),
            Self::Again(_) => None,
        }
    }
}

impl Departures {
    /// A backend of UDP drains.
    pub(super) fn insert(&mut self, id: BackendId, drained: Generation, addr: BackendAddr) {
        self.these.insert((id, drained.0), (addr, Look::First));
    }

    /// The last look has failed.
    fn look_later(&mut self, now: Instant) {
        self.any = Some(Look::Again(now + RETRY));
    }

    /// Some may have gone before this start.
    pub(super) fn look_back(&mut self) {
        self.any = Some(Look::First);
    }

    fn take<T: KernelTable<BackendId, Generation>>(
        &mut self,
        now: Instant,
        live: &Table<BackendId, Generation, T>,
    ) -> Option<Departed> {
        let mut due = BTreeSet::new();
        self.these.retain(|(id, drained), (addr, look)| {
            let is_back =
                |now: Generation| now.is_usable() && now.is_same_backend(Generation(*drained));
            if live.desired(id).is_some_and(is_back) {
                return false;
            }
            // Until the row is written, sockets are still given this backend.
            if !live.is_settled(id) || !look.is_due(now) {
                return true;
            }
            due.insert(*addr);
            let next = look.next(now);
            next.map(|next| *look = next).is_some()
        });
        if let Some(look) = self.any
            && look.is_due(now)
        {
            self.any = look.next(now);
            return Some(Departed::Any);
        }
        (!due.is_empty()).then_some(Departed::These(due))
    }
}

impl<F, B, L> Services<F, B, L>
where
    F: KernelTable<FrontendKey, Frontend>,
    B: KernelTable<u32, Backend>,
    L: KernelTable<BackendId, Generation>,
{
    /// Where connected UDP sockets may lead to that are to be looked for now. Each backend is named twice, [`GRACE`] apart.
    pub fn take_departed(&mut self, now: Instant) -> Option<Departed> {
        match self.deletes {
            Deletes::Held => None,
            Deletes::Allowed => self.departures.take(now, &self.live),
        }
    }

    /// The kernel did not say, or did not end all: everything is looked at again, after a while.
    pub fn look_for_departed_later(&mut self, now: Instant) {
        self.departures.look_later(now);
    }
}
