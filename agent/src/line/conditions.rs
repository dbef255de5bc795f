//! What the line finds wrong, said where it is found, and what it says of the source of objects. What a
//! condition does is `crate::conditions`'.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Line;
use super::machine::Machine;
use super::upkeep::AUDITED;
use crate::conditions::{Board, Condition, NodeFault, ObjectFault, Reporter};
use crate::model::Kind;
use crate::watch::status::WatchStatus;

/// Each group of the line says what it finds, and takes back its own.
#[derive(Debug)]
pub(super) struct Said {
    inputs: Reporter,
    quarantine: Reporter,
    pub(super) services: Reporter,
    /// What is left out of what objects ask for.
    pub(super) claims: Reporter,
    pub(super) dns: Reporter,
    pub(super) policy: Reporter,
    /// Parts of policies.
    pub(super) parts: Reporter,
    pub(super) pods: Reporter,
    pub(super) nodes: Reporter,
    pub(super) hooks: Reporter,
    /// One for each part in which they are compared.
    pub(super) tables: [Reporter; AUDITED.len()],
}

impl Said {
    pub(super) fn on(board: &Arc<Board>) -> Self {
        Self {
            inputs: board.reporter("inputs"),
            quarantine: board.reporter("quarantine"),
            services: board.reporter("services"),
            claims: board.reporter("claims"),
            dns: board.reporter("Service of DNS"),
            policy: board.reporter("policy"),
            parts: board.reporter("parts of policies"),
            pods: board.reporter("pods"),
            nodes: board.reporter("nodes"),
            hooks: board.reporter("hooks"),
            tables: AUDITED.map(|part| board.reporter(part)),
        }
    }
}

impl<M: Machine> Line<M> {
    /// Says again what the groups find. Each looks at what is its own.
    pub(super) fn report(&mut self) {
        self.report_inputs();
        self.report_services();
        self.report_policy();
        self.report_pods();
        self.report_nodes();
    }

    /// What the source has not said, or does not say any more, and whether our programs serve.
    fn report_inputs(&self) {
        let health = self.health.borrow();
        let missing: Vec<Kind> = self.inputs.snapshot().missing().collect();
        let mut found = Vec::new();
        for kind in Kind::ALL {
            let error = match health.get(&kind) {
                Some(WatchStatus::Retrying { error, .. }) => Some(error),
                _ => None,
            };
            if missing.contains(&kind) {
                let trouble = error.map_or_else(String::new, |error| format!(": {error}"));
                let text = format!("{kind} objects are not synced yet{trouble}");
                found.push(Condition::part(NodeFault::NotSynced, kind.as_str(), text));
            } else if let Some(error) = error {
                let fault = NodeFault::Disconnected;
                found.push(Condition::part(fault, kind.as_str(), error.as_str()));
            }
        }
        drop(health);
        let stale = self.staleness();
        found.extend(stale.map(|text| Condition::node(NodeFault::Stale, text)));
        let awaited = self.awaits_take_over();
        found.extend(awaited.map(|text| Condition::node(NodeFault::NotTakenOver, text)));
        self.said.inputs.replace(found);
    }

    /// Objects that exist and are not understood; `changed` are those that were not, or are no longer.
    pub(super) fn report_quarantine<'a>(&self, changed: impl IntoIterator<Item = &'a String>) {
        for object in changed {
            let condition =
                |text: &str| Condition::object(object.as_str(), ObjectFault::Quarantined, text);
            match self.inputs.quarantined().get(object) {
                Some(reason) => self.said.quarantine.raise(condition(reason)),
                None => self.said.quarantine.clear(&condition("").about),
            }
        }
    }

    /// Which objects an earlier run saved, while nobody says newer ones; `None` when everything is from the
    /// source itself.
    fn staleness(&self) -> Option<String> {
        let health = self.health.borrow();
        let stale: Vec<_> = health
            .iter()
            .filter_map(|(kind, status)| match status {
                WatchStatus::Stale { of, error, .. } => Some((*kind, *of, error)),
                _ => None,
            })
            .collect();
        let (_, of, error) = *stale.first()?;
        let kinds: Vec<_> = stale.iter().map(|(kind, ..)| kind.as_str()).collect();
        let kinds = match kinds.len() {
            n if n == Kind::ALL.len() => "all objects".to_owned(),
            _ => format!("{} objects", kinds.join(", ")),
        };
        let error = match error {
            Some(error) => format!(": {error}"),
            None => String::new(),
        };
        Some(format!("{kinds} are {}{error}", since(of)))
    }

    /// How old those objects are; `None` as above.
    pub(super) fn stale_for(&self) -> Option<Duration> {
        let health = self.health.borrow();
        let ages = health.values().filter_map(|status| match status {
            WatchStatus::Stale { of, .. } => Some(of.elapsed().unwrap_or_default()),
            _ => None,
        });
        ages.max()
    }
}

/// What keeps a kind from being current.
pub(super) fn problem(status: Option<&WatchStatus>) -> Option<String> {
    match status {
        Some(WatchStatus::Retrying { error, .. }) => Some(error.clone()),
        Some(WatchStatus::Stale { of, error, .. }) => {
            let error = error
                .as_deref()
                .unwrap_or("the API server has not answered");
            Some(format!("{}: {error}", since(*of)))
        }
        _ => None,
    }
}

fn since(of: SystemTime) -> String {
    let at = humantime::format_rfc3339_seconds(of);
    format!("stale, as saved {at}; the API server has not been heard since the agent started")
}
