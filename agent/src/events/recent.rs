//! The latest drops and audits, bounded.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use weir_cli::views::DropView;

/// How many of each are kept.
const KEPT: usize = 256;

/// The latest of each, oldest first. They do not push each other out.
#[derive(Debug, Default)]
pub struct Recent {
    pub drops: Latest,
    pub audits: Latest,
}

/// The latest of one kind.
#[derive(Debug, Default)]
pub struct Latest(Mutex<VecDeque<DropView>>);

impl Latest {
    /// Keeps one more; the oldest goes when there are too many.
    pub fn push(&self, event: DropView) {
        let mut kept = self.kept();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event);
    }

    /// All that are kept.
    pub fn all(&self) -> Vec<DropView> {
        self.kept().iter().cloned().collect()
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<DropView>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
