//! Services: from plans to rows of `FRONTENDS`, `BACKENDS` and `LIVE`, in an order in which every
//! intermediate state is right. Which backends a frontend has, and who has an address that several ask for, is
//! the compiler's business: two plans never have the same frontend.
//!
//! A frontend is changed by writing a fresh run of `BACKENDS` and then replacing its one row of
//! `FRONTENDS`. A process that dies between any two writes leaves tables that are right, and the next
//! one resumes from them: all numbers are read back, so what has not changed is not written.

mod departed;
mod draining;
mod ids;
#[cfg(test)]
mod layout_tests;
mod resume;
mod runs;
mod statuses;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation, Segment};

pub use self::departed::Departed;
use self::departed::Departures;
use self::ids::{BackendIds, Identity};
use self::runs::Runs;
use super::status::{Deletes, Fill, Status, Statuses};
use super::table::{Comparison, KernelTable, Table, TableError};
use crate::compile::{BackendAddr, FrontendPlan, Owner, ServicePlan, Way};

/// How long a run is left alone after no frontend points to it: a program that read the old row of
/// `FRONTENDS` is done with it long before. Programs take microseconds; a CPU may be taken away from
/// a virtual machine for longer.
pub const GRACE: Duration = Duration::from_secs(1);

/// All Services of the node. Written by one task only.
#[derive(Debug)]
pub struct Services<F, B, L> {
    frontends: Table<FrontendKey, Frontend, F>,
    backends: Table<u32, Backend, B>,
    live: Table<BackendId, Generation, L>,

    plans: BTreeMap<Owner, Arc<ServicePlan>>,
    /// In whose plan a frontend is.
    owners: BTreeMap<FrontendKey, Owner>,

    numbers: HashMap<Owner, u32>,
    names: HashMap<u32, Owner>,
    /// Numbers that rows of `FRONTENDS` had at the start, whosever they are.
    found_numbers: HashSet<u32>,
    runs: Runs,
    ids: BackendIds,
    /// Services, by number, of whose draining backends one may be gone.
    undecided: BTreeSet<u32>,
    /// Since when numbers drain for nobody knows whom, if any do.
    unknown_since: Option<Instant>,
    departures: Departures,

    /// What rows of `FRONTENDS` point to.
    installed: BTreeMap<FrontendKey, Run>,
    /// Runs on their way into the kernel, to which no row points yet.
    prepared: BTreeMap<FrontendKey, Run>,
    retired: VecDeque<(Instant, Segment)>,
    /// Rows that no frontend pointed to at the start. Programs of another layout may read them until
    /// ours are in their place.
    unexplained: Vec<Segment>,

    dirty: BTreeSet<FrontendKey>,
    failures: BTreeMap<FrontendKey, String>,
    statuses: Statuses<Owner>,
    failed: BTreeSet<Owner>,
    /// Whose plan has changed since statuses were last brought up to date.
    unreported: BTreeSet<Owner>,
    /// Who has failed, failed otherwise or no longer fails since somebody asked.
    news: BTreeSet<Owner>,
    deletes: Deletes,
}

/// A frontend's value, and the run that it points to.
#[derive(Clone, Debug)]
struct Run {
    value: Frontend,
    backends: Vec<(BackendAddr, BackendId)>,
    kind: RunKind,
}

/// Whose are the rows of a run?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum RunKind {
    /// This frontend's.
    Own,
    /// Those of the run that is installed: only the frontend's flags or affinity change.
    Installed,
    /// This frontend's, but found in the kernel with contents that make no sense. Equals no plan.
    Broken,
    /// Found in the kernel where it cannot be. Equals no plan.
    Overlapping,
}

/// A change of one Service.
#[derive(Clone, Debug)]
pub enum ServiceChange {
    Planned(Arc<ServicePlan>),
    Deleted(Owner),
}

/// What follows from claims ([`crate::compile::claims::Delta::plans`]).
impl From<(Owner, Option<Arc<ServicePlan>>)> for ServiceChange {
    fn from((owner, plan): (Owner, Option<Arc<ServicePlan>>)) -> Self {
        plan.map_or(Self::Deleted(owner), Self::Planned)
    }
}

/// What a pass did.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Pass {
    /// Rows written or removed.
    pub rows: usize,
    /// Frontends that are not yet as they should be; the next pass tries again.
    pub unfinished: usize,
}

