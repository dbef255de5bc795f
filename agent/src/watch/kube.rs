//! The kube source: seven kinds, each listed once and then watched from there. A watch that ends or breaks
//! goes on where it stopped; only a server that has forgotten the place is listed again. What a single
//! call does is `calls`', and what a kind is that a cluster may be without `optional`'s.

mod calls;
mod connect;
mod optional;
mod servers;
mod trouble;

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::info;

use self::calls::{Stop, say_all};
use self::optional::Sought;
use super::ledger::Ledger;
use super::saved::Saved;
use super::saving::{Said, Saving, pass_on, save, sleep_until};
use super::status::{Health, Reporter};
use super::wire::{
    ClusterNetworkPolicy, EndpointSlice, Namespace, NetworkPolicy, Node, Pod, Service, WireKind,
};
use crate::model::{Change, Interner, Kind, Object};

pub use connect::{ConnectError, Credentials, KubeOptions, connect};
pub use servers::Servers;

/// A log filter: the library warns at every failed attempt, where the source reports each change once.
pub const LOG_FILTER: &str =
    "kube_runtime=error,kube_client=error,kube_client::client::builder=off";

/// What may wait on its way from the watches to who saves it.
const QUEUE: usize = 64;

/// How patient the source is.
#[derive(Clone, Debug)]
pub struct Timing {
    /// The least time that one watch call lasts, in whole seconds. Each lasts up to twice as long, at random,
    /// so that the calls of a thousand nodes do not end in the same second.
    pub watch: Duration,
    /// How long an API server may be silent on every watch until a watch is called again to hear something.
    /// It is cut at random by up to a quarter, so that one watch goes first. With `answer` it is how long a
    /// server that hangs goes unnoticed.
    pub quiet: Duration,
    /// How long one watch may be silent. The API server sends a bookmark every 60 s to 75 s.
    pub silence: Duration,
    /// How long the API server has to take a connection.
    pub connect: Duration,
    /// How long the API server has to begin to answer a watch call.
    pub answer: Duration,
    /// How long it has for a page of a list; its own limit is 60 s.
    pub page: Duration,
    /// The first wait after a failure; it doubles, up to `retry_max`, and is drawn out at random to up to
    /// twice of it: a thousand nodes that lost the same server must not come back in the same instant.
    pub retry_min: Duration,
    pub retry_max: Duration,
    /// How long a watch has to go well after a failure until it counts as recovered. A permission to list
    /// without one to watch would otherwise be news again and again.
    pub proof: Duration,
    /// The least time from one complete list of a kind to the next.
    pub between_lists: Duration,
    /// How long a kind may go without its first list before what an earlier run saved stands in for it.
    pub patience: Duration,
    /// How long a kind that the API server does not have is not looked for again; cut at random by up to a quarter.
    pub optional: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            watch: Duration::from_secs(300),
            quiet: Duration::from_secs(40),
            silence: Duration::from_secs(90),
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(15),
            page: Duration::from_secs(50),
            retry_min: Duration::from_millis(200),
            retry_max: Duration::from_secs(10),
            proof: Duration::from_secs(2),
            between_lists: Duration::from_secs(5),
            patience: Duration::from_secs(5),
            optional: Duration::from_secs(30),
        }
    }
}

impl Timing {
    fn retry(&self) -> ExponentialBackoff {
        ExponentialBuilder::new()
            .with_min_delay(self.retry_min)
            .with_max_delay(self.retry_max)
            .without_max_times()
            .with_jitter()
            .build()
    }
}

/// The source.
#[derive(Debug)]
pub struct KubeSource {
    servers: Arc<Servers>,
    timing: Timing,
    saving: Option<Saving>,
    reporter: Reporter,
}

impl KubeSource {
    /// Asks nothing yet.
    pub fn new(servers: impl Into<Arc<Servers>>, timing: Timing) -> Self {
        Self {
            servers: servers.into(),
            timing,
            saving: None,
            reporter: Reporter::new(),
        }
    }

    /// Saves what the API server says, for a run that starts without one, and goes by it in this one.
    #[must_use]
    pub fn saving(self, saving: Saving) -> Self {
        Self {
            saving: Some(saving),
            ..self
        }
    }

