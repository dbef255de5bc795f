//! What the cluster is told, beside what it asks: Events about conditions, and the condition of a node whose agent
//! is away. Both are written by one agent of all, see [`Roster`]; what is wrong is `conditions`'.

mod absence;
mod api;
mod events;
mod roster;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::time::MissedTickBehavior;
use tracing::warn;

use crate::conditions::Board;

pub use api::Scribe;
pub use roster::{Agents, Roster};

use absence::{Absence, Notice};
use events::{Events, Note};

/// How often it is looked what there is to tell.
const LOOK: Duration = Duration::from_secs(5);
/// How long the API server is left alone after it has not taken something.
const REFUSED: Duration = Duration::from_secs(60);

/// What an agent tells; each needs a permission of its own (deploy/helm/weir, `rbac.yaml`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tells {
    /// Events about conditions: `create` on `events` of `events.k8s.io`.
    pub events: bool,
    /// The condition `NetworkUnavailable` of nodes whose agent is away: `patch` on `nodes/status`.
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
}

impl Teller {
    /// Tells what there is to tell, for ever.
    pub async fn run(self) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut absence, mut events) = (Absence::default(), Events::default());
        let mut refused = Refused::default();
        loop {
            look.tick().await;
            if self.tells.node_condition {
                let due = self
                    .roster
                    .read(|agents| absence.due(agents, &self.node, Instant::now()));
                for notice in due {
                    self.notify(&notice, &mut refused).await;
                }
            }
            if self.tells.events {
                let now = SystemTime::now();
                for note in events.due(&self.board.all(), now) {
                    let is_ours = self
                        .roster
                        .read(|agents| note.is_told_by(agents, &self.node));
                    if !is_ours || self.say(&note, &mut refused).await {
                        events.told(&note, now);
                    }
                }
            }
        }
    }

    async fn notify(&self, notice: &Notice, refused: &mut Refused) {
        const WHAT: &str = "the condition NetworkUnavailable of a node";
        if refused.is_waiting(WHAT) {
            return;
        }
        let outcome = self.scribe.notify(notice).await;
        refused.heard(WHAT, "nodes/status", "patch", outcome);
    }

    /// True if the API server has taken it.
    async fn say(&self, note: &Note, refused: &mut Refused) -> bool {
        const WHAT: &str = "an Event";
        if refused.is_waiting(WHAT) {
            return false;
        }
        let outcome = self.scribe.say(note, &self.node).await;
        let is_taken = outcome.is_ok();
        refused.heard(WHAT, "events of events.k8s.io", "create", outcome);
        is_taken
    }
}

/// What the API server did not take, so that it is neither asked nor told of it at every look.
#[derive(Debug, Default)]
struct Refused(BTreeMap<&'static str, (Instant, String)>);

impl Refused {
    fn is_waiting(&self, what: &str) -> bool {
        self.0
            .get(what)
            .is_some_and(|(at, _)| at.elapsed() < REFUSED)
    }

    fn heard(
        &mut self,
        what: &'static str,
        resource: &str,
        verb: &str,
        outcome: Result<(), api::Error>,
    ) {
        let Err(error) = outcome else {
            self.0.remove(what);
            return;
        };
        let mut text = error.to_string();
        if error.is_forbidden() {
            text = format!("the ClusterRole weir-agent lacks {verb} on {resource} ({text})");
        }
        let last = self.0.insert(what, (Instant::now(), text.clone()));
        if last.is_none_or(|(_, last)| last != text) {
            warn!(
                why = text,
                "{what} could not be written; tried again every minute"
            );
        }
    }
}
