//! What the cluster is told, beside what it asks: Events about conditions, and the condition of a node whose agent
//! is away. Both are written by one agent of all, see [`Roster`]; what is wrong is `conditions`'.

mod absence;
mod api;
mod events;
mod roster;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior};
use tracing::{debug, warn};

use crate::conditions::Board;
use crate::model::Kind;
use crate::watch::status::{Health, WatchStatus};

pub use api::Scribe;
pub use roster::{Agents, Roster};

use absence::{Absence, Notice};
use api::Error;
use events::{By, Events};

/// How often it is looked what there is to tell.
const LOOK: Duration = Duration::from_secs(5);
/// How long the API server is left alone after it has not taken something.
const REFUSED: Duration = Duration::from_secs(60);
/// The most Events that are written at one look.
const MOST: usize = 20;

/// What an agent tells; each needs a permission of its own (deploy/helm/weir, `rbac.yaml`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tells {
    /// Events about conditions: `create` on `events` of `events.k8s.io`.
    pub events: bool,
    /// The condition `NetworkUnavailable` of nodes whose agent is not ready: `patch` on `nodes/status`.
    pub node_condition: bool,
}

/// Who tells.
#[derive(Debug)]
pub struct Teller {
    pub node: Arc<str>,
    pub tells: Tells,
    pub scribe: Scribe,
    pub roster: Roster,
    pub board: Arc<Board>,
    pub health: watch::Receiver<Health>,
}

impl Teller {
    /// Tells what there is to tell, for ever.
    pub async fn run(self) {
        tokio::join!(self.tell_events(), self.tell_absence());
    }

    async fn tell_events(&self) {
        if !self.tells.events {
            return std::future::pending().await;
        }
        let (mut look, mut events) = (looks(), Events::default());
        let mut refused = Refused::default();
        loop {
            look.tick().await;
            let now = SystemTime::now();
            let mut said = 0;
            for note in events.due(&self.board.all(), now) {
                match self.roster.read(|agents| note.teller(agents, &self.node)) {
                    None => {}
                    Some(By::Another) => events.told(&note, By::Another, now),
                    Some(By::Us) => {
                        if said == MOST || refused.is_waiting("") {
                            break;
                        }
                        said += 1;
                        let outcome = self.scribe.say(&note, &self.node).await;
                        match outcome {
                            // What the API server does not take of this one, it will not take later either.
                            Ok(()) | Err(Error::Unwilling(_)) => events.told(&note, By::Us, now),
                            // As soon as it is allowed.
                            Err(Error::Forbidden(_)) => {}
                            // Later again, so that the others have their turn before.
                            Err(_) => events.told(&note, By::Another, now),
                        }
                        refused.heard("", "an Event", "create on events of events.k8s.io", outcome);
                    }
                }
            }
        }
    }

    async fn tell_absence(&self) {
        let Some(namespace) = self
            .roster
            .namespace()
            .filter(|_| self.tells.node_condition)
        else {
            return std::future::pending().await;
        };
        let (mut look, mut absence) = (looks(), Absence::default());
        let mut refused = Refused::default();
        loop {
            look.tick().await;
            let due = |agents: &Agents| absence.due(agents, &self.node, Instant::now());
            let due = self.roster.read(due);
            // What was heard last may be long past.
            if !self.hears() {
                absence = Absence::default();
                continue;
            }
            for notice in due {
                let (Notice::Away(node) | Notice::Back(node)) = &notice;
                if refused.is_waiting("") || refused.is_waiting(node) {
                    continue;
                }
                let outcome = match &notice {
                    Notice::Away(node) => match self.scribe.has_agent(namespace, node).await {
                        Ok(true) => continue,
                        Ok(false) => self.scribe.notify(&notice).await,
                        Err(error) => Err(error),
                    },
                    Notice::Back(_) => self.scribe.notify(&notice).await,
                };
                let what = "the condition NetworkUnavailable of a node";
                refused.heard(node, what, "patch on nodes/status", outcome);
            }
        }
    }

    /// Is what is known of pods and nodes what is so?
    fn hears(&self) -> bool {
        let health = self.health.borrow();
        let is_synced = |kind| health.get(&kind) == Some(&WatchStatus::Synced);
        is_synced(Kind::Pod) && is_synced(Kind::Node)
    }
}

fn looks() -> Interval {
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    look
}

/// What the API server did not take, so that it is neither asked nor told of it at every look: of one node, or (with no
/// name) of anything.
#[derive(Debug, Default)]
struct Refused(BTreeMap<String, (Instant, String)>);

impl Refused {
    fn is_waiting(&self, of: &str) -> bool {
        let last = self.0.get(of);
        last.is_some_and(|(at, _)| at.elapsed() < REFUSED)
    }

    fn heard(&mut self, of: &str, what: &str, permission: &str, outcome: Result<(), Error>) {
        self.0.retain(|_, (at, _)| at.elapsed() < 10 * REFUSED);
        let (of, text) = match outcome {
            Ok(()) => {
                self.0.remove(of);
                return;
            }
            // One object does not keep others from being told of.
            Err(Error::Unwilling(why)) if of.is_empty() => {
                debug!(why, "{what} was not taken");
                return;
            }
            Err(Error::Unwilling(why)) => (of, format!("of {of}: {why}")),
            Err(Error::Forbidden(why)) => (
                "",
                format!("the ClusterRole weir-agent lacks {permission} ({why})"),
            ),
            Err(error) => ("", error.to_string()),
        };
        let last = self.0.insert(of.to_owned(), (Instant::now(), text.clone()));
        if last.is_none_or(|(_, last)| last != text) {
            warn!(
                why = text,
                "{what} could not be written; tried again every minute"
            );
        }
    }
}