    /// How the watch of each kind is doing.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.reporter.subscribe()
    }

    /// Says what the API server has, and goes on saying what changes, until the reader is gone. A full
    /// channel makes the watches wait, and the API server with them.
    pub async fn run(self, changes: mpsc::Sender<Change>) {
        let (say, said) = mpsc::channel(QUEUE);
        let Some(saving) = self.saving.clone() else {
            tokio::join!(self.kinds(None, say), pass_on(said, changes));
            return;
        };
        let to = saving.to.clone();
        // Whoever cannot read it goes without.
        let saved = tokio::task::spawn_blocking(move || to.load()).await;
        let kinds = self.kinds(saved.unwrap_or_default(), say);
        tokio::join!(kinds, save(saving, self.health(), said, changes));
    }

    async fn kinds(&self, saved: Option<Saved>, say: mpsc::Sender<Said>) {
        let names = Interner::default();
        let mut spares = Spare::by_kind(saved, Instant::now() + self.timing.patience);
        let mut of = |kind| spares.remove(&kind);
        let names = || names.clone();
        tokio::join!(
            self.kind::<Service>(of(Kind::Service), names(), &say),
            self.kind::<EndpointSlice>(of(Kind::EndpointSlice), names(), &say),
            self.kind::<Pod>(of(Kind::Pod), names(), &say),
            self.kind::<Namespace>(of(Kind::Namespace), names(), &say),
            self.kind::<Node>(of(Kind::Node), names(), &say),
            self.kind::<NetworkPolicy>(of(Kind::NetworkPolicy), names(), &say),
            self.kind::<ClusterNetworkPolicy>(of(Kind::ClusterNetworkPolicy), names(), &say),
        );
    }

    async fn kind<K: WireKind>(
        &self,
        mut spare: Option<Spare>,
        names: Interner,
        say: &mpsc::Sender<Said>,
    ) {
        let saved = spare.as_mut().map(|it| std::mem::take(&mut it.objects));
        let mut course = Course {
            ledger: Ledger::new(K::KIND, names).with_saved(saved.unwrap_or_default()),
            served: K::VERSIONS[0],
            version: None,
            is_doubtful: false,
            absences: 0,
            group: Vec::new(),
            listed: None,
            failed: 0,
            retry: self.timing.retry(),
            spare,
        };
        loop {
            let stop = tokio::select! {
                stop = self.follow::<K>(&mut course, say) => stop,
                () = say.closed() => return,
            };
            let Stop::Failed(mut failure) = stop else {
                return;
            };
            if K::IS_OPTIONAL && failure.is_not_found() {
                failure = match self.seek::<K>(failure, &mut course, say).await {
                    Sought::Failed(failure) => failure,
                    Sought::Moved => continue,
                    Sought::Absent => {
                        let wait = patience(self.timing.optional);
                        tokio::select! {
                            () = tokio::time::sleep(wait) => continue,
                            () = say.closed() => return,
                        }
                    }
                    Sought::AtOdds => {
                        course.failed += 1;
                        tokio::time::sleep(course.retry.next().unwrap_or(self.timing.retry_max))
                            .await;
                        continue;
                    }
                    Sought::NobodyListens => return,
                };
            }
            if failure.loses_the_place() {
                course.version = None;
            }
            course.is_doubtful |= failure.is_of_the_server();
            course.failed += 1;
            if failure.is_expired() {
                info!(kind = %K::KIND, "watch fell behind; listing again");
            } else if failure.is_of_the_server() && course.failed < self.servers.count() {
                // The next server is asked at once, and one that answers leaves nothing to report.
                continue;
            } else {
                let (cause, message) = failure.explain::<K>();
                self.reporter
                    .failed(K::KIND, cause, message, SystemTime::now());
            }
            let wait = course.retry.next().unwrap_or(self.timing.retry_max);
            let wait = tokio::time::sleep(wait);
            tokio::select! {
                () = self.meanwhile(&mut course, say, wait) => {}
                () = say.closed() => return,
            }
        }
    }

    /// What is waited for, with what was saved standing in meanwhile when its time comes.
    async fn meanwhile<T>(
        &self,
        course: &mut Course,
        say: &mpsc::Sender<Said>,
        awaited: impl Future<Output = T>,
    ) -> T {
        let mut awaited = pin!(awaited);
        loop {
            tokio::select! {
                biased;
                done = &mut awaited => return done,
                () = sleep_until(course.spare_from()) => self.stand_in(course, say).await,
            }
        }
    }

    /// What an earlier run saved of the kind, as if the server had said it. What the server says next
    /// takes back what is gone.
    async fn stand_in(&self, course: &mut Course, say: &mpsc::Sender<Said>) {
        let Some(spare) = course.spare.take() else {
            return;
        };
        let mut changes = Vec::new();
        course.ledger.stand_in(&mut changes);
        self.reporter.stale(course.ledger.kind(), spare.of);
        // Who says them has ended when nobody listens.
        say_all(say, &mut changes).await.unwrap_or_default();
    }
}

/// Cut at random by up to a quarter, so that not everybody comes at once.
fn patience(all: Duration) -> Duration {
    all.mul_f64(1.0 - fastrand::f64() / 4.0)
}

/// How far the watch of a kind has come.
struct Course {
    ledger: Ledger,
    /// The version of the API group in which the kind is asked for.
    served: &'static str,
    /// The resourceVersion up to which everything was said; `None` until a list has said it.
    version: Option<String>,
    /// Who answers next may be a server that knows less than this: one restored from a backup, or of another
    /// store.
    is_doubtful: bool,
    /// How often in a row the API server had no such kind. That there is none of it was said the first time.
    absences: u32,
    /// The versions of its group the last time that this was looked at.
    group: Vec<String>,
    /// When the last list was complete.
    listed: Option<Instant>,
    /// How often in a row.
    failed: usize,
    retry: ExponentialBackoff,
    /// Until the first list, or until it stands in.
    spare: Option<Spare>,
}

impl Course {
    fn spare_from(&self) -> Option<Instant> {
        self.spare.as_ref().map(|spare| spare.from)
    }
}

/// What an earlier run saved of a kind.
struct Spare {
    /// On their way to the ledger.
    objects: Vec<Object>,
    of: SystemTime,
    /// When it has to stand in.
    from: Instant,
}

impl Spare {
    /// Of every kind, also of those without any object; of none if nothing was saved.
    fn by_kind(saved: Option<Saved>, from: Instant) -> BTreeMap<Kind, Self> {
        let Some(Saved { objects, of }) = saved else {
            return BTreeMap::new();
        };
        let spare = |kind| {
            let objects = Vec::new();
            (kind, Self { objects, of, from })
        };
        let mut spares = BTreeMap::from(Kind::ALL.map(spare));
        for object in objects {
            if let Some(spare) = spares.get_mut(&object.id().kind) {
                spare.objects.push(object);
            }
        }
        spares
    }
}
