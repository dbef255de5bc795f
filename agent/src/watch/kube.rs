//! The kube source: list, then watch, of six kinds. Every reconnect after an error lists again and says
//! what is gone; a watch that only came to its regular end goes on where it stopped.

mod connect;

use std::collections::BTreeMap;
use std::error::Error as _;
use std::pin::pin;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::info;

use super::ledger::Ledger;
use super::saved::Saved;
use super::saving::{Said, Saving, pass_on, save, sleep_until};
use super::status::{Cause, Health, Reporter};
use super::wire::{Decoded, EndpointSlice, Namespace, NetworkPolicy, Node, Pod, Service, WireKind};
use crate::model::{Change, Kind, Object};

pub use connect::{ConnectError, Credentials, KubeOptions, connect};

/// A log filter: the library warns at every failed attempt, where the source reports each change once.
pub const LOG_FILTER: &str =
    "kube_runtime=error,kube_client=error,kube_client::client::builder=off";

/// What may wait on its way from the watches to who saves it.
const QUEUE: usize = 64;

/// How patient the source is.
#[derive(Clone, Debug)]
pub struct Timing {
    /// How long one watch call lasts, in whole seconds. It is this short because its end is the only sign
    /// of life that a quiet watch gives. 5 s after it did not come, the server is called again, and has
    /// `connect` to take the call: 55 s in all to notice that it is out of reach.
    pub watch: Duration,
    /// How long the API server has to take a connection.
    pub connect: Duration,
    /// How long a connection may be silent; longer than a watch call.
    pub silence: Duration,
    /// The first wait after a failure; it doubles, up to `retry_max`, and is cut at random to between half
    /// and all of it.
    pub retry_min: Duration,
    pub retry_max: Duration,
    /// How long a watch has to go well after a failure until it counts as recovered. A permission to list
    /// without one to watch would otherwise be news again and again.
    pub proof: Duration,
    /// The least time from one complete list of a kind to the next.
    pub between_lists: Duration,
    /// How long a kind may go without its first list before what an earlier run saved stands in for it.
    pub patience: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            watch: Duration::from_secs(40),
            connect: Duration::from_secs(10),
            silence: Duration::from_secs(50),
            retry_min: Duration::from_millis(250),
            retry_max: Duration::from_secs(15),
            proof: Duration::from_secs(2),
            between_lists: Duration::from_secs(5),
            patience: Duration::from_secs(5),
        }
    }
}

/// The source.
#[derive(Debug)]
pub struct KubeSource {
    client: KubeClient,
    timing: Timing,
    saving: Option<Saving>,
    reporter: Reporter,
}

/// `kube::Client` cannot be printed.
struct KubeClient(Client);

