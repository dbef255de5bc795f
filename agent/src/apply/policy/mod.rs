//! Policy: from rows to rows, in an order in which every intermediate state is safe. Which rows there
//! should be is the compiler's business.
//!
//! Rows that nothing points to yet come first (ports, then verdicts), then the addresses' classes, then
//! the rule lists of the pods, then the epoch, by which every flow is judged again; what nothing points
//! to any more goes last, after a time of grace of its own: however often something changes, what it leaves behind
//! goes. A stage that fails ends the pass, and the next pass goes on there.

mod retired;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use weir_common::device::{Device, LocalPod};
use weir_common::policy::{Action, Class, PortKey, PortRow, RulesId, VerdictKey, VerdictRow};
use weir_common::table::EPOCH_INDEX;
use weir_common::{Addr, Prefix};

use self::retired::Retired;
use super::devices::{Devices, Outcome};
use super::status::{Deletes, Fill, Status};
use super::table::{Comparison, KernelTable, Table, TableError, Written};
use crate::compile::policy::Step;
use crate::compile::{PodRules, PolicyRows};
use crate::model::ObjectName;

/// All policy of the node. Written by one task only.
#[derive(Debug)]
pub struct Policies<C, B, V, P, E> {
    classes: Table<Addr, Class, C>,
    cidrs: Table<Prefix, Class, B>,
    verdicts: Table<VerdictKey, VerdictRow, V>,
    ports: Table<PortKey, PortRow, P>,
    epoch: Table<u32, u32, E>,

    pods: BTreeMap<ObjectName, PodRules>,
    /// Those about which no policy says anything.
    others: BTreeSet<ObjectName>,
    /// What comes when the rows that are desired now are there.
    steps: VecDeque<Step>,
    /// Has anything fitted since the start? Until then what the kernel holds is what an earlier agent wanted.
    has_target: bool,
    /// The epoch to begin with if the kernel has none.
    first_epoch: u32,
    /// Something that flows have been judged by has changed, or is about to.
    epoch_due: EpochDue,
    /// Rows that nothing points to any more.
    retired_verdicts: Retired<VerdictKey>,
    retired_ports: Retired<PortKey>,
    deletes: Deletes,
    status: Status,
}

/// Must flows be judged again?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum EpochDue {
    No,
    Yes,
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PolicyPass {
    /// Rows written or removed.
    pub rows: usize,
    pub outcome: Outcome,
}

