//! The latest drops or audits, bounded.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use weir_cli::views::DropView;

/// How many drops are kept.
const KEPT: usize = 256;

/// The latest drops, oldest first.
#[derive(Debug, Default)]
pub struct Recent(Mutex<VecDeque<DropView>>);

impl Recent {
    /// Keeps one more; the oldest goes when there are too many.
    pub fn push(&self, drop: DropView) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(drop);
    }

    /// All that are kept.
    pub fn all(&self) -> Vec<DropView> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .cloned()
            .collect()
    }
}