impl std::fmt::Debug for KubeClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl KubeSource {
    /// Asks nothing yet.
    pub fn new(client: Client, timing: Timing) -> Self {
        Self {
            client: KubeClient(client),
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
        let mut spares = Spare::by_kind(saved, Instant::now() + self.timing.patience);
        let mut of = |kind| spares.remove(&kind);
        tokio::join!(
            self.kind::<Service>(of(Kind::Service), &say),
            self.kind::<EndpointSlice>(of(Kind::EndpointSlice), &say),
            self.kind::<Pod>(of(Kind::Pod), &say),
            self.kind::<Namespace>(of(Kind::Namespace), &say),
            self.kind::<Node>(of(Kind::Node), &say),
            self.kind::<NetworkPolicy>(of(Kind::NetworkPolicy), &say),
        );
    }

    async fn kind<K: WireKind>(&self, spare: Option<Spare>, say: &mpsc::Sender<Said>) {
        let mut course = Course {
            ledger: Ledger::new(K::KIND),
            listed: None,
            retry: Retry::new(&self.timing),
            spare,
        };
        loop {
            let ended = tokio::select! {
                ended = self.follow::<K>(&mut course, say) => ended,
                () = say.closed() => return,
            };
            let Ended::Failed(error) = ended else {
                return;
            };
            match trouble::<K>(&error) {
                // The server has forgotten where we were: nothing is wrong, and the list will tell.
                None => info!(kind = %K::KIND, "watch fell behind; listing again"),
                Some((cause, message)) => {
                    self.reporter
                        .failed(K::KIND, cause, message, SystemTime::now());
                }
            }
            let next = Instant::now() + course.retry.next();
            while Instant::now() < next {
                tokio::select! {
                    () = tokio::time::sleep_until(next) => {}
                    () = sleep_until(course.spare_from()) => self.stand_in(&mut course, say).await,
                    () = say.closed() => return,
                }
            }
        }
    }

    /// One list, and the watches from there, up to the first error.
    async fn follow<K: WireKind>(&self, course: &mut Course, say: &mpsc::Sender<Said>) -> Ended {
        if let Some(at) = course.listed {
            tokio::time::sleep_until(at + self.timing.between_lists).await;
        }
        let api: Api<Decoded<K>> = Api::all(self.client.0.clone());
        let seconds = u32::try_from(self.timing.watch.as_secs()).unwrap_or(u32::MAX);
        let config = watcher::Config::default().timeout(seconds.max(1));
        let mut events = pin!(watcher(api, config));
        let mut changes = Vec::new();
        let mut proven_at = None;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = sleep_until(proven_at) => {
                    proven_at = None;
                    course.retry.reset();
                    self.reporter.synced(K::KIND);
                    continue;
                }
                () = sleep_until(course.spare_from()) => {
                    self.stand_in(course, say).await;
                    continue;
                }
            };
            let Some(event) = event else {
                return Ended::NobodyListens;
            };
            match event {
                Ok(Event::Init) => course.ledger.begin_list(),
                Ok(Event::InitApply(object) | Event::Apply(object)) => {
                    let Decoded { name, outcome, .. } = object;
                    course.ledger.applied(name, outcome, &mut changes);
                }
                Ok(Event::Delete(object)) => course.ledger.deleted(&object.name, &mut changes),
                Ok(Event::InitDone) => {
                    course.ledger.finish_list(&mut changes);
                    course.spare = None;
                    let now = Instant::now();
                    course.listed = Some(now);
                    proven_at = Some(now + self.timing.proof);
                }
                Err(error) => return Ended::Failed(error),
            }
            let is_list_done = changes.last() == Some(&Change::Synced(K::KIND));
            if say_all(say, &mut changes).await.is_err() {
                return Ended::NobodyListens;
            }
            if is_list_done {
                if say.send(Said::Listed(K::KIND)).await.is_err() {
                    return Ended::NobodyListens;
                }
                if !self.reporter.is_failing(K::KIND) {
                    self.reporter.synced(K::KIND);
                }
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
        course.ledger.stand_in(spare.objects, &mut changes);
        self.reporter.stale(course.ledger.kind(), spare.of);
        // Who says them has ended when nobody listens.
        say_all(say, &mut changes).await.unwrap_or_default();
    }
}

async fn say_all(
    say: &mpsc::Sender<Said>,
    changes: &mut Vec<Change>,
) -> Result<(), mpsc::error::SendError<Said>> {
    for change in changes.drain(..) {
        say.send(Said::Change(change)).await?;
    }
    Ok(())
}

/// How far the watch of a kind has come.
struct Course {
    ledger: Ledger,
    /// When the last list was complete.
    listed: Option<Instant>,
    retry: Retry,
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

/// Why `follow` came back.
enum Ended {
    Failed(watcher::Error),
    NobodyListens,
}

/// Waits that double.
struct Retry {
    first: Duration,
    max: Duration,
    next: Duration,
}

impl Retry {
    fn new(timing: &Timing) -> Self {
        Self {
            first: timing.retry_min,
            max: timing.retry_max,
            next: timing.retry_min,
        }
    }

    fn next(&mut self) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.max);
        // A thousand nodes that lost the same server must not come back in the same instant.
        wait.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    fn reset(&mut self) {
        self.next = self.first;
    }
}

/// What is wrong, and what to do about it; `None` when the watch only has to be started again.
fn trouble<K: WireKind>(error: &watcher::Error) -> Option<(Cause, String)> {
    let (verb, cause) = match error {
        watcher::Error::InitialListFailed(e) => ("list", e),
        watcher::Error::WatchStartFailed(e) | watcher::Error::WatchFailed(e) => ("watch", e),
        watcher::Error::WatchError(status) => return answer::<K>("watch", status),
        watcher::Error::NoResourceVersion => {
            let message = format!("the API server sent {} without resourceVersion", K::PLURAL);
            return Some((Cause::Refused, message));
        }
    };
    match cause {
        kube::Error::Api(status) => answer::<K>(verb, status),
        other => Some((
            Cause::Unreachable,
            format!(
                "cannot {verb} {}: {}; is the address of the API server (--kube-api-server) right, and \
                 reachable without the Service kubernetes?",
                K::PLURAL,
                chain(other)
            ),
        )),
    }
}

fn answer<K: WireKind>(verb: &str, status: &kube::core::Status) -> Option<(Cause, String)> {
    let (plural, group, said) = (K::PLURAL, K::GROUP, &status.message);
    match status.code {
        410 => None,
        403 => Some((
            Cause::Forbidden,
            format!(
                "not allowed to {verb} {plural}: add apiGroups [\"{group}\"], resources [\"{plural}\"], \
                 verbs [\"list\", \"watch\"] to the ClusterRole weir-agent (the API server says: {said})"
            ),
        )),
        401 => Some((
            Cause::Unauthorized,
            format!(
                "the API server does not know who asks to {verb} {plural}: check the kubeconfig, or the \
                 token of the service account (the API server says: {said})"
            ),
        )),
        code => Some((
            Cause::Refused,
            format!("cannot {verb} {plural}: the API server answers {code}: {said}"),
        )),
    }
}

/// An error and what caused it, each said once.
fn chain(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}