impl<C, B, V, P, E> Policies<C, B, V, P, E>
where
    C: KernelTable<Addr, Class>,
    B: KernelTable<Prefix, Class>,
    V: KernelTable<VerdictKey, VerdictRow>,
    P: KernelTable<PortKey, PortRow>,
    E: KernelTable<u32, u32>,
{
    /// Starts from what the kernel holds. The first pass bumps the epoch: the process before this one
    /// may have died between a change and its epoch.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn resume(
        classes: C,
        cidrs: B,
        verdicts: V,
        ports: P,
        epoch: E,
    ) -> Result<Self, TableError> {
        Ok(Self {
            classes: Table::resume("CLASSES", classes)?,
            cidrs: Table::resume("CIDRS", cidrs)?,
            verdicts: Table::resume("VERDICTS", verdicts)?,
            ports: Table::resume("PORTS", ports)?,
            epoch: Table::resume("EPOCH", epoch)?,
            pods: BTreeMap::new(),
            others: BTreeSet::new(),
            steps: VecDeque::new(),
            has_target: false,
            first_epoch: 1,
            epoch_due: EpochDue::Yes,
            retired_verdicts: Retired::default(),
            retired_ports: Retired::default(),
            deletes: Deletes::Held,
            status: Status::Pending,
        })
    }

    /// If the kernel has no epoch, it begins with this one: none that a flow remembers from a table of another
    /// layout.
    #[must_use]
    pub fn beginning_with(mut self, first: u32) -> Self {
        self.first_epoch = first;
        self
    }

    /// Exactly these rows should be there, whatever was on its way.
    ///
    /// # Errors
    /// They do not fit beside those that the kernel still holds: half a policy is none, and what was there before holds.
    pub fn desire_exactly(&mut self, mut rows: PolicyRows) -> Result<(), String> {
        let mut crossings = self.crossings(&rows);
        let with_crossings = rows.verdicts.keys().chain(crossings.keys());
        if shortage(&self.verdicts, with_crossings).is_some() {
            crossings.clear();
        }
        rows.verdicts.extend(&crossings);
        let shortages = [
            shortage(&self.classes, rows.classes.keys()),
            shortage(&self.cidrs, rows.cidrs.keys()),
            shortage(&self.verdicts, rows.verdicts.keys()),
            shortage(&self.ports, rows.ports.keys()),
        ];
        if let Some(shortage) = shortages.into_iter().flatten().next() {
            return Err(shortage);
        }
        let gone = crossings.into_keys().map(|key| (key, None)).collect();
        let after = Step {
            verdicts: gone,
            ..Step::default()
        };
        self.steps = [after]
            .into_iter()
            .filter(|it| *it != Step::default())
            .collect();
        self.classes.desire_exactly(rows.classes);
        self.cidrs.desire_exactly(rows.cidrs);
        self.ports.desire_exactly(rows.ports);
        self.verdicts.desire_exactly(rows.verdicts);
        self.pods = rows.rules;
        self.begin();
        Ok(())
    }

    /// Lists of an earlier agent that nobody has any more meet classes of ours before the pods have their new ones. What they would
    /// say nobody remembers, and it may be less than the world is told: no, for that moment, if there is room for so many rows.
    fn crossings(&self, rows: &PolicyRows) -> BTreeMap<VerdictKey, VerdictRow> {
        let ours: BTreeSet<RulesId> = rows.verdicts.keys().map(|key| key.rules).collect();
        let theirs = self.verdicts.all_actual().map(|(key, _)| key.rules);
        let theirs: BTreeSet<RulesId> = theirs.filter(|rules| !ours.contains(rules)).collect();
        let held = self.classes.all_actual().map(|(_, class)| *class);
        let held = held.chain(self.cidrs.all_actual().map(|(_, class)| *class));
        let held: BTreeSet<Class> = held.chain([Class::WORLD, Class::OWN_NODE]).collect();
        let news = rows.classes.values().chain(rows.cidrs.values()).copied();
        let news: BTreeSet<Class> = news.filter(|class| !held.contains(class)).collect();
        let pairs = theirs
            .into_iter()
            .flat_map(|rules| news.iter().map(move |class| (rules, *class)));
        let pairs = pairs.map(|(rules, class)| VerdictKey { rules, class });
        let is_new = |key: &VerdictKey| self.verdicts.actual(key).is_none();
        let denial = VerdictRow {
            action: Action::DENY,
            ..VerdictRow::default()
        };
        pairs.filter(is_new).map(|key| (key, denial)).collect()
    }

    /// These steps should be taken, each when the one before is done. None may be underway.
    ///
    /// # Errors
    /// Their rows do not fit beside those that the kernel still holds; what was there before holds.
    pub fn follow(&mut self, steps: Vec<Step>) -> Result<(), String> {
        let shortages = [
            shortage(&self.classes, put(&steps, |step| &step.classes)),
            shortage(&self.cidrs, put(&steps, |step| &step.cidrs)),
            shortage(&self.verdicts, put(&steps, |step| &step.verdicts)),
            shortage(&self.ports, put(&steps, |step| &step.ports)),
        ];
        if let Some(shortage) = shortages.into_iter().flatten().next() {
            return Err(shortage);
        }
        self.steps.extend(steps);
        self.take_step();
        Ok(())
    }

    /// These are open, whatever policy says of others.
    pub fn also_open(&mut self, others: BTreeSet<ObjectName>) {
        self.others = others;
    }

    /// Is something on its way that is not done?
    pub fn is_underway(&self) -> bool {
        self.has_target && self.status != Status::Done
    }

    /// Desires the rows of the next step. Is there one?
    fn take_step(&mut self) -> bool {
        let Some(step) = self.steps.pop_front() else {
            return false;
        };
        desire(&mut self.classes, step.classes);
        desire(&mut self.cidrs, step.cidrs);
        desire(&mut self.verdicts, step.verdicts);
        desire(&mut self.ports, step.ports);
        for (pod, rules) in step.pods {
            match rules {
                Some(rules) => self.pods.insert(pod, rules),
                None => self.pods.remove(&pod),
            };
        }
        self.begin();
        true
    }

    fn begin(&mut self) {
        self.has_target = true;
        self.status = Status::Pending;
        let (verdicts, ports) = (&self.verdicts, &self.ports);
        self.retired_verdicts
            .revive(|key| verdicts.desired(key).is_some());
        self.retired_ports
            .revive(|key| ports.desired(key).is_some());
    }

    /// Every input has been synced. Until then nothing is written at all: a policy that has not been
    /// said yet would open what it closes.
    pub fn allow_deletes(&mut self) {
        self.deletes = Deletes::Allowed;
    }

    /// Writes what is left to do, and has `devices` write with it. To be called after every change and
    /// every few seconds.
    pub fn reconcile<D, A>(&mut self, devices: &mut Devices<D, A>, now: Instant) -> PolicyPass
    where
        D: KernelTable<u32, Device>,
        A: KernelTable<Addr, LocalPod>,
    {
        if self.deletes == Deletes::Held || !self.has_target {
            let pass = devices.write();
            return PolicyPass {
                rows: pass.rows,
                outcome: Outcome::Unfinished,
            };
        }
        let mut rows = 0;
        loop {
            if let Err(reason) = self.advance(devices, now, &mut rows) {
                self.status = Status::Failed(reason);
                return PolicyPass {
                    rows,
                    outcome: Outcome::Unfinished,
                };
            }
            if !self.take_step() {
                break;
            }
        }
        self.status = Status::Done;
        PolicyPass {
            rows,
            outcome: Outcome::Complete,
        }
    }

    /// Reads the tables again: how many rows were not as we believed. The next pass repairs them.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn audit(&mut self) -> Result<usize, TableError> {
        let drifted = self.classes.audit()?.rows()
            + self.cidrs.audit()?.rows()
            + self.verdicts.audit()?.rows()
            + self.ports.audit()?.rows()
            + self.epoch.audit()?.rows();
        if drifted > 0 {
            self.epoch_due = EpochDue::Yes;
        }
        Ok(drifted)
    }

    /// Desired against kernel, by table. Changes nothing.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn compare(&mut self) -> Result<[(&'static str, Comparison); 4], TableError> {
        Ok([
            (self.classes.name(), self.classes.compare()?),
            (self.cidrs.name(), self.cidrs.compare()?),
            (self.verdicts.name(), compare(&mut self.verdicts)?),
            (self.ports.name(), compare(&mut self.ports)?),
        ])
    }

    /// How far the latest output of the compiler is.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// How full the tables are.
    pub fn fills(&self) -> [Fill; 4] {
        [
            self.classes.fill(),
            self.cidrs.fill(),
            self.verdicts.fill(),
            self.ports.fill(),
        ]
    }

    /// The epoch that the kernel holds.
    pub fn epoch(&self) -> u32 {
        self.epoch.actual(&EPOCH_INDEX).unwrap_or_default()
    }

    fn advance<D, A>(
        &mut self,
        devices: &mut Devices<D, A>,
        now: Instant,
        rows: &mut usize,
    ) -> Result<(), String>
    where
        D: KernelTable<u32, Device>,
        A: KernelTable<Addr, LocalPod>,
    {
        let mut pods = self.pods.clone();
        pods.extend(
            self.others
                .iter()
                .map(|pod| (pod.clone(), PodRules::default())),
        );
        devices.desire_rules(&pods);
        if self.changes_a_judgement() || devices.outdates_flows() {
            self.epoch_due = EpochDue::Yes;
        }
        finish("PORTS", self.ports.write(), rows)?;
        finish("VERDICTS", self.verdicts.write(), rows)?;
        finish("CLASSES", self.classes.write(), rows)?;
        finish("CIDRS", self.cidrs.write(), rows)?;
        finish("CLASSES", self.classes.remove_stale(), rows)?;
        finish("CIDRS", self.cidrs.remove_stale(), rows)?;
        // A row of a device that cannot be written is that pod's matter: it is closed, or judged as before.
        *rows += devices.write().rows;
        if self.epoch_due == EpochDue::Yes {
            let next = match self.epoch.actual(&EPOCH_INDEX) {
                None => self.first_epoch,
                Some(epoch) => epoch.wrapping_add(1),
            };
            let next = next.max(1);
            self.epoch.desire(EPOCH_INDEX, next);
            finish("EPOCH", self.epoch.write(), rows)?;
            self.epoch_due = EpochDue::No;
        }
        remove_retired(&mut self.verdicts, &mut self.retired_verdicts, now, rows)?;
        remove_retired(&mut self.ports, &mut self.retired_ports, now, rows)
    }

    /// A row that nothing points to yet changes no judgement.
    fn changes_a_judgement(&self) -> bool {
        fn replaces<K, V, T>(table: &Table<K, V, T>) -> bool
        where
            K: Copy + Ord + std::fmt::Debug,
            V: Copy + PartialEq,
            T: KernelTable<K, V>,
        {
            table
                .to_write()
                .iter()
                .any(|(key, _)| table.actual(key).is_some())
        }
        !self.classes.to_write().is_empty()
            || !self.classes.to_remove().is_empty()
            || !self.cidrs.to_write().is_empty()
            || !self.cidrs.to_remove().is_empty()
            || replaces(&self.verdicts)
            || replaces(&self.ports)
    }
}

