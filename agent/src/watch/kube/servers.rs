//! The API servers of the cluster, of which one at a time is asked: the one that answers.

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use kube::{Api, Client};
use tokio::time::Instant;
use tracing::warn;

use super::super::wire::{Decoded, WireKind};

/// In the order in which they are tried.
pub struct Servers {
    all: Vec<Server>,
    /// Which one is asked.
    current: AtomicUsize,
}

/// One of them.
pub(super) struct Server {
    place: usize,
    url: String,
    client: Client,
    began: Instant,
    /// Milliseconds from `began` to when it was last heard.
    heard: AtomicU64,
}

impl Servers {
    /// Of clients and what they are called.
    pub(super) fn new(clients: impl IntoIterator<Item = (String, Client)>) -> Self {
        let server = |(place, (url, client))| Server {
            place,
            url,
            client,
            began: Instant::now(),
            heard: AtomicU64::new(0),
        };
        Self {
            all: clients.into_iter().enumerate().map(server).collect(),
            current: AtomicUsize::new(0),
        }
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// Whom to ask.
    pub(super) fn current(&self) -> &Server {
        &self.all[self.current.load(Ordering::Relaxed) % self.all.len()]
    }

    /// A client of the one that is asked.
    pub fn client(&self) -> Client {
        self.current().client.clone()
    }

    /// The next one is asked from now on, unless that is so already.
    pub(super) fn give_up(&self, server: &Server) {
        let next = (server.place + 1) % self.all.len();
        let moved =
            self.current
                .compare_exchange(server.place, next, Ordering::Relaxed, Ordering::Relaxed);
        if moved.is_ok() && next != server.place {
            warn!(
                server = server.url,
                next = self.all[next].url,
                "asking the next API server"
            );
        }
    }
}

impl Server {
    /// The kind, in a version of its group.
    pub(super) fn api<K: WireKind>(&self, version: &'static str) -> Api<Decoded<K>> {
        Api::all_with(self.client.clone(), &version)
    }

    /// It has said something, on whatever connection.
    pub(super) fn lives(&self) {
        let millis = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.fetch_max(millis, Ordering::Relaxed);
    }

    pub(super) fn last_heard(&self) -> Instant {
        self.began + Duration::from_millis(self.heard.load(Ordering::Relaxed))
    }
}

/// `kube::Client` cannot be printed.
impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.all.iter().map(|server| &server.url))
            .finish()
    }
}
