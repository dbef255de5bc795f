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
            if let Some(WatchStatus::Retrying { .. }) = before {
                info!(%kind, "watch recovered");
            }
            before != Some(WatchStatus::Synced)
        });
    }

    /// The kind cannot be heard.
    pub fn failed(&self, kind: Kind, cause: Cause, error: String, now: SystemTime) {
        self.health.send_modify(|health| {
            let (since, is_news) = match health.get(&kind) {
                Some(WatchStatus::Retrying {
                    since, cause: old, ..
                }) => (*since, *old != cause),
                _ => (now, true),
            };
            if is_news {
                warn!(%kind, %error, "watch failed; what is known holds on while it is tried again");
            }
            health.insert(
                kind,
                WatchStatus::Retrying {
                    since,
                    error,
                    cause,
                },
            );
        });
    }
}

impl Default for Reporter {
    fn default() -> Self {
        Self::new()
    }
}
