//! What the line tells of objects that an earlier run saved, while nobody says newer ones.

use std::time::{Duration, SystemTime};

use super::Line;
use crate::model::Kind;
use crate::watch::status::WatchStatus;

/// Is it said how old they are? Then the text is another one every second.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Age {
    Told,
    Omitted,
}

impl Line {
    /// In one sentence; `None` when everything is from the source itself.
    pub(super) fn staleness(&self, age: Age) -> Option<String> {
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
        Some(format!("{kinds} are {}{error}", since(of, age)))
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
            Some(format!("{}: {error}", since(*of, Age::Told)))
        }
        _ => None,
    }
}

fn since(of: SystemTime, age: Age) -> String {
    let at = humantime::format_rfc3339_seconds(of);
    let ago = match age {
        Age::Told => {
            let age = Duration::from_secs(of.elapsed().unwrap_or_default().as_secs());
            format!(", {} ago", humantime::format_duration(age))
        }
        Age::Omitted => String::new(),
    };
    format!("stale, as saved {at}{ago}; the API server has not been heard since the agent started")
}
