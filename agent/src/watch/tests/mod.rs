//! Sources from the outside: a folder or an API server in, changes out.

mod annotations;
mod api_server;
mod cluster_policy;
mod controllers;
mod convert;
mod fuzz;
mod kube;
mod manifests;
mod optional;
mod resume;
mod saved;
mod stale;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use serde_json::value::to_raw_value;
use tokio::sync::mpsc;

use super::wire::{Meta, WireKind, decode};
use crate::model::convert::{Converted, Invalid};
use crate::model::{Change, Kind, Snapshot};

/// The text of this value, decoded.
fn decoded<K: WireKind>(value: &Value) -> (Meta, Result<Converted, Invalid>) {
    decode::<K>(&to_raw_value(value).unwrap())
}

/// Who reads a source: all that it was told, taken together.
pub(super) struct Reader {
    changes: mpsc::Receiver<Change>,
    pub(super) snapshot: Snapshot,
    /// Standing reports by name.
    pub(super) quarantined: BTreeMap<String, String>,
    /// How often each kind was said to be synced.
    pub(super) synced: BTreeMap<Kind, usize>,
    pub(super) seen: Vec<Change>,
}

impl Reader {
    pub(super) fn new(changes: mpsc::Receiver<Change>) -> Self {
        Self {
            changes,
            snapshot: Snapshot::default(),
            quarantined: BTreeMap::new(),
            synced: BTreeMap::new(),
            seen: Vec::new(),
        }
    }

    /// Reads on until it is so. Panics when it does not become so within a few seconds.
    pub(super) async fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let reading = async {
            while !is_so(self) {
                let change = self.changes.recv().await.expect("the source ended");
                self.take(change);
            }
        };
        if tokio::time::timeout(Duration::from_secs(8), reading)
            .await
            .is_err()
        {
            panic!(
                "not within 8 s: {what}; {:#?} {:#?}",
                self.quarantined, self.snapshot
            );
        }
    }

    pub(super) async fn until_complete(&mut self) {
        self.until("every kind is synced", |r| r.snapshot.is_complete())
            .await;
    }

    /// Reads what has been said already.
    pub(super) fn catch_up(&mut self) {
        while let Ok(change) = self.changes.try_recv() {
            self.take(change);
        }
    }

    /// Nothing is said for this long.
    pub(super) async fn silence(&mut self, time: Duration) {
        if let Ok(change) = tokio::time::timeout(time, self.changes.recv()).await {
            panic!("unexpected {change:?}");
        }
    }

    pub(super) fn has_service(&self, namespace: &str, name: &str) -> bool {
        self.snapshot
            .services
            .contains_key(&crate::model::ObjectName::new(namespace, name))
    }

    fn take(&mut self, change: Change) {
        self.seen.push(change.clone());
        match change {
            Change::Applied(object) => {
                self.snapshot.apply(object);
            }
            Change::Deleted(id) => {
                assert!(
                    self.snapshot.delete(&id),
                    "{id} is deleted and was not there"
                );
            }
            Change::Synced(kind) => {
                *self.synced.entry(kind).or_default() += 1;
                self.snapshot.mark_synced(kind);
            }
            Change::Quarantined { object, reason } => {
                self.quarantined.insert(object, reason);
            }
            Change::Released { object } => {
                assert!(
                    self.quarantined.remove(&object).is_some(),
                    "{object} is released and was not quarantined"
                );
            }
        }
    }
}
