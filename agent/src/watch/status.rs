//! How the watch of each kind is doing, for readiness and `weir status`. Each change of it is logged once,
//! however often a source tries again.

use std::collections::BTreeMap;
use std::time::SystemTime;

use tokio::sync::watch;
use tracing::{info, warn};

use crate::model::Kind;

/// How each kind is doing.
pub type Health = BTreeMap<Kind, WatchStatus>;

/// How one kind is doing.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum WatchStatus {
    /// Nothing has failed, and not everything has been said yet.
    Listing,
    /// What the source said is all there is, and it will say more.
    Synced,
    /// The source has not been heard since the agent started: what an earlier run saved stands in.
    Stale {
        /// When what was saved was last known to be so.
        of: SystemTime,
        /// In words, with what to do about it, if anything has failed yet.
        error: Option<String>,
        cause: Option<Cause>,
    },
    /// The source cannot be heard; what it said before holds on.
    Retrying {
        /// Of the first failure in a row.
        since: SystemTime,
        /// In words, with what to do about it.
        error: String,
        cause: Cause,
    },
}

/// Why a source cannot be heard. A message is logged again only when this changes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// 403: the ClusterRole lacks something.
    Forbidden,
    /// 401: the credentials are not accepted.
    Unauthorized,
    /// No answer, or one that cannot be read.
    Unreachable,
    /// Any other answer.
    Refused,
    /// The folder of manifests cannot be read.
    Folder,
}

/// The side of a source.
#[derive(Debug)]
pub struct Reporter {
    health: watch::Sender<Health>,
}

impl Reporter {
    /// Every kind starts as [`WatchStatus::Listing`].
    pub fn new() -> Self {
        let health = Kind::ALL.map(|kind| (kind, WatchStatus::Listing)).into();
        Self {
            health: watch::Sender::new(health),
        }
    }

    /// The side of the readers.
    pub fn subscribe(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Is the kind not heard at present?
    pub fn is_failing(&self, kind: Kind) -> bool {
        matches!(
            self.health.borrow().get(&kind),
            Some(WatchStatus::Retrying { .. })
        )
    }

    /// The kind is complete and current.
    pub fn synced(&self, kind: Kind) {
        self.health.send_if_modified(|health| {
            let before = health.insert(kind, WatchStatus::Synced);
            if let Some(WatchStatus::Retrying { .. } | WatchStatus::Stale { .. }) = before {
                info!(%kind, "watch recovered");
            }
            before != Some(WatchStatus::Synced)
        });
    }

    /// The kind has not been heard, and what was saved as of `of` stands in.
    pub fn stale(&self, kind: Kind, of: SystemTime) {
        let since = humantime::format_rfc3339_seconds(of);
        warn!(%kind, %since, "the API server has not been heard; what was saved stands in");
        self.health.send_modify(|health| {
            let (error, cause) = match health.remove(&kind) {
                Some(WatchStatus::Retrying { error, cause, .. }) => (Some(error), Some(cause)),
                _ => (None, None),
            };
            health.insert(kind, WatchStatus::Stale { of, error, cause });
        });
    }

    /// The kind cannot be heard.
    pub fn failed(&self, kind: Kind, cause: Cause, error: String, now: SystemTime) {
        self.health.send_modify(|health| {
            let (status, is_news) = match health.get(&kind) {
                Some(WatchStatus::Stale { of, cause: old, .. }) => {
                    let (of, is_news) = (*of, *old != Some(cause));
                    let (error, cause) = (Some(error.clone()), Some(cause));
                    (WatchStatus::Stale { of, error, cause }, is_news)
                }
                before => {
                    let (since, is_news) = match before {
                        Some(WatchStatus::Retrying { since, cause: old, .. }) => {
                            (*since, *old != cause)
                        }
                        _ => (now, true),
                    };
                    let error = error.clone();
                    (WatchStatus::Retrying { since, error, cause }, is_news)
                }
            };
            if is_news {
                warn!(%kind, %error, "watch failed; what is known holds on while it is tried again");
            }
            health.insert(kind, status);
        });
    }
}

impl Default for Reporter {
    fn default() -> Self {
        Self::new()
    }
}
