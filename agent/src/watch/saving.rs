//! Passes on what a source says, and keeps the saved objects like it: soon after a change, not often, and
//! only once the source has said everything. Beside the line, which waits for no disk: one thread writes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{info, warn};

use super::saved::{Changes, Log, SavedObjects};
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

/// Goes on until nobody says or hears anything any more. What is not saved then is handed to the thread that
/// writes, which ends after it, and the runtime after the thread.
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
            () = sleep_until(saver.due()) => saver.begin(),
            done = saver.writer.done.recv() => saver.finish(done),
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

type Objects = BTreeMap<ObjectId, Object>;

/// What there is to write.
enum Work {
    Everything(Arc<Objects>),
    Changes(Changes),
    Confirm,
}

/// What the file is like after it.
type Done = io::Result<Next>;

/// What is to be written next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Next {
    Everything,
    Changes,
}

/// The side of the thread that writes, at which one work at a time is done. There is room for the last one
/// behind it.
struct Writer {
    work: mpsc::Sender<Work>,
    done: mpsc::Receiver<Done>,
}

impl Writer {
    fn start(to: SavedObjects) -> Self {
        let (work, works) = mpsc::channel(2);
        let (finished, done) = mpsc::channel(2);
        tokio::task::spawn_blocking(move || write(&to, works, &finished));
        Self { work, done }
    }
}

fn write(to: &SavedObjects, mut works: mpsc::Receiver<Work>, done: &mpsc::Sender<Done>) {
    let mut log: Option<Log> = None;
    while let Some(work) = works.blocking_recv() {
        let result = match work {
            Work::Everything(objects) => to.save(objects.values()).map(|new| log = Some(new)),
            Work::Changes(changes) => match &mut log {
                Some(log) => log.append(&changes),
                None => Err(io::ErrorKind::NotFound.into()),
            },
            Work::Confirm => to.confirm(SystemTime::now()),
        };
        if result.is_err() {
            log = None;
        }
        let next = match &log {
            Some(log) if !log.has_outgrown() => Next::Changes,
            _ => Next::Everything,
        };
        // Of the last work nobody hears.
        done.blocking_send(result.map(|()| next))
            .unwrap_or_default();
    }
}

struct Saver {
    saving: Saving,
    health: watch::Receiver<Health>,
    /// Shared with who writes everything; the objects themselves are those of the line.
    objects: Arc<Objects>,
    /// What no file has, in case changes alone are written.
    unsaved: Changes,
    next: Next,
    listed: BTreeSet<Kind>,
    /// When the first change came that no file has.
    changed: Option<Instant>,
    /// When something was last written or confirmed, or tried to be.
    last: Option<Instant>,
    writer: Writer,
    is_writing: bool,
    trouble: Option<String>,
}

impl Saver {
    fn new(saving: Saving, health: watch::Receiver<Health>) -> Self {
        Self {
            writer: Writer::start(saving.to.clone()),
            saving,
            health,
            objects: Arc::default(),
            unsaved: Changes::new(),
            next: Next::Everything,
            listed: BTreeSet::new(),
            changed: None,
            last: None,
            is_writing: false,
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
                Arc::make_mut(&mut self.objects).insert(id.clone(), object.clone());
                self.note(id, Some(object.clone()));
            }
            Change::Deleted(id) => {
                Arc::make_mut(&mut self.objects).remove(id);
                self.note(id.clone(), None);
            }
            Change::Synced(_) | Change::Quarantined { .. } | Change::Released { .. } => return,
        }
        self.changed.get_or_insert_with(Instant::now);
    }

    fn note(&mut self, id: ObjectId, object: Option<Object>) {
        if self.next == Next::Changes || self.is_writing {
            self.unsaved.insert(id, object);
        }
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
    fn due(&self) -> Option<Instant> {
        if !self.is_complete() || self.is_writing {
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
        let work = match self.changed.take() {
            Some(_) => self.work(),
            None if self.is_current() => Work::Confirm,
            None => return,
        };
        // It is idle, or has ended, which `finish` is told.
        self.is_writing = self.writer.work.try_send(work).is_ok();
    }

    fn work(&mut self) -> Work {
        let changes = std::mem::take(&mut self.unsaved);
        match self.next {
            Next::Everything => Work::Everything(self.objects.clone()),
            Next::Changes => Work::Changes(changes),
        }
    }

    fn is_current(&self) -> bool {
        let health = self.health.borrow();
        health.values().all(|status| *status == WatchStatus::Synced)
    }

    fn finish(&mut self, done: Option<Done>) {
        self.is_writing = false;
        self.last = Some(Instant::now());
        let (next, trouble) = match done {
            Some(Ok(next)) => (next, None),
            Some(Err(error)) => (Next::Everything, Some(error.to_string())),
            None => {
                self.writer = Writer::start(self.saving.to.clone());
                let trouble = "the thread that writes them has ended".to_owned();
                (Next::Everything, Some(trouble))
            }
        };
        self.next = next;
        if next == Next::Everything {
            self.unsaved.clear();
        }
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

impl Drop for Saver {
    /// Whatever ends the source, the agent's end included, what it said is saved.
    fn drop(&mut self) {
        if self.changed.is_none() || !self.is_complete() {
            return;
        }
        let work = self.work();
        if self.writer.work.try_send(work).is_err() {
            warn!("the last changes are not saved: the thread that writes them has ended");
        }
    }
}
