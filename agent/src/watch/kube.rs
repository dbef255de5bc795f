//! The kube source: list, then watch, of six kinds. Every reconnect after an error lists again and says
//! what is gone; a watch that only came to its regular end goes on where it stopped.

mod connect;

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
use super::status::{Cause, Health, Reporter};
use super::wire::{Decoded, EndpointSlice, Namespace, NetworkPolicy, Node, Pod, Service, WireKind};
use crate::model::Change;

pub use connect::{ConnectError, Credentials, KubeOptions, connect};

/// A log filter: the library warns at every failed attempt, where the source reports each change once.
pub const LOG_FILTER: &str = "kube_runtime=error,kube_client=error";

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
        }
    }
}

/// The source.
#[derive(Debug)]
pub struct KubeSource {
    client: KubeClient,
    timing: Timing,
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
            reporter: Reporter::new(),
        }
    }

    /// How the watch of each kind is doing.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.reporter.subscribe()
    }

    /// Says what the API server has, and goes on saying what changes, until the reader is gone. A full
    /// channel makes the watches wait, and the API server with them.
    pub async fn run(self, changes: mpsc::Sender<Change>) {
        tokio::join!(
            self.kind::<Service>(&changes),
            self.kind::<EndpointSlice>(&changes),
            self.kind::<Pod>(&changes),
            self.kind::<Namespace>(&changes),
            self.kind::<Node>(&changes),
            self.kind::<NetworkPolicy>(&changes),
        );
    }

    async fn kind<K: WireKind>(&self, changes: &mpsc::Sender<Change>) {
        let mut ledger = Ledger::new(K::KIND);
        let mut listed = None;
        let mut retry = Retry::new(&self.timing);
        loop {
            let ended = tokio::select! {
                ended = self.follow::<K>(&mut ledger, &mut listed, &mut retry, changes) => ended,
                () = changes.closed() => return,
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
            tokio::select! {
                () = tokio::time::sleep(retry.next()) => {}
                () = changes.closed() => return,
            }
        }
    }

    /// One list, and the watches from there, up to the first error.
    async fn follow<K: WireKind>(
        &self,
        ledger: &mut Ledger,
        listed: &mut Option<Instant>,
        retry: &mut Retry,
        changes: &mpsc::Sender<Change>,
    ) -> Ended {
        if let Some(at) = *listed {
            tokio::time::sleep_until(at + self.timing.between_lists).await;
        }
        let api: Api<Decoded<K>> = Api::all(self.client.0.clone());
        let seconds = u32::try_from(self.timing.watch.as_secs()).unwrap_or(u32::MAX);
        let config = watcher::Config::default().timeout(seconds.max(1));
        let mut events = pin!(watcher(api, config));
        let mut said = Vec::new();
        let mut proven_at = None;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = sleep_until(proven_at) => {
                    proven_at = None;
                    retry.reset();
                    self.reporter.synced(K::KIND);
                    continue;
                }
            };
            let Some(event) = event else {
                return Ended::NobodyListens;
            };
            match event {
                Ok(Event::Init) => ledger.begin_list(),
                Ok(Event::InitApply(object) | Event::Apply(object)) => {
                    ledger.applied(object.name, object.outcome, &mut said);
                }
                Ok(Event::Delete(object)) => ledger.deleted(&object.name, &mut said),
                Ok(Event::InitDone) => {
                    ledger.finish_list(&mut said);
                    let now = Instant::now();
                    *listed = Some(now);
                    proven_at = Some(now + self.timing.proof);
                }
                Err(error) => return Ended::Failed(error),
            }
            let is_list_done = said.last() == Some(&Change::Synced(K::KIND));
            for change in said.drain(..) {
                if changes.send(change).await.is_err() {
                    return Ended::NobodyListens;
                }
            }
            if is_list_done && !self.reporter.is_failing(K::KIND) {
                self.reporter.synced(K::KIND);
            }
        }
    }
}

/// Never, without a time.
async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
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
