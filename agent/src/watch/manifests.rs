//! The manifests source: a folder of YAML, watched. What stands in for the controllers of a cluster is in
//! `controllers`; what a document says is in `documents`.

mod folder;

pub(crate) use folder::texts;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, mpsc, watch};
use tracing::{debug, info, warn};
use weir_cni::durable;

use super::controllers::{Assigned, Derived, PodLeases, Surroundings, derive};
use super::documents::{ForeignKind, Parsed, parse};
use super::last_good::Folder;
use super::ledger::diff_reports;
use super::status::{Cause, Health, Reporter};
use crate::beat::beat;
use crate::model::{Change, Kind, Object, ObjectId, ObjectName};
use folder::Listing;

/// How long to wait for a writer to finish before reading: editors write a file in several steps.
const SETTLE: Duration = Duration::from_millis(30);

/// What the source needs to know.
#[derive(Clone, Debug)]
pub struct ManifestsOptions {
    pub folder: PathBuf,
    /// Where the cluster IPs it gave out are kept.
    pub assigned: PathBuf,
    pub surroundings: Surroundings,
    /// How often to read the folder although nothing was noticed.
    pub rescan: Duration,
}

/// The source.
#[derive(Debug)]
pub struct ManifestsSource {
    options: ManifestsOptions,
    reporter: Reporter,
    leases: watch::Sender<PodLeases>,
}

/// Where the addresses of this node's pods are told to the source. Never waits.
#[derive(Clone, Debug)]
pub struct PodAddresses(watch::Sender<PodLeases>);

impl PodAddresses {
    /// The pod has these addresses and no other.
    pub fn report(&self, pod: ObjectName, addresses: Vec<IpAddr>) {
        self.0.send_if_modified(|leases| {
            let is_new = leases.get(&pod) != Some(&addresses);
            leases.insert(pod, addresses);
            is_new
        });
    }

    /// The pod has none any more.
    pub fn remove(&self, pod: &ObjectName) {
        self.0
            .send_if_modified(|leases| leases.remove(pod).is_some());
    }
}

impl ManifestsSource {
    /// Reads nothing yet.
    pub fn new(options: ManifestsOptions) -> Self {
        Self {
            options,
            reporter: Reporter::new(),
            leases: watch::Sender::default(),
        }
    }

    /// How the source is doing.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.reporter.subscribe()
    }

    /// Where to tell the addresses of pods.
    pub fn addresses(&self) -> PodAddresses {
        PodAddresses(self.leases.clone())
    }

    /// Says what is in the folder, and goes on saying what changes, until the reader is gone. A full
    /// channel makes it wait; what changes meanwhile is seen at once afterwards.
    pub async fn run(self, changes: mpsc::Sender<Change>) {
        let touched = Arc::new(Notify::new());
        let mut leases = self.leases.subscribe();
        let mut watched = folder::watch(&self.options.folder, &touched);
        let mut state = State {
            assigned: load(&self.options.assigned),
            ..State::default()
        };
        loop {
            match folder::read(self.options.folder.clone(), state.listing.clone()).await {
                Ok(listing) => state.take(listing),
                Err(error) => {
                    for kind in Kind::ALL {
                        self.reporter
                            .failed(kind, Cause::Folder, error.clone(), SystemTime::now());
                    }
                    // The folder may come back as another one, which has to be watched anew.
                    watched = None;
                    state.is_readable = false;
                }
            }
            loop {
                let pods = leases.borrow_and_update().clone();
                let said = state.changes(&pods, &self.options);
                if state.is_readable && !self.say(said, &changes).await {
                    return;
                }
                tokio::select! {
                    changed = leases.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return,
                    },
                    () = touched.notified() => tokio::time::sleep(SETTLE).await,
                    () = beat(self.options.rescan) => {}
                    () = changes.closed() => return,
                }
                break;
            }
            if watched.is_none() {
                watched = folder::watch(&self.options.folder, &touched);
            }
        }
    }

    /// False when nobody listens any more.
    async fn say(&self, said: Vec<Change>, changes: &mpsc::Sender<Change>) -> bool {
        for change in said {
            if changes.send(change).await.is_err() {
                return false;
            }
        }
        for kind in Kind::ALL {
            self.reporter.synced(kind);
        }
        true
    }
}

