//! Reading all numbers of Services back from the tables. Writes nothing but what is broken.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::time::Instant;

use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation, Segment};

use super::departed::Departures;
use super::ids::{BackendIds, Identity, NO_BACKEND};
use super::runs::Runs;
use super::{Deletes, KernelTable, Run, RunKind, Services, Statuses, Table, TableError};
use crate::apply::Origin;
use crate::compile::BackendAddr;

impl<F, B, L> Services<F, B, L>
where
    F: KernelTable<FrontendKey, Frontend>,
    B: KernelTable<u32, Backend>,
    L: KernelTable<BackendId, Generation>,
{
    /// Starts from what the kernel holds.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn resume(frontends: F, backends: B, live: L) -> Result<Self, TableError> {
        let (rows, ids) = (backends.capacity(), live.capacity());
        let mut services = Self {
            frontends: Table::resume("FRONTENDS", frontends)?,
            backends: Table::resume("BACKENDS", backends)?,
            live: Table::resume("LIVE", live)?,
            plans: BTreeMap::new(),
            owners: BTreeMap::new(),
            numbers: HashMap::new(),
            names: HashMap::new(),
            found_numbers: HashSet::new(),
            runs: Runs::new(u32::try_from(rows).unwrap_or(u32::MAX)),
            ids: BackendIds::new(u32::try_from(ids).unwrap_or(u32::MAX)),
            undecided: BTreeSet::new(),
            unknown_since: None,
            departures: Departures::default(),
            installed: BTreeMap::new(),
            prepared: BTreeMap::new(),
            retired: VecDeque::new(),
            unexplained: Vec::new(),
            dirty: BTreeSet::new(),
            failures: BTreeMap::new(),
            statuses: Statuses::new(),
            failed: BTreeSet::new(),
            unreported: BTreeSet::new(),
            news: BTreeSet::new(),
            deletes: Deletes::Held,
        };
        services.adopt_frontends();
        services.adopt_generations();
        services.set_unexplained_rows_aside();
        Ok(services)
    }

    /// Says that tables are of this start's making. What is in the others was written for another layout: flows,
    /// clients with affinity and sockets still remember backends by the numbers there.
    ///
    /// `first` is a generation that no table remembers.
    #[must_use]
    pub fn after_another_layout(
        mut self,
        frontends: Origin,
        live: Origin,
        first: Generation,
    ) -> Self {
        match live {
            Origin::Made => self.ids.begin_with(first),
            // Otherwise sockets remember generations of a table that nobody has.
            Origin::Kept => self.departures.look_back(),
        }
        if frontends == Origin::Made {
            let rows = self.unexplained.iter().filter_map(|segment| {
                let row = self.backends.actual(&segment.start)?;
                let addr = BackendAddr {
                    addr: row.addr,
                    port: row.port,
                };
                let is_live = self.live.actual(&row.id).is_some_and(|g| g.is_usable());
                is_live.then_some((addr, row.id))
            });
            self.ids.offer(rows.collect());
        }
        self
    }

    /// Backends that no run holds drain, whatever their row says: the process before this one died between two
    /// writes. Whose they are is not known, as with those that it left draining.
    pub(super) fn drain_unused_generations(&mut self, now: Instant) {
        let unused: Vec<(BackendId, Generation)> = self
            .live
            .all_desired()
            .map(|(id, generation)| (*id, *generation))
            .filter(|(id, generation)| generation.is_usable() && !self.ids.is_used(*id))
            .collect();
        self.ids.offer(HashMap::new());
        for (id, generation) in unused {
            self.live.desire(id, generation.drained());
            self.ids.adopt_draining(id);
        }
        if self.ids.draining().unknown().next().is_some() {
            self.unknown_since = Some(now);
        }
    }

    fn adopt_frontends(&mut self) {
        let found: Vec<(FrontendKey, Frontend)> = self
            .frontends
            .all_actual()
            .map(|(key, value)| (*key, *value))
            .collect();
        for (key, value) in found {
            self.frontends.desire(key, value);
            self.found_numbers.insert(value.service);
            let (backends, kind) = if !self.runs.claim(value.segment) {
                (Vec::new(), RunKind::Overlapping)
            } else if let Some(backends) = self.read_run(&value) {
                (backends, RunKind::Own)
            } else {
                (Vec::new(), RunKind::Broken)
            };
            let run = Run {
                value,
                backends,
                kind,
            };
            for (addr, id) in &run.backends {
                let identity = Identity {
                    service: value.service,
                    addr: *addr,
                    protocol: key.protocol,
                };
                self.ids.adopt(*id, identity);
            }
            let rows: Vec<(u32, Backend)> = run.rows().collect();
            for (index, row) in rows {
                self.backends.desire(index, row);
            }
            self.installed.insert(key, run);
        }
    }

    /// The backends of a run, if every row of it makes sense.
    fn read_run(&self, value: &Frontend) -> Option<Vec<(BackendAddr, BackendId)>> {
        let end = value.segment.start.checked_add(value.segment.len)?;
        let capacity = self.live.fill().capacity;
        (value.segment.start..end)
            .map(|index| {
                let row = self.backends.actual(&index)?;
                let addr = BackendAddr {
                    addr: row.addr,
                    port: row.port,
                };
                let usable = row.id != NO_BACKEND && (row.id as usize) < capacity && row.flags == 0;
                usable.then_some((addr, row.id))
            })
            .collect()
    }

    /// A program may still be reading a run that the process before this one had just replaced, and one of
    /// another layout reads by its own table of frontends.
    fn set_unexplained_rows_aside(&mut self) {
        let found: Vec<(u32, Backend)> = self
            .backends
            .all_actual()
            .map(|(index, row)| (*index, *row))
            .collect();
        for (index, row) in found {
            let segment = Segment {
                start: index,
                len: 1,
            };
            if self.runs.claim(segment) {
                self.backends.desire(index, row);
                self.unexplained.push(segment);
            }
        }
    }

    fn adopt_generations(&mut self) {
        let found: Vec<(BackendId, Generation)> = self
            .live
            .all_actual()
            .map(|(id, generation)| (*id, *generation))
            .collect();
        // What an empty row of `BACKENDS` says is no backend, whatever somebody has written there.
        self.live.desire(NO_BACKEND, Generation::default().gone());
        for (id, generation) in found {
            if id == NO_BACKEND {
                continue;
            }
            self.live.desire(id, generation);
            if self.ids.is_used(id) || generation.is_usable() {
                self.ids.pass_over(id);
            } else if generation.is_draining() {
                self.ids.adopt_draining(id);
            } else {
                self.ids.adopt_gone(id);
            }
        }
        let used: Vec<BackendId> = self.ids.used().collect();
        for id in used {
            let generation = self.live.actual(&id).unwrap_or_default();
            if generation.is_draining() {
                self.live.desire(id, generation.usable());
            } else if generation.is_gone() {
                self.live.desire(id, generation.next());
            }
        }
    }
}
