//! What a source has said of one kind, object by object: so that a new list tells what is gone, and so
//! that an object which can no longer be understood keeps its last good state, which an earlier run may have saved.

use std::collections::{BTreeMap, HashMap, hash_map};

use crate::model::convert::{Converted, Invalid};
use crate::model::{Change, Interner, Kind, Object, ObjectId, ObjectName};

/// What was said of one kind.
#[derive(Debug)]
pub struct Ledger {
    kind: Kind,
    names: Interner,
    list: u32,
    /// By the name that the object itself has, so that it is held once.
    entries: HashMap<ObjectName, Entry>,
    /// What an earlier run saved, until the first list is complete: the last good state of what is not
    /// understood any more, and what stands in for a list that does not come.
    saved: HashMap<ObjectName, Object>,
    /// Reports that stand, of the few objects that have some: name of the object or part, and reason.
    reports: HashMap<ObjectName, BTreeMap<String, String>>,
}

#[derive(Debug, Default)]
struct Entry {
    /// The list in which it was last seen.
    list: u32,
    held: Held,
}

/// What the reader of the changes holds of an object.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Held {
    #[default]
    Nothing,
    /// The stand-in of an object that was never understood.
    StandIn,
    Good,
}

impl Held {
    fn of(object: &Object) -> Self {
        match object.is_stand_in() {
            true => Self::StandIn,
            false => Self::Good,
        }
    }
}

impl Ledger {
    /// Nothing said yet. What is said shares `names` with other kinds.
    pub fn new(kind: Kind, names: Interner) -> Self {
        Self {
            kind,
            names,
            list: 0,
            entries: HashMap::new(),
            saved: HashMap::new(),
            reports: HashMap::new(),
        }
    }

    /// What an earlier run saved of the kind, to be told before anything else is.
    #[must_use]
    pub fn with_saved(mut self, saved: Vec<Object>) -> Self {
        self.saved = saved.into_iter().map(|it| (it.id().name, it)).collect();
        self
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Before the first list is complete: what is saved was there then, and is to be gone by until it is.
    /// What the list at hand has said already goes before.
    pub fn stand_in(&mut self, out: &mut Vec<Change>) {
        for (_, mut object) in std::mem::take(&mut self.saved) {
            self.names.intern(&mut object);
            if let hash_map::Entry::Vacant(entry) = self.entries.entry(object.id().name) {
                entry.insert(Entry {
                    list: self.list.wrapping_sub(1),
                    held: Held::of(&object),
                });
                out.push(Change::Applied(object));
            }
        }
        out.push(Change::Synced(self.kind));
    }

    /// A list begins; it need not come to its end.
    pub fn begin_list(&mut self) {
        self.list = self.list.wrapping_add(1);
    }

    /// The list is complete: what was not in it is gone.
    pub fn finish_list(&mut self, out: &mut Vec<Change>) {
        let gone: Vec<_> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.list != self.list)
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.deleted(&name, out);
        }
        self.saved = HashMap::new();
        out.push(Change::Synced(self.kind));
    }

    /// The object exists, and is like this.
    pub fn applied(
        &mut self,
        mut name: ObjectName,
        mut outcome: Result<Converted, Invalid>,
        out: &mut Vec<Change>,
    ) {
        let object = match &mut outcome {
            Ok(converted) => &mut converted.object,
            Err(invalid) => &mut invalid.closed,
        };
        if let Some(object) = object {
            self.names.intern(object);
            name = object.id().name;
        }
        let id = ObjectId {
            kind: self.kind,
            name: name.clone(),
        };
        let saved = self.saved.remove(&name);
        let entry = self.entries.entry(name.clone()).or_default();
        entry.list = self.list;
        let reports = match outcome {
            Ok(converted) => {
                match converted.object {
                    Some(object) => {
                        entry.held = Held::Good;
                        out.push(Change::Applied(object));
                    }
                    None if entry.held != Held::Nothing => {
                        entry.held = Held::Nothing;
                        out.push(Change::Deleted(id.clone()));
                    }
                    None => {}
                }
                converted
                    .problems
                    .into_iter()
                    .map(|p| (format!("{id} {}", p.part), p.reason))
                    .collect()
            }
            Err(invalid) => {
                let (good, stand_in) = match saved {
                    Some(saved) if saved.is_stand_in() => (None, Some(saved)),
                    other => (other, None),
                };
                if entry.held != Held::Good
                    && let Some(mut object) = good.or(invalid.closed).or(stand_in)
                {
                    self.names.intern(&mut object);
                    entry.held = Held::of(&object);
                    out.push(Change::Applied(object));
                }
                BTreeMap::from([(id.to_string(), invalid.reason)])
            }
        };
        let before = self.reports.remove(&name).unwrap_or_default();
        diff_reports(&before, &reports, out);
        if !reports.is_empty() {
            self.reports.insert(name, reports);
        }
    }

    /// The object is gone.
    pub fn deleted(&mut self, name: &ObjectName, out: &mut Vec<Change>) {
        self.saved.remove(name);
        let Some(entry) = self.entries.remove(name) else {
            return;
        };
        if entry.held != Held::Nothing {
            out.push(Change::Deleted(ObjectId {
                kind: self.kind,
                name: name.clone(),
            }));
        }
        if let Some(reports) = self.reports.remove(name) {
            diff_reports(&reports, &BTreeMap::new(), out);
        }
    }
}

/// From the reports that stood to those that stand.
pub(super) fn diff_reports(
    before: &BTreeMap<String, String>,
    now: &BTreeMap<String, String>,
    out: &mut Vec<Change>,
) {
    for object in before.keys().filter(|o| !now.contains_key(*o)) {
        out.push(Change::Released {
            object: object.clone(),
        });
    }
    for (object, reason) in now {
        if before.get(object) != Some(reason) {
            out.push(Change::Quarantined {
                object: object.clone(),
                reason: reason.clone(),
            });
        }
    }
}
