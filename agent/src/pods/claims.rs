//! Who works on which attachment and in which namespace: requests about the same one go one after
//! the other. A claim can move into a task that finishes the work after the answer.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use weir_cni::attachment::Attachment;

/// What can be claimed.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) enum Key {
    Attachment(Attachment),
    /// A network namespace, by its inode: the interface of a deleted attachment stays there until
    /// its device is deleted.
    Netns(u64),
}

#[derive(Clone, Debug, Default)]
pub(super) struct Claims(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    keys: Mutex<HashSet<Key>>,
    returned: Notify,
}

/// The keys are its holder's until it is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    shared: Arc<Shared>,
    keys: Vec<Key>,
}

impl Claims {
    /// Waits until all of `keys` are free at once. Cancel safe.
    pub(super) async fn claim(&self, keys: Vec<Key>) -> Claim {
        loop {
            let returned = self.0.returned.notified();
            tokio::pin!(returned);
            // From here on a return wakes us, even one before the first poll.
            returned.as_mut().enable();
            {
                let mut claimed = self.0.keys();
                if keys.iter().all(|key| !claimed.contains(key)) {
                    claimed.extend(keys.iter().cloned());
                    return Claim {
                        shared: self.0.clone(),
                        keys,
                    };
                }
            }
            returned.await;
        }
    }
}

impl Shared {
    fn keys(&self) -> MutexGuard<'_, HashSet<Key>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = self.shared.keys();
        for key in &self.keys {
            claimed.remove(key);
        }
        drop(claimed);
        self.shared.returned.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_claim_waits_for_every_key_it_needs() {
        let claims = Claims::default();
        let one = claims.claim(vec![Key::Netns(1)]).await;
        let two = claims.claim(vec![Key::Netns(2)]).await;
        let mut both = Box::pin(claims.claim(vec![Key::Netns(1), Key::Netns(2)]));
        assert!((&mut both).now_or_never().is_none());
        drop(one);
        assert!((&mut both).now_or_never().is_none());
        drop(two);
        assert!((&mut both).now_or_never().is_some());
        assert!(claims.claim(vec![Key::Netns(1)]).now_or_never().is_some());
    }
}