/// The rows of a step.
fn desire<K, V, T>(table: &mut Table<K, V, T>, rows: BTreeMap<K, Option<V>>)
where
    K: Copy + Ord + std::fmt::Debug,
    V: Copy + PartialEq,
    T: KernelTable<K, V>,
{
    for (key, row) in rows {
        match row {
            Some(row) => table.desire(key, row),
            None => table.withdraw(&key),
        }
    }
}

/// The keys of all rows that steps write, each once.
fn put<'a, K: Ord + 'a, V: 'a>(
    steps: &'a [Step],
    of: impl Fn(&'a Step) -> &'a BTreeMap<K, Option<V>>,
) -> impl Iterator<Item = &'a K> {
    let rows = steps.iter().flat_map(of);
    let keys = rows.filter_map(|(key, row)| row.as_ref().map(|_| key));
    keys.collect::<BTreeSet<&K>>().into_iter()
}

/// Why these rows do not fit beside what the kernel holds.
fn shortage<'a, K, V, T>(
    table: &Table<K, V, T>,
    keys: impl Iterator<Item = &'a K>,
) -> Option<String>
where
    K: Copy + Ord + std::fmt::Debug + 'a,
    V: Copy + PartialEq,
    T: KernelTable<K, V>,
{
    let fill = table.fill();
    let needed = fill.rows + keys.filter(|key| table.actual(key).is_none()).count();
    (needed > fill.capacity).then(|| {
        format!(
            "{} has room for {} rows and would need {needed}: the previous policy stays in force",
            fill.table, fill.capacity
        )
    })
}