impl<F, B, L> Services<F, B, L>
where
    F: KernelTable<FrontendKey, Frontend>,
    B: KernelTable<u32, Backend>,
    L: KernelTable<BackendId, Generation>,
{
    /// Takes the changes in and writes what follows from them.
    pub fn apply(
        &mut self,
        changes: impl IntoIterator<Item = impl Into<ServiceChange>>,
        now: Instant,
    ) -> Pass {
        for change in changes {
            match change.into() {
                ServiceChange::Planned(plan) => self.plan(plan),
                ServiceChange::Deleted(name) => self.forget(&name),
            }
        }
        self.tick(now)
    }

    /// Tries again what failed, and reuses runs whose time of grace is over. To be called every few
    /// seconds, and cheap when there is nothing to do.
    pub fn tick(&mut self, now: Instant) -> Pass {
        let mut touched = self.dirty.clone();
        touched.extend(self.failures.keys().copied());
        self.failures.clear();

        self.prepare();
        let mut rows = self.live.write().rows + self.backends.write().rows;
        rows += self.publish(now);
        rows += self.remove(now);
        self.end_unnamed(now);
        rows += self.live.write().rows;
        rows += self.reuse(now);

        self.report(&touched);
        Pass {
            rows,
            unfinished: self.dirty.len(),
        }
    }

    /// Every input has been synced, and no program of another layout is left: what nobody asks for may go.
    pub fn allow_deletes(&mut self, now: Instant) {
        if self.deletes == Deletes::Allowed {
            return;
        }
        self.deletes = Deletes::Allowed;
        let unexplained = std::mem::take(&mut self.unexplained);
        self.retired
            .extend(unexplained.into_iter().map(|segment| (now, segment)));
        self.dirty.extend(
            self.installed
                .keys()
                .filter(|key| !self.owners.contains_key(key)),
        );
        self.drain_unused_generations(now);
    }

    /// Reads the tables again: how many rows were not as we believed. The next [`Services::tick`]
    /// repairs them.
    pub fn audit(&mut self) -> Result<usize, TableError> {
        Ok(self.live.audit()?.rows()
            + self.backends.audit()?.rows()
            + self.frontends.audit()?.rows())
    }

    /// Desired against kernel, by table. Changes nothing.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn compare(&mut self) -> Result<[(&'static str, Comparison); 3], TableError> {
        Ok([
            (self.frontends.name(), self.frontends.compare()?),
            (self.backends.name(), self.backends.compare()?),
            (self.live.name(), self.live.compare()?),
        ])
    }

    /// What every Service should be.
    pub fn plans(&self) -> impl Iterator<Item = &ServicePlan> {
        self.plans.values().map(Arc::as_ref)
    }

    /// What the kernel holds: frontends, and the number of whom each belongs to.
    pub fn held(&self) -> impl Iterator<Item = (FrontendKey, u32)> {
        let installed = self.installed.iter();
        installed.map(|(key, run)| (*key, run.value.service))
    }

    /// How full the three tables are.
    pub fn fills(&self) -> [Fill; 3] {
        [
            self.frontends.fill(),
            self.backends.fill(),
            self.live.fill(),
        ]
    }

    /// The Service that a number in a row stands for.
    pub fn name_of(&self, number: u32) -> Option<&Owner> {
        self.names.get(&number)
    }

    /// What the kernel holds for a frontend.
    pub fn backends_of(&self, key: &FrontendKey) -> Option<impl Iterator<Item = BackendAddr> + '_> {
        self.installed
            .get(key)
            .map(|run| run.backends.iter().map(|(addr, _)| *addr))
    }

    fn plan(&mut self, plan: Arc<ServicePlan>) {
        let name = plan.id.clone();
        let old = self.plans.insert(name.clone(), plan.clone());
        for frontend in &plan.frontends {
            let before = old.as_ref().and_then(|old| old.frontend(&frontend.key));
            let owner = self.owners.insert(frontend.key, name.clone());
            if before != Some(frontend) || owner.as_ref() != Some(&name) {
                self.dirty.insert(frontend.key);
            }
        }
        let frontends = old.iter().flat_map(|old| &old.frontends);
        for gone in frontends.filter(|f| plan.frontend(&f.key).is_none()) {
            self.give_up(&name, &gone.key);
        }
        self.recognize(&plan);
        self.undecided.extend(self.numbers.get(&name));
        self.unreported.insert(name);
    }

    fn forget(&mut self, name: &Owner) {
        let old = self.plans.remove(name);
        for gone in old.iter().flat_map(|old| &old.frontends) {
            self.give_up(name, &gone.key);
        }
        if let Some(number) = self.numbers.remove(name) {
            self.names.remove(&number);
            self.undecided.insert(number);
        }
        self.statuses.remove(name);
        self.unreported.remove(name);
        if self.failed.remove(name) {
            self.news.insert(name.clone());
        }
    }

    /// A frontend that is in no plan any more, unless it is in another one already.
    fn give_up(&mut self, name: &Owner, key: &FrontendKey) {
        self.dirty.insert(*key);
        if self.owners.get(key) == Some(name) {
            self.owners.remove(key);
        }
    }

    /// Puts fresh runs, and the generations of new backends, among the desired rows.
    fn prepare(&mut self) {
        for key in self.dirty.clone() {
            let Some((name, wanted)) = self.wanted(&key) else {
                self.discard(&key);
                continue;
            };
            let number = self.number(&name);
            if let Some(run) = self.installed.get(&key)
                && run.equals(number, &wanted)
            {
                self.frontends.desire(key, run.value);
                self.discard(&key);
                self.dirty.remove(&key);
                continue;
            }
            if self.deletes == Deletes::Held && self.would_lose_backends(&key, &wanted) {
                self.discard(&key);
                continue;
            }
            if self
                .prepared
                .get(&key)
                .is_some_and(|run| run.equals(number, &wanted))
            {
                continue;
            }
            self.discard(&key);
            match self.fresh_run(number, &wanted) {
                Ok(run) => {
                    self.prepared.insert(key, run);
                }
                Err(reason) => {
                    self.failures.insert(key, reason);
                }
            }
        }
    }

    /// Points frontends to the runs that the kernel holds completely.
    fn publish(&mut self, now: Instant) -> usize {
        let mut ready = Vec::new();
        for (key, run) in &self.prepared {
            if self.is_written(run) {
                self.frontends.desire(*key, run.value);
                ready.push(*key);
            } else {
                self.failures
                    .insert(*key, "its backends could not be written".into());
            }
        }
        let written = self.frontends.write();
        for (key, cause) in written.failed {
            self.failures.insert(key, format!("FRONTENDS: {cause}"));
        }
        for key in ready {
            if self.frontends.is_settled(&key) {
                let Some(mut run) = self.prepared.remove(&key) else {
                    continue;
                };
                let shared = run.kind == RunKind::Installed;
                run.kind = RunKind::Own;
                match self.installed.insert(key, run) {
                    Some(old) if !shared => self.retire(old, now),
                    _ => {}
                }
                self.dirty.remove(&key);
            } else {
                match self.installed.get(&key) {
                    Some(run) => self.frontends.desire(key, run.value),
                    None => self.frontends.withdraw(&key),
                }
            }
        }
        written.rows
    }

    /// Takes out the frontends that nobody asks for.
    fn remove(&mut self, now: Instant) -> usize {
        if self.deletes == Deletes::Held {
            return 0;
        }
        let unclaimed: Vec<FrontendKey> = self
            .dirty
            .iter()
            .filter(|key| !self.owners.contains_key(key))
            .copied()
            .collect();
        for key in &unclaimed {
            self.frontends.withdraw(key);
        }
        let written = self.frontends.remove_stale();
        for (key, cause) in written.failed {
            self.failures.insert(key, format!("FRONTENDS: {cause}"));
        }
        for key in unclaimed {
            if self.frontends.is_settled(&key) {
                if let Some(run) = self.installed.remove(&key) {
                    self.retire(run, now);
                }
                self.dirty.remove(&key);
            }
        }
        written.rows
    }

    /// Frees the runs that no program can be reading any more.
    fn reuse(&mut self, now: Instant) -> usize {
        while let Some((since, segment)) = self.retired.front().copied()
            && now.saturating_duration_since(since) >= GRACE
        {
            self.retired.pop_front();
            self.free(segment);
        }
        match self.deletes {
            Deletes::Held => 0,
            Deletes::Allowed => self.backends.remove_stale().rows,
        }
    }

    /// The plan that has the frontend, and whose it is.
    fn wanted(&self, key: &FrontendKey) -> Option<(Owner, FrontendPlan)> {
        let name = self.owners.get(key)?;
        let frontend = self.plans.get(name)?.frontend(key)?;
        Some((name.clone(), frontend.clone()))
    }

    /// The number of a Service: what the kernel has it under, or a new one.
    fn number(&mut self, name: &Owner) -> u32 {
        if let Some(&number) = self.numbers.get(name) {
            return number;
        }
        let frontends = self.plans.get(name).map(|p| p.frontends.as_slice());
        let rows = frontends.into_iter().flatten().filter_map(|frontend| {
            let number = self.installed.get(&frontend.key)?.value.service;
            Some((frontend.way, number))
        });
        // A row of before may be another's who had the address, but for a cluster IP.
        let is_its_own = |way: Way, number: u32| match way {
            Way::ClusterIp if self.deletes == Deletes::Held => true,
            _ => name.first_numbers().any(|own| own == number),
        };
        let known = rows
            .filter(|(way, number)| *number != 0 && is_its_own(*way, *number))
            .map(|(_, number)| number)
            .find(|number| !self.names.contains_key(number));
        let known = known.or_else(|| self.left_number(name));
        let number = known.unwrap_or_else(|| {
            let is_taken = |number: &u32| {
                self.names.contains_key(number) || self.found_numbers.contains(number)
            };
            name.numbers()
                .find(|number| !is_taken(number))
                .unwrap_or_default()
        });
        self.numbers.insert(name.clone(), number);
        self.names.insert(number, name.clone());
        number
    }

    fn would_lose_backends(&self, key: &FrontendKey, wanted: &FrontendPlan) -> bool {
        self.installed.get(key).is_some_and(|run| {
            run.backends
                .iter()
                .any(|(addr, _)| !wanted.backends.contains(addr))
        })
    }

    fn fresh_run(&mut self, service: u32, wanted: &FrontendPlan) -> Result<Run, String> {
        let value = |segment| Frontend {
            service,
            segment,
            affinity: wanted.affinity,
            flags: wanted.flags,
            port: wanted.port,
            pad: Default::default(),
        };
        if let Some(run) = self.installed.get(&wanted.key)
            && run.kind == RunKind::Own
            && run.value.service == service
            && run.leads_to(&wanted.backends)
        {
            return Ok(Run {
                value: value(run.value.segment),
                backends: run.backends.clone(),
                kind: RunKind::Installed,
            });
        }
        let identity = |addr: &BackendAddr| Identity {
            service,
            addr: *addr,
            protocol: wanted.key.protocol,
        };
        let segment = u32::try_from(wanted.backends.len())
            .ok()
            .and_then(|len| self.runs.allocate(len))
            .ok_or_else(|| format!("BACKENDS has no room for {}", wanted.backends.len()))?;
        if !self.ids.have_room(wanted.backends.iter().map(identity)) {
            self.runs.free(segment);
            return Err(format!(
                "LIVE has no room for all of {} backends",
                wanted.backends.len()
            ));
        }
        // Those that have a number first: a new one must not take it from them while they drain.
        let known: Vec<(&BackendAddr, Option<BackendId>)> = wanted
            .backends
            .iter()
            .map(|addr| (addr, self.ids.acquire_known(identity(addr), &mut self.live)))
            .collect();
        let mut backends = Vec::with_capacity(known.len());
        let mut is_complete = true;
        for (addr, known) in known {
            match known.or_else(|| self.ids.acquire_new(identity(addr), &mut self.live)) {
                Some(id) => backends.push((*addr, id)),
                None => is_complete = false,
            }
        }
        if !is_complete {
            for (_, id) in backends {
                self.release(id);
            }
            self.runs.free(segment);
            return Err("LIVE has no free number for another backend".into());
        }
        let run = Run {
            value: value(segment),
            backends,
            kind: RunKind::Own,
        };
        for (index, row) in run.rows() {
            self.backends.desire(index, row);
        }
        Ok(run)
    }

    fn is_written(&self, run: &Run) -> bool {
        run.rows()
            .all(|(index, row)| self.backends.actual(&index) == Some(row))
            && run.backends.iter().all(|(_, id)| {
                self.live.is_settled(id) && self.live.actual(id).is_some_and(|g| g.is_usable())
            })
    }

    /// Drops a run that was never published.
    fn discard(&mut self, key: &FrontendKey) {
        let Some(run) = self.prepared.remove(key) else {
            return;
        };
        if run.kind != RunKind::Own {
            return;
        }
        for (_, id) in &run.backends {
            self.release(*id);
        }
        self.free(run.value.segment);
    }

    fn retire(&mut self, run: Run, now: Instant) {
        for (_, id) in &run.backends {
            self.release(*id);
        }
        if run.kind != RunKind::Overlapping && run.value.segment.len > 0 {
            self.retired.push_back((now, run.value.segment));
        }
    }

    fn free(&mut self, segment: Segment) {
        for index in segment.start..segment.start + segment.len {
            self.backends.withdraw(&index);
        }
        self.runs.free(segment);
    }
}

impl Run {
    fn equals(&self, service: u32, wanted: &FrontendPlan) -> bool {
        !matches!(self.kind, RunKind::Broken | RunKind::Overlapping)
            && self.value.service == service
            && self.value.affinity == wanted.affinity
            && self.value.flags == wanted.flags
            && self.value.port == wanted.port
            && self.leads_to(&wanted.backends)
    }

    fn leads_to(&self, backends: &[BackendAddr]) -> bool {
        self.backends.iter().map(|(addr, _)| addr).eq(backends)
    }

    /// The rows of `BACKENDS` that it consists of.
    fn rows(&self) -> impl Iterator<Item = (u32, Backend)> + '_ {
        let rows = self.backends.iter().map(|(addr, id)| Backend {
            addr: addr.addr,
            port: addr.port,
            flags: 0,
            id: *id,
        });
        (self.value.segment.start..).zip(rows)
    }
}
