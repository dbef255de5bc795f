//! From the ring of the kernel to events in words.

use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::warn;
use weir_common::event::EventKind;
use weir_common::policy::RuleId;

use crate::compile::policy::RuleBook;
use crate::conditions::{Condition, NodeFault, Reporter};
use crate::events::{self, Explainer, Names, Recent};
use crate::kernel::{Ring, clock};
use crate::line::Published;

pub(super) async fn read_ring(ring: Ring, records: mpsc::Sender<Vec<u8>>, said: Reporter) {
    let mut lost = 0u64;
    let ended = ring
        .run(records, || {
            lost += 1;
            if lost.is_power_of_two() {
                warn!(
                    lost,
                    "drop events come faster than they are explained; counters stay exact"
                );
            }
        })
        .await;
    if let Err(error) = ended {
        let text = format!("the ring of events cannot be read any more: {error}");
        said.raise(Condition::node(NodeFault::EventsLost, text));
    }
    // What it would say is lost, and said to be; everything else goes on.
    std::future::pending().await
}

pub(super) async fn explain(
    mut incoming: mpsc::Receiver<Vec<u8>>,
    names: Names,
    published: Arc<Published>,
    recent: Arc<Recent>,
) {
    let mut unknown = false;
    while let Some(record) = incoming.recv().await {
        match events::decode(&record) {
            Ok(event) => {
                let words = Words {
                    names: names.clone(),
                    rules: published.rules.load_full(),
                };
                let latest = match event.kind {
                    EventKind::AUDIT => &recent.audits,
                    _ => &recent.drops,
                };
                latest.push(events::explain(&event, clock::monotonic_start(), &words));
            }
            Err(error) if !unknown => {
                unknown = true;
                warn!(%error, "events of another version are left out");
            }
            Err(_) => {}
        }
    }
}

struct Words {
    names: Names,
    rules: Arc<RuleBook>,
}

impl Explainer for Words {
    fn rule(&self, rule: RuleId) -> Option<String> {
        self.rules.owner(rule).map(ToString::to_string)
    }

    fn names(&self) -> &Names {
        &self.names
    }
}
