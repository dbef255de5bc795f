//! Backends that no run holds any more although connections to them may go on: which they are, and when they are
//! gone.
//!
//! A number drains while the plan of its Service names its endpoint, and is gone a little later than that, or than the
//! Service: an endpoint that goes from one EndpointSlice to another is in neither for a moment. Before
//! every input is synced a plan may name too little, so nothing ends before. Numbers that drain never take the place
//! of a new backend: of those the longest drained ends first, see [`super::ids`].

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};

use weir_common::Protocol;
use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation};

use super::ids::Identity;
use super::{Deletes, GRACE, KernelTable, Services};
use crate::compile::{Owner, ServicePlan};

/// How long an endpoint is in no EndpointSlice before it counts as gone.
pub(super) const UNNAMED: Duration = Duration::from_secs(5);

/// Numbers that drain.
#[derive(Debug, Default)]
pub(super) struct Draining {
    entries: HashMap<BackendId, Entry>,
    /// Longest first.
    by_turn: BTreeMap<u64, BackendId>,
    by_service: BTreeSet<(u32, BackendId)>,
    next_turn: u64,
}

#[derive(Debug)]
struct Entry {
    turn: u64,
    /// Nobody knows it of those that an earlier process left: no run holds them, so nothing in the kernel tells whose they
    /// are, and whether that is still named. They end when no connection leads to them.
    identity: Option<Identity>,
    /// Since when nothing names it.
    unnamed: Option<Instant>,
}

impl Draining {
    pub(super) fn insert(&mut self, id: BackendId, identity: Option<Identity>) {
        let turn = self.next_turn;
        self.next_turn += 1;
        self.by_turn.insert(turn, id);
        if let Some(identity) = &identity {
            self.by_service.insert((identity.service, id));
        }
        let entry = Entry {
            turn,
            identity,
            unnamed: None,
        };
        self.entries.insert(id, entry);
    }

    /// It drains no longer. Returns whose it was, if it did drain and that is known.
    pub(super) fn remove(&mut self, id: BackendId) -> Option<Identity> {
        let Entry { turn, identity, .. } = self.entries.remove(&id)?;
        self.by_turn.remove(&turn);
        if let Some(identity) = &identity {
            self.by_service.remove(&(identity.service, id));
        }
        identity
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The one that has drained longest.
    pub(super) fn longest(&self) -> Option<BackendId> {
        self.by_turn.first_key_value().map(|(_, id)| *id)
    }

    /// Those of a Service, by its number.
    pub(super) fn of(&self, service: u32) -> impl Iterator<Item = (BackendId, &Identity)> {
        let ids = self.by_service.range((service, 0)..=(service, u32::MAX));
        ids.filter_map(|(_, id)| Some((*id, self.entries.get(id)?.identity.as_ref()?)))
    }

    /// Notes whether it is named. Has it not been for long?
    fn is_forgotten(&mut self, id: BackendId, is_named: bool, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(&id) else {
            return false;
        };
        if is_named {
            entry.unnamed = None;
            return false;
        }
        let since = *entry.unnamed.get_or_insert(now);
        now.saturating_duration_since(since) >= UNNAMED
    }

    /// Those of whom nobody knows whose they are.
    pub(super) fn unknown(&self) -> impl Iterator<Item = BackendId> {
        let entries = self.entries.iter();
        entries.filter_map(|(id, entry)| entry.identity.is_none().then_some(*id))
    }
}

impl<F, B, L> Services<F, B, L>
where
    F: KernelTable<FrontendKey, Frontend>,
    B: KernelTable<u32, Backend>,
    L: KernelTable<BackendId, Generation>,
{
    /// One use of a backend less. Without any it drains, and whether it goes on with that is seen when the pass is
    /// nearly over: [`Self::end_unnamed`].
    pub(super) fn release(&mut self, id: BackendId) {
        let Some(drains) = self.ids.release(id, &mut self.live) else {
            return;
        };
        self.undecided.insert(drains.service);
        if drains.protocol == Protocol::UDP {
            let drained = self.live.desired(&id).unwrap_or_default();
            self.departures.insert(id, drained, drains.addr);
        }
    }

    /// A Service that has no address here is given no number. What drains of it may have one all the same, from when it
    /// had some.
    pub(super) fn recognize(&mut self, plan: &ServicePlan) {
        let needs_none = plan.draining.is_empty() || !plan.frontends.is_empty();
        if needs_none || self.numbers.contains_key(&plan.id) {
            return;
        }
        if let Some(number) = self.left_number(&plan.id) {
            self.numbers.insert(plan.id.clone(), number);
            self.names.insert(number, plan.id.clone());
        }
    }

    /// The number under which the kernel has what a Service led to, although it has none of those addresses any more.
    /// Numbers come from names: it is somebody else's only if two names have nearly the same hash.
    pub(super) fn left_number(&self, name: &Owner) -> Option<u32> {
        let is_left =
            |number: &u32| self.found_numbers.contains(number) && !self.names.contains_key(number);
        name.first_numbers().find(is_left)
    }

    /// Ends what drains and has not been named for a while.
    pub(super) fn end_unnamed(&mut self, now: Instant) {
        if self.deletes == Deletes::Held {
            return;
        }
        for service in std::mem::take(&mut self.undecided) {
            let plan = self.names.get(&service).and_then(|n| self.plans.get(n));
            let is_named = |it: &Identity| plan.is_some_and(|p| p.names(it.protocol, &it.addr));
            let draining = self.ids.draining().of(service);
            let draining: Vec<_> = draining.map(|(id, it)| (id, is_named(it))).collect();
            for (id, is_named) in draining {
                if self.ids.draining_mut().is_forgotten(id, is_named, now) {
                    self.ids.end(id, &mut self.live);
                } else if !is_named {
                    self.undecided.insert(service);
                }
            }
        }
    }

    /// Ends what drains for nobody knows whom and has no connection, given those that there are since some time.
    pub fn end_unled(&mut self, since: Instant, led_to: &HashSet<(BackendId, Generation)>) {
        // A program may have chosen it just before.
        if self.unknown_since.is_none_or(|it| since < it + GRACE) {
            return;
        }
        for id in self.ids.draining().unknown().collect::<Vec<_>>() {
            let generation = self.live.desired(&id).unwrap_or_default().usable();
            if !led_to.contains(&(id, generation)) {
                self.ids.end(id, &mut self.live);
            }
        }
    }
}
