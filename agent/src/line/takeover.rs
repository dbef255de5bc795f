//! Putting our programs in the place of an earlier agent's, once and together. What the tables hold is not
//! here.
//!
//! An agent whose tables have the layout of those before fills nothing that is not there already. One with
//! another layout begins with empty tables, and until they say what the others say every packet must meet the
//! programs that read those. So nothing of ours is on a hook before all inputs are known and written.

use std::time::Instant;

use tracing::{info, warn};

use super::{Line, Programs};
use crate::apply::Status;
use crate::kernel::Hook;

impl Line {
    /// Puts our programs on every hook, if it is time and was not done before. A hook that refuses is repaired like
    /// any other.
    pub(super) fn take_over(&mut self, now: Instant) {
        if self.programs == Programs::Ours {
            return;
        }
        let is_time = self.is_complete && self.awaits().is_none();
        if !is_time && cfg!(not(feature = "broken-take-over-first")) {
            return;
        }
        if let Err(error) = self.kernel.place_socket_hooks() {
            warn!(
                error = format!("{error:#}"),
                "a socket hook holds no program of ours yet"
            );
        }
        self.place_net_hooks();
        if let Err(error) = self.kernel.place_pod_hooks() {
            warn!(
                error = format!("{error:#}"),
                "the filters of all pods hold no program of ours yet"
            );
        }
        let mut pods = 0;
        for (device, ifindex) in self.open_devices() {
            match self.kernel.adopt(&device, ifindex) {
                Ok(()) => pods += 1,
                Err(error) => warn!(
                    device,
                    error = format!("{error:#}"),
                    "its programs stay as they were"
                ),
            }
        }
        self.programs = Programs::Ours;
        self.published.programs.send_replace(Programs::Ours);
        // Programs of another layout may have read these rows until now.
        self.services.allow_deletes(now);
        self.services.tick(now);
        info!(pods, "our programs are on their hooks");
    }

    /// What keeps our programs from their hooks when every input is known.
    pub(super) fn awaits_take_over(&self) -> Option<String> {
        if self.programs == Programs::Ours || !self.inputs.snapshot().is_complete() {
            return None;
        }
        let what = self
            .awaits()
            .unwrap_or("ours are about to take their place");
        Some(format!("programs of an earlier agent still serve: {what}"))
    }

    /// The hooks, as somebody should see them who asks.
    pub(super) fn hooks(&self) -> Vec<Hook> {
        let mut hooks = match self.kernel.hooks(self.open_devices()) {
            Ok(hooks) => hooks.into_list(),
            Err(error) => vec![Hook::unknown(&error)],
        };
        if self.programs == Programs::OfBefore {
            for hook in &mut hooks {
                hook.problem = hook.problem.take().map(|problem| {
                    format!("{problem}; it is replaced when every input is synced and written")
                });
            }
        }
        hooks
    }

    fn awaits(&self) -> Option<&str> {
        if self.outlets.is_none() {
            return Some("the devices that lead out of the node are not known yet");
        }
        if !self.are_pods_resumed {
            return Some("the pods of this node are not known yet");
        }
        match (&self.policy_refused, self.policies.status()) {
            (None, Status::Done) if self.policy_after.is_none() => None,
            (Some(why), _) | (None, Status::Failed(why)) => Some(why),
            (None, Status::Pending | Status::Done) => Some("policy is not written yet"),
        }
    }
}