/// What the source knows and has said.
#[derive(Debug, Default)]
struct State {
    listing: Listing,
    is_readable: bool,
    folder: Folder,
    /// Reports about files and documents.
    reports: BTreeMap<String, String>,
    assigned: Assigned,
    foreign: BTreeSet<ForeignKind>,
    said: Said,
}

#[derive(Debug, Default)]
struct Said {
    objects: BTreeMap<ObjectId, Object>,
    reports: BTreeMap<String, String>,
    is_synced: bool,
}

impl State {
    fn take(&mut self, listing: Listing) {
        let is_first = !self.is_readable;
        self.is_readable = true;
        if listing == self.listing && !is_first {
            return;
        }
        let mut documents = Vec::new();
        for (path, text) in &listing.files {
            for parsed in parse(path, text) {
                match parsed {
                    Parsed::Ours(document) => documents.push(document),
                    Parsed::Foreign(kind) => self.meet(kind),
                }
            }
        }
        let (folder, mut reports) = self.folder.next(&documents);
        reports.extend(listing.unreadable.clone());
        self.folder = folder;
        self.reports = reports;
        self.listing = listing;
    }

    /// One line for each kind, the first time it is met.
    fn meet(&mut self, foreign: ForeignKind) {
        if self.foreign.contains(&foreign) {
            return;
        }
        let ForeignKind { api_version, kind } = &foreign;
        if foreign.is_usual() {
            debug!(kind, api_version, "kind is not for the agent");
        } else {
            info!(kind, api_version, "ignoring documents of unknown kind");
        }
        self.foreign.insert(foreign);
    }

    fn changes(&mut self, pods: &PodLeases, options: &ManifestsOptions) -> Vec<Change> {
        if !self.is_readable {
            return Vec::new();
        }
        let manifests = self.folder.manifests();
        let derived = derive(&manifests, pods, &options.surroundings, &self.assigned);
        if derived.assigned != self.assigned {
            if let Err(e) = store(&options.assigned, &derived.assigned) {
                warn!(path = %options.assigned.display(), error = %e,
                    "cluster IPs could not be stored; a restart may give out others");
            }
            self.assigned.clone_from(&derived.assigned);
        }
        self.said.next(derived, &self.reports)
    }
}

impl Said {
    /// The changes from what was said to what is, and remembers them as said.
    fn next(&mut self, derived: Derived, reports: &BTreeMap<String, String>) -> Vec<Change> {
        let mut out = Vec::new();
        for (id, object) in &derived.objects {
            if self.objects.get(id) != Some(object) {
                out.push(Change::Applied(object.clone()));
            }
        }
        for id in self.objects.keys() {
            if !derived.objects.contains_key(id) {
                out.push(Change::Deleted(id.clone()));
            }
        }
        let mut now = derived.reports;
        now.extend(reports.clone());
        diff_reports(&self.reports, &now, &mut out);
        if !self.is_synced {
            out.extend(Kind::ALL.map(Change::Synced));
            self.is_synced = true;
        }
        self.objects = derived.objects;
        self.reports = now;
        out
    }
}

/// The cluster IPs of the last run. None, if the file says nothing: most names get the same ones again.
fn load(path: &Path) -> Assigned {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Assigned::new(),
        Err(e) => {
            warn!(path = %path.display(), error = %e, "cannot read the cluster IPs of the last run");
            return Assigned::new();
        }
    };
    match serde_json::from_str::<BTreeMap<String, Vec<IpAddr>>>(&text) {
        Ok(stored) => stored
            .into_iter()
            .filter_map(|(name, ips)| {
                let (namespace, name) = name.split_once('/')?;
                Some((ObjectName::new(namespace, name), ips))
            })
            .collect(),
        Err(e) => {
            warn!(path = %path.display(), error = %e, "cannot read the cluster IPs of the last run");
            Assigned::new()
        }
    }
}

fn store(path: &Path, assigned: &Assigned) -> std::io::Result<()> {
    let stored: BTreeMap<String, &Vec<IpAddr>> = assigned
        .iter()
        .map(|(name, ips)| (name.to_string(), ips))
        .collect();
    let text = serde_json::to_vec_pretty(&stored)?;
    durable::replace(path, durable::PRIVATE_FILE, |file| file.write_all(&text))
}
