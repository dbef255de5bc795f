//! Putting our programs in the place of an earlier agent's, once and together. What the tables hold is not
//! here.
//!
//! An agent whose tables have the layout of those before fills nothing that is not there already. One with
//! another layout begins with empty tables, and until they say what the others say every packet must meet the
//! programs that read those. So nothing of ours is on a hook before all inputs are known and written.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::machine::Machine;
use super::{Line, Programs};
use crate::kernel::{Hook, clock};

impl<M: Machine> Line<M> {
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
        if let Err(error) = self.machine.place_socket_hooks() {
            warn!(
                error = format!("{error:#}"),
                "a socket hook holds no program of ours yet"
            );
        }
        // Twice, for those that begin meanwhile: an answer to one that `from_net` does not know is refused by the node.
        let mut since = Duration::ZERO;
        let mut is_whole = true;
        for _ in 0..2 {
            (since, is_whole) = self.adopt_conversations(since);
        }
        // First where packets leave the node: our program there looks at everything that theirs have passed, while theirs
        // there would let through what ours leave to it.
        self.place_net_hooks();
        if let Err(error) = self.machine.place_pod_hooks() {
            warn!(
                error = format!("{error:#}"),
                "the filters of all pods hold no program of ours yet"
            );
            is_whole = false;
        }
        // Each of these is done in no time; what follows takes its time for each device.
        for (device, ifindex) in self.pods.devices_of_open() {
            if let Err(error) = self.machine.replace_programs(&device, ifindex) {
                warn!(
                    device,
                    error = format!("{error:#}"),
                    "its programs stay as they were for now"
                );
            }
        }
        // Those that have begun since.
        is_whole &= self.adopt_conversations(since).1;
        let mut pods = 0;
        for (device, ifindex) in self.pods.devices_of_open() {
            match self.machine.adopt(&device, ifindex) {
                Ok(()) => pods += 1,
                Err(error) => warn!(
                    device,
                    error = format!("{error:#}"),
                    "its programs stay as they were"
                ),
            }
        }
        // What was not taken over stays where it is, and the next agent tries again.
        if is_whole {
            self.machine.end_take_over();
        }
        self.programs = Programs::Ours;
        self.published.programs.send_replace(Programs::Ours);
        // Programs of another layout may have read these rows until now.
        self.services.tables.allow_deletes(now);
        self.services.tables.tick(now);
        info!(pods, "our programs are on their hooks");
    }

    /// Returns since when others may have begun, and whether all could be taken over.
    fn adopt_conversations(&self, since: Duration) -> (Duration, bool) {
        let began = clock::monotonic();
        let adopted = self.machine.adopt_conversations(since);
        let is_whole = adopted.is_ok();
        match adopted {
            Ok(0) => {}
            Ok(found) => info!(
                found,
                "conversations of an earlier agent's programs are ours"
            ),
            Err(error) => warn!(
                error = format!("{error:#}"),
                "conversations of an earlier agent's programs are lost where they are translated"
            ),
        }
        // What is coarse about the clock of programs is a tick.
        (began.saturating_sub(Duration::from_millis(20)), is_whole)
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
        let pods = self.pods.devices_of_open();
        let mut hooks = match self.machine.hooks(pods, &self.nodes.devices) {
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
        if self.nodes.outlets.is_none() {
            return Some("the devices that lead out of the node are not known yet");
        }
        if !self.pods.are_resumed {
            return Some("the pods of this node are not known yet");
        }
        self.policy.awaits()
    }
}
