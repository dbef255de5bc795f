//! The calls of one kind: the pages of a list, and one watch after the other from where it ended. They end
//! at the first failure; what follows from it is the source's.

use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use kube::Resource;
use kube::api::{ListParams, WatchParams};
use kube::core::{ObjectList, WatchEvent};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tracing::info;

use super::servers::Server;
use super::trouble::{Failure, Verb};
use super::{Course, KubeSource, patience};
use crate::model::Change;
use crate::watch::saving::{Said, sleep_until};
use crate::watch::wire::{Decoded, WireKind};

/// What is asked for at once of a list.
const PAGE: u32 = 500;

/// Why the calls came to an end.
pub(super) enum Stop {
    Failed(Failure),
    NobodyListens,
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl KubeSource {
    /// A list if the place is not known, and the watches from there, up to the first failure.
    pub(super) async fn follow<K: WireKind>(
        &self,
        course: &mut Course,
        say: &mpsc::Sender<Said>,
    ) -> Stop {
        loop {
            let server = self.servers.current();
            let Err(stop) = self.round::<K>(server, course, say).await else {
                continue;
            };
            if let Stop::Failed(failure) = &stop
                && failure.is_of_the_server()
            {
                self.servers.give_up(server);
            }
            return stop;
        }
    }

    async fn round<K: WireKind>(
        &self,
        server: &Server,
        course: &mut Course,
        say: &mpsc::Sender<Said>,
    ) -> Result<(), Stop> {
        if let Some(version) = &course.version
            && course.is_doubtful
            && self.is_behind::<K>(server, course.served, version).await?
        {
            info!(kind = %K::KIND, "the API server knows less than was said before; listing again");
            course.version = None;
        }
        course.is_doubtful = false;
        let version = match &course.version {
            Some(version) => version.clone(),
            None => self.list::<K>(server, course, say).await?,
        };
        self.watch::<K>(server, course, version, say).await
    }

    /// Is what the server knows older than `version`? Its watch would then say nothing until it is not.
    async fn is_behind<K: WireKind>(
        &self,
        server: &Server,
        served: &'static str,
        version: &str,
    ) -> Result<bool, Failure> {
        let one = ListParams::default().limit(1);
        let answer = timeout(self.timing.answer, server.api::<K>(served).list(&one)).await;
        let page = answered(answer, Verb::List, self.timing.answer)?;
        server.lives();
        let now = page.metadata.resource_version.unwrap_or_default();
        Ok(is_before(&now, version))
    }

    /// Says all there is of the kind, and of which version that is.
    async fn list<K: WireKind>(
        &self,
        server: &Server,
        course: &mut Course,
        say: &mpsc::Sender<Said>,
    ) -> Result<String, Stop> {
        if let Some(at) = course.listed {
            tokio::time::sleep_until(at + self.timing.between_lists).await;
        }
        let api = server.api::<K>(course.served);
        let mut changes = Vec::new();
        let mut params = ListParams::default().limit(PAGE);
        course.ledger.begin_list();
        let version = loop {
            let answer = timeout(self.timing.page, api.list(&params));
            let answer = self.meanwhile(course, say, answer).await;
            let page: ObjectList<Decoded<K>> = match answered(answer, Verb::List, self.timing.page)
            {
                // The pages took longer than the server remembers what they are pages of.
                Err(failure) if failure.is_expired() && params.continue_token.is_some() => {
                    params = ListParams::default();
                    course.ledger.begin_list();
                    continue;
                }
                answer => answer?,
            };
            server.lives();
            for object in page.items {
                let Decoded { name, outcome, .. } = object;
                course.ledger.applied(name, outcome, &mut changes);
                say_all(say, &mut changes).await?;
            }
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                let version = page.metadata.resource_version.filter(|v| !v.is_empty());
                break version.ok_or(Failure::NoVersion)?;
            }
        };
        if course.absences > 0 {
            course.absences = 0;
            info!(kind = %K::KIND, version = course.served, "the API server has the kind now");
        }
        course.ledger.finish_list(&mut changes);
        course.spare = None;
        course.listed = Some(Instant::now());
        course.version = Some(version.clone());
        say_all(say, &mut changes).await?;
        send(say, Said::Listed(K::KIND)).await?;
        if !self.reporter.is_failing(K::KIND) {
            self.reporter.synced(K::KIND);
        }
        Ok(version)
    }

