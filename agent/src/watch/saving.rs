//! Passes on what a source says, and keeps the saved objects like it: soon after a change, not often, and
//! only once the source has said everything. Beside the line, which waits for no disk.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;
use tracing::{info, warn};

use super::saved::SavedObjects;
use super::status::{Health, WatchStatus};
use crate::model::{Change, Kind, Object, ObjectId};

/// What a source says.
#[derive(Debug)]
pub(super) enum Said {
    Change(Change),
    /// The cluster itself, and no file, has said everything there is of the kind.
    Listed(Kind),
}

/// When objects are saved.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// From the first change that is not saved to when it is, if nothing was saved lately: what a node that
    /// loses its power and its API server in this time does not know later.
    pub settle: Duration,
    /// The least time from one writing to the next.
    pub between: Duration,
    /// How often a file that nothing changes is said to be current.
    pub confirm: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            settle: Duration::from_millis(500),
            between: Duration::from_secs(5),
            confirm: Duration::from_secs(30),
        }
    }
}

/// Where objects are saved, and how often.
#[derive(Clone, Debug)]
pub struct Saving {
    pub to: SavedObjects,
    pub pace: Pace,
}

/// Goes on until nobody says or hears anything any more.
pub(super) async fn save(
    saving: Saving,
    health: watch::Receiver<Health>,
    mut said: mpsc::Receiver<Said>,
    changes: mpsc::Sender<Change>,
) {
    let mut saver = Saver::new(saving, health);
    loop {
        tokio::select! {
            news = said.recv() => match news {
                Some(Said::Change(change)) => {
                    saver.take(&change);
                    if changes.send(change).await.is_err() {
                        return;
                    }
                }
                Some(Said::Listed(kind)) => saver.listed(kind),
                None => return,
            },
            () = changes.closed() => return,
            () = sleep_until(saver.next()) => saver.begin(),
            done = finished(&mut saver.writing) => saver.finish(done),
        }
    }
}

/// As [`save`] without a file.
pub(super) async fn pass_on(mut said: mpsc::Receiver<Said>, changes: mpsc::Sender<Change>) {
    loop {
        let news = tokio::select! {
            news = said.recv() => news,
            () = changes.closed() => return,
        };
        match news {
            Some(Said::Change(change)) => {
                if changes.send(change).await.is_err() {
                    return;
                }
            }
            Some(Said::Listed(_)) => {}
            None => return,
        }
    }
}

/// Never, without a time.
pub(super) async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

async fn finished(writing: &mut Option<Writing>) -> Result<io::Result<()>, JoinError> {
    match writing {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}

type Objects = BTreeMap<ObjectId, Object>;
type Writing = JoinHandle<io::Result<()>>;

struct Saver {
    saving: Saving,
    health: watch::Receiver<Health>,
    /// Shared with who writes; the objects themselves are those of the line.
    objects: Arc<Objects>,
    listed: BTreeSet<Kind>,
    /// When the first change came that no file has.
    changed: Option<Instant>,
    /// When something was last written or confirmed, or tried to be.
    last: Option<Instant>,
    writing: Option<Writing>,
    trouble: Option<String>,
}

impl Saver {
    fn new(saving: Saving, health: watch::Receiver<Health>) -> Self {
        Self {
            saving,
            health,
            objects: Arc::default(),
            listed: BTreeSet::new(),
            changed: None,
            last: None,
            writing: None,
            trouble: None,
        }
    }

    fn take(&mut self, change: &Change) {
        match change {
            Change::Applied(object) => {
                let id = object.id();
                if self.objects.get(&id) == Some(object) {
                    return;
                }
                Arc::make_mut(&mut self.objects).insert(id, object.clone());
            }
            Change::Deleted(id) => {
                Arc::make_mut(&mut self.objects).remove(id);
            }
            Change::Synced(_) | Change::Quarantined { .. } | Change::Released { .. } => return,
        }
        self.changed.get_or_insert_with(Instant::now);
    }

    fn listed(&mut self, kind: Kind) {
        let is_last = self.listed.insert(kind) && self.is_complete();
        if is_last {
            self.changed.get_or_insert_with(Instant::now);
        }
    }

    /// Before that, a file of an earlier run knows more.
    fn is_complete(&self) -> bool {
        self.listed.len() == Kind::ALL.len()
    }

    /// When there is something to do.
    fn next(&self) -> Option<Instant> {
        if !self.is_complete() || self.writing.is_some() {
            return None;
        }
        let pace = &self.saving.pace;
        match (self.changed, self.last) {
            (Some(changed), None) => Some(changed + pace.settle),
            (Some(changed), Some(last)) => Some((changed + pace.settle).max(last + pace.between)),
            (None, Some(last)) => Some(last + pace.confirm),
            (None, None) => None,
        }
    }

    fn begin(&mut self) {
        self.last = Some(Instant::now());
        let to = self.saving.to.clone();
        self.writing = match self.changed.take() {
            Some(_) => {
                let objects = self.objects.clone();
                Some(tokio::task::spawn_blocking(move || {
                    to.save(objects.values())
                }))
            }
            None if self.is_current() => Some(tokio::task::spawn_blocking(move || {
                to.confirm(SystemTime::now())
            })),
            None => None,
        };
    }

    fn is_current(&self) -> bool {
        let health = self.health.borrow();
        health.values().all(|status| *status == WatchStatus::Synced)
    }

    fn finish(&mut self, done: Result<io::Result<()>, JoinError>) {
        self.writing = None;
        self.last = Some(Instant::now());
        let trouble = match done {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        match (&self.trouble, &trouble) {
            (before, Some(error)) if before.as_ref() != Some(error) => {
                warn!(
                    error,
                    "objects cannot be saved: an agent that starts without the API server will not know the latest"
                );
            }
            (Some(_), None) => info!("objects are saved again"),
            _ => {}
        }
        if trouble.is_some() {
            self.changed.get_or_insert_with(Instant::now);
        }
        self.trouble = trouble;
    }
}