/// A row that waits for its time to go is not unexpected.
fn compare<K, V, T>(table: &mut Table<K, V, T>) -> Result<Comparison, TableError>
where
    K: Copy + Ord + std::fmt::Debug,
    V: Copy + PartialEq,
    T: KernelTable<K, V>,
{
    let retired = table.to_remove().len();
    let found = table.compare()?;
    Ok(Comparison {
        unexpected: found.unexpected.saturating_sub(retired),
        ..found
    })
}

/// Nothing points to rows that are not desired, since all that points anywhere has been written: they are retired, and
/// those that were retired long enough ago go.
fn remove_retired<K, V, T>(
    table: &mut Table<K, V, T>,
    retired: &mut Retired<K>,
    now: Instant,
    rows: &mut usize,
) -> Result<(), String>
where
    K: Copy + Ord + std::fmt::Debug,
    V: Copy + PartialEq,
    T: KernelTable<K, V>,
{
    retired.retire(table.to_remove(), now);
    let due = retired.due(now);
    let written = table.remove(&due);
    for key in due.iter().filter(|key| table.actual(key).is_none()) {
        retired.forget(key);
    }
    finish(table.name(), written, rows)
}

fn finish<K>(table: &'static str, written: Written<K>, rows: &mut usize) -> Result<(), String> {
    *rows += written.rows;
    match written.failed.first() {
        None => Ok(()),
        Some((_, cause)) => Err(format!(
            "{table}: {} rows could not be written: {cause}",
            written.failed.len()
        )),
    }
}
