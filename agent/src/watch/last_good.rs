//! Which object each document of the folder stands for: its own, or, while it cannot be understood, the
//! one it stood for before.

use std::collections::{BTreeMap, BTreeSet};

use super::controllers::Manifest;
use super::documents::{Document, Origin};
use crate::model::ObjectId;

/// The objects of the folder, in the order of their documents.
#[derive(Clone, Debug, Default)]
pub struct Folder {
    entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    origin: Origin,
    id: ObjectId,
    manifest: Manifest,
    standing: Standing,
}

/// What an entry is worth.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Standing {
    /// It was understood, now or earlier.
    Good,
    /// It never was: this only keeps closed what it is about.
    StandIn,
}

impl Folder {
    /// The manifests, in the order of their documents.
    pub fn manifests(&self) -> Vec<Manifest> {
        self.entries.iter().map(|e| e.manifest.clone()).collect()
    }

    /// The folder after a new reading, and reports by name. Of two documents for one object, the first
    /// counts, except that one which is understood goes before one which is not.
    pub fn next(&self, documents: &[Document]) -> (Self, BTreeMap<String, String>) {
        let mut reports = BTreeMap::new();
        let mut owners: BTreeMap<ObjectId, &Origin> = BTreeMap::new();
        let mut entries = Vec::new();
        let mut broken = Vec::new();
        for document in documents {
            let (id, converted) = match (&document.id, &document.outcome) {
                (Some(id), Ok(converted)) => (id, converted),
                (_, Err(invalid)) => {
                    reports.insert(document.label(), invalid.reason.clone());
                    broken.push((document, invalid));
                    continue;
                }
                // An object of ours without a name does not convert.
                (None, Ok(_)) => continue,
            };
            if let Some(first) = owners.get(id) {
                reports.insert(document.label(), format!("{id} stands in {first} already"));
                continue;
            }
            owners.insert(id.clone(), &document.origin);
            for problem in &converted.problems {
                reports.insert(format!("{id} {}", problem.part), problem.reason.clone());
            }
            if let Some(object) = &converted.object {
                entries.push(Entry {
                    origin: document.origin.clone(),
                    id: id.clone(),
                    manifest: Manifest {
                        object: object.clone(),
                        families: document.families.clone(),
                        status: document.status,
                    },
                    standing: Standing::Good,
                });
            }
        }
        let understood: BTreeSet<ObjectId> = owners.into_keys().collect();
        let mut held = BTreeSet::new();
        for (document, invalid) in broken {
            let before = self.good(document).cloned();
            let stand_in = || {
                let object = invalid.closed.clone()?;
                Some(Entry {
                    origin: document.origin.clone(),
                    id: object.id(),
                    manifest: Manifest {
                        object,
                        families: None,
                        status: document.status,
                    },
                    standing: Standing::StandIn,
                })
            };
            let Some(mut entry) = before.or_else(stand_in) else {
                continue;
            };
            if !understood.contains(&entry.id) && held.insert(entry.id.clone()) {
                entry.origin = document.origin.clone();
                entries.push(entry);
            }
        }
        entries.sort_by(|a, b| a.origin.cmp(&b.origin));
        (Self { entries }, reports)
    }

    /// The last good object of a document: by its name, or by its place when the name cannot be read.
    fn good(&self, document: &Document) -> Option<&Entry> {
        self.entries
            .iter()
            .filter(|e| e.standing == Standing::Good)
            .find(|e| match &document.id {
                Some(id) => e.id == *id,
                None => e.origin == document.origin,
            })
    }
}