    /// One watch call, up to its end. Where it ended is in the course.
    async fn watch<K: WireKind>(
        &self,
        server: &Server,
        course: &mut Course,
        from: String,
        say: &mpsc::Sender<Said>,
    ) -> Result<(), Stop> {
        let began = Instant::now();
        let api = server.api::<K>(course.served);
        let version = course.version.insert(from);
        let length = self.timing.watch.mul_f64(1.0 + fastrand::f64());
        let params = WatchParams {
            timeout: Some(u32::try_from(length.as_secs()).unwrap_or(u32::MAX).max(1)),
            bookmarks: true,
            ..WatchParams::default()
        };
        let answer = timeout(self.timing.answer, api.watch(&params, version)).await;
        let mut events = pin!(answered(answer, Verb::Watch, self.timing.answer)?);
        server.lives();
        let mut proven_at = Some(Instant::now() + self.timing.proof);
        let mut changes = Vec::new();
        loop {
            let listening = self.timing.listen(server);
            let event = tokio::select! {
                biased;
                event = events.next() => event,
                () = sleep_until(proven_at) => {
                    proven_at = None;
                    course.failed = 0;
                    course.retry = self.timing.retry();
                    self.reporter.synced(K::KIND);
                    continue;
                }
                // The next call goes on where this one is.
                () = listening => return Ok(()),
            };
            let Some(event) = event else {
                break;
            };
            server.lives();
            match event.map_err(|error| Failure::Call(Verb::Watch, error))? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    course.version = Some(version_of(&object)?);
                    let Decoded { name, outcome, .. } = object;
                    course.ledger.applied(name, outcome, &mut changes);
                }
                WatchEvent::Deleted(object) => {
                    course.version = Some(version_of(&object)?);
                    course.ledger.deleted(&object.name, &mut changes);
                }
                WatchEvent::Bookmark(mark) => {
                    course.version = Some(mark.metadata.resource_version);
                }
                WatchEvent::Error(status) => return Err(Failure::Said(status).into()),
            }
            say_all(say, &mut changes).await?;
        }
        if began.elapsed() < self.timing.proof {
            // A server, or what is before it, that ends every watch at once is not asked without a pause.
            let wait = course.retry.next().unwrap_or(self.timing.retry_max);
            sleep(wait).await;
        }
        Ok(())
    }
}

impl super::Timing {
    /// Until a watch has been listened to for too long without a word.
    async fn listen(&self, server: &Server) {
        let since = Instant::now();
        let (quiet, silence) = (patience(self.quiet), since + self.silence);
        loop {
            // Nothing is heard while nobody listens.
            let until = server.last_heard().max(since) + quiet;
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until.min(silence)).await;
            if silence <= Instant::now() {
                return;
            }
        }
    }
}

pub(super) fn answered<T>(
    answer: Result<kube::Result<T>, tokio::time::error::Elapsed>,
    verb: Verb,
    within: Duration,
) -> Result<T, Failure> {
    answer
        .map_err(|_| Failure::NoAnswer(verb, within))?
        .map_err(|error| Failure::Call(verb, error))
}

fn version_of<K: WireKind>(object: &Decoded<K>) -> Result<String, Failure> {
    let version = object.meta().resource_version.clone();
    version
        .filter(|version| !version.is_empty())
        .ok_or(Failure::NoVersion)
}

/// Versions of one kind are ordered as numbers (KEP-5504). What is no number is not before anything.
fn is_before(one: &str, other: &str) -> bool {
    match (one.parse::<u128>(), other.parse::<u128>()) {
        (Ok(one), Ok(other)) => one < other,
        _ => false,
    }
}

pub(super) async fn send(say: &mpsc::Sender<Said>, said: Said) -> Result<(), Stop> {
    say.send(said).await.map_err(|_| Stop::NobodyListens)
}

/// Says all of it, in order.
pub(super) async fn say_all(
    say: &mpsc::Sender<Said>,
    changes: &mut Vec<Change>,
) -> Result<(), Stop> {
    for change in changes.drain(..) {
        send(say, Said::Change(change)).await?;
    }
    Ok(())
}
