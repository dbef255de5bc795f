//! Releases that lie in a folder: the plugin's, from when no agent answered, and the agent's own, until the disk knows what a
//! DEL has taken back.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::{MutexGuard, PoisonError};

use anyhow::{Context, Result};
use tokio::task::block_in_place;
use tracing::{info, warn};
use weir_cni::attachment::Attachment;
use weir_cni::released;

use super::server::{Leftover, Pods};
use super::{Datapath, LeaseError, Leases};

impl<D: Datapath> Pods<D> {
    /// Frees what the plugin released while no agent answered, and what an agent could not finish after its answer. A note
    /// that the disk keeps us from removing stays, as does that of a device that the kernel keeps, and stands in the way of
    /// its attachment alone.
    pub(super) async fn take_in_releases(&self) -> Result<()> {
        let mut is_writable = true;
        for attachment in self.blocking(list_releases).await? {
            if self.settling().contains(&attachment) {
                continue;
            }
            let claim = self.claim(&attachment).await;
            let path = self.release_of(&attachment);
            if !path.exists() {
                // Somebody took it in while we waited; a lease of this name is a new one.
                continue;
            }
            if let Err(error) = self.take_back(&attachment).await {
                warn!(%attachment, error = format!("{error:#}"), "cannot take in a release");
                continue;
            }
            // A store that does not take it is tried once, not for each note: somebody may wait.
            if !self.delete_device(&attachment.device()).await || !is_writable {
                continue;
            }
            let dir = self.leases.released_dir().to_owned();
            let remove = {
                let attachment = attachment.clone();
                move |leases: &Leases| -> Result<io::Result<()>, LeaseError> {
                    // Also when nobody waits for this any more: a later note of the name must find it done.
                    let _claim = claim;
                    // Another who took it in, and was called off, may have left it to be written.
                    leases.make_durable()?;
                    Ok(released::remove(&dir, [&attachment]))
                }
            };
            match self.blocking(remove).await {
                Ok(Ok(())) => info!(%attachment, "a release is taken in"),
                Ok(Err(error)) => warn!(%attachment, %error, "the note of a release stays"),
                Err(error) => {
                    is_writable = false;
                    warn!(%error, "the notes of releases stay");
                }
            }
        }
        Ok(())
    }

    fn settling(&self) -> MutexGuard<'_, HashSet<Attachment>> {
        self.settling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the plugin leaves a release of this attachment.
    pub(super) fn release_of(&self, attachment: &Attachment) -> PathBuf {
        self.leases.released_dir().join(attachment.to_string())
    }

    /// Notes that an attachment was taken back in memory. False when its device is gone instead: an agent that starts drops
    /// a lease without one.
    ///
    /// # Errors
    /// Nothing would tell an agent that starts.
    pub(super) async fn note(&self, attachment: &Attachment) -> Result<bool> {
        let dir = self.leases.released_dir();
        self.settling().insert(attachment.clone());
        let noted = block_in_place(|| released::note(dir, attachment));
        if let Err(error) = &noted {
            self.settling().remove(attachment);
            warn!(%attachment, %error, "cannot note a release: waiting for the device to go");
            let device = attachment.device();
            let deleted = self.datapath.delete_device(&device);
            let (deleted, _) = tokio::join!(deleted, self.record());
            deleted?;
        }
        Ok(noted.is_ok())
    }

    /// What is left of a request after its answer: the device and the record on the disk go beside each other, and the note
    /// when both are gone. One that cannot be finished has a note, and is taken in later.
    pub(super) async fn settle(&self, leftover: Leftover) {
        let Leftover {
            attachment,
            noted,
            claim,
        } = leftover;
        let device = attachment.device();
        let (is_gone, is_recorded) = tokio::join!(self.delete_device(&device), self.record());
        let dir = self.leases.released_dir();
        let settled = match (noted, is_gone) {
            (true, true) if is_recorded => block_in_place(|| released::forget(dir, &attachment)),
            (false, false) => block_in_place(|| released::note(dir, &attachment)),
            _ => Ok(()),
        };
        self.settling().remove(&attachment);
        if let Err(error) = settled {
            warn!(%attachment, %error, "the note of a release is not as it should be");
        }
        drop(claim);
    }

    /// Whether the disk knows what was taken back. One that fails is not tried for each: whoever leases next does, and who
    /// takes in releases.
    async fn record(&self) -> bool {
        !self.leases.is_failing() && self.make_durable().await
    }
}

/// What is noted: by the plugin while no agent answered, or by an agent that did.
fn list_releases(leases: &Leases) -> Result<Vec<Attachment>> {
    let dir = leases.released_dir();
    released::list(dir).with_context(|| format!("read {}", dir.display()))
}
