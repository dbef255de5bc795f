//! The zone that is served, shared by who fills it and who answers from it.

use std::sync::Arc;

use arc_swap::{ArcSwapOption, Guard};
use tokio::sync::watch;

use crate::zone::Zone;

/// A zone, none until one was whole. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct SharedZone(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    zone: ArcSwapOption<Zone>,
    state: watch::Sender<State>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Absent,
    Known,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            zone: ArcSwapOption::empty(),
            state: watch::Sender::new(State::Absent),
        }
    }
}

impl SharedZone {
    /// The zone as it is now.
    pub fn load(&self) -> Guard<Option<Arc<Zone>>> {
        self.0.zone.load()
    }

    /// Puts another in its place.
    pub fn store(&self, zone: Option<Arc<Zone>>) {
        let state = match zone {
            Some(_) => State::Known,
            None => State::Absent,
        };
        self.0.zone.store(zone);
        self.0.state.send_if_modified(|old| {
            let differs = *old != state;
            *old = state;
            differs
        });
    }

    /// Waits until there is one.
    pub async fn known(&self) {
        let mut state = self.0.state.subscribe();
        // The sender is ours: it is not dropped meanwhile.
        if state.wait_for(|it| *it == State::Known).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
