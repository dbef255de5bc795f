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
use tracing::{debug, warn};

use crate::beat::{LOOK, beat};
use crate::conditions::Board;
use crate::model::Kind;
use crate::watch::status::{Health, WatchStatus};

pub use api::Scribe;
pub use roster::{Agents, Roster};

use absence::{Absence, Notice};
use api::Error;
use events::{By, Events, Fate};

/// How long an API server that is away is left alone, and a node whose condition was not taken.
const AGAIN: Duration = Duration::from_secs(60);
/// How long a person is not told again that something is not taken.
const WARNED: Duration = Duration::from_secs(600);
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
        let (mut events, mut refusals) = (Events::default(), Refusals::default());
        loop {
            beat(LOOK).await;
            let now = SystemTime::now();
            let mut said = 0;
            for note in events.due(&self.board.all(), now) {
                match self.roster.read(|agents| note.teller(agents, &self.node)) {
                    None => {}
                    Some(By::Another) => events.tried(&note, Fate::Left, now),
                    Some(By::Us) => {
                        if said == MOST || refusals.is_away() {
                            break;
                        }
                        said += 1;
                        let outcome = self.scribe.say(&note, &self.node).await;
                        match outcome {
                            Ok(()) => events.tried(&note, Fate::Told, now),
                            Err(Error::NotTaken(_) | Error::Overloaded(_)) => {
                                events.tried(&note, Fate::NotTaken, now);
                            }
                            // As soon as there is somebody to take it.
                            Err(Error::Unreachable(_)) => {}
                        }
                        refusals.heard("an Event", &note.to_string(), outcome);
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
        let (mut absence, mut refusals) = (Absence::default(), Refusals::default());
        // When a node's condition was last not taken.
        let mut not_taken: BTreeMap<Arc<str>, Instant> = BTreeMap::new();
        loop {
            beat(LOOK).await;
            let due = |agents: &Agents| absence.due(agents, &self.node, Instant::now());
            let due = self.roster.read(due);
            // What was heard last may be long past.
            if !self.hears() {
                absence = Absence::default();
                continue;
            }
            not_taken.retain(|_, at| at.elapsed() < AGAIN);
            for notice in due {
                let (Notice::Away(node) | Notice::Back(node)) = &notice;
                if refusals.is_away() || not_taken.contains_key(node) {
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
                if outcome.is_err() {
                    not_taken.insert(node.clone(), Instant::now());
                }
                refusals.heard("the condition NetworkUnavailable", node, outcome);
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

/// What the API server did not take, so that a person hears of it and an API server that is away is left alone.
#[derive(Debug, Default)]
struct Refusals {
    away: Option<Instant>,
    warned: Option<Instant>,
}

impl Refusals {
    /// Was the API server away a moment ago?
    fn is_away(&self) -> bool {
        self.away.is_some_and(|at| at.elapsed() < AGAIN)
    }

    fn heard(&mut self, what: &str, of: &str, outcome: Result<(), Error>) {
        let Err(why) = outcome else {
            *self = Self::default();
            return;
        };
        self.away = why.is_away().then(Instant::now);
        if self.warned.is_some_and(|at| at.elapsed() < WARNED) {
            return debug!(of, %why, "the API server has not taken {what}");
        }
        self.warned = Some(Instant::now());
        warn!(
            of,
            %why,
            "the API server has not taken {what}; it is tried again, and until one is taken more of this is logged at debug \
             for ten minutes"
        );
    }
}
