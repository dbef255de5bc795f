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

/// How far conversations of an earlier agent's programs are ours.
#[derive(Debug, Default)]
struct Adopted {
    /// All that were used up to then, on the monotonic clock.
    since: Duration,
    has_failed: bool,
}

impl Adopted {
    /// It was done from the monotonic time `began` on. If it failed, the next time begins where this one did.
    fn note(&mut self, began: Duration, is_done: bool) {
        if is_done {
            // What is coarse about the clock of programs is a tick.
            self.since = began.saturating_sub(Duration::from_millis(20));
        }
        self.has_failed = !is_done;
    }
}

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
        // Twice, for those that begin meanwhile: an answer to one that `from_net` does not know is refused by the node, and who
        // was led to a backend may be led to another.
        let mut adopted = Adopted::default();
        self.adopt_conversations(&mut adopted);
        self.adopt_conversations(&mut adopted);
        // First where packets leave the node: our program there looks at everything that theirs have passed, while theirs
        // there would let through what ours leave to it.
        let mut is_whole = self.place_net_hooks();
        self.adopt_conversations(&mut adopted);
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
                is_whole = false;
            }
        }
        // Those that have begun since.
        self.adopt_conversations(&mut adopted);
        let mut pods = 0;
        for (device, ifindex) in self.pods.devices_of_open() {
            match self.machine.adopt(&device, ifindex) {
                Ok(()) => pods += 1,
                // Ours, if a link held them; or the device is gone, and nobody has said so yet.
                Err(error) => warn!(
                    device,
                    error = format!("{error:#}"),
                    "its programs stay as they were"
                ),
            }
        }
        // What was not taken over stays where it is, and the next agent tries again.
        if is_whole && !adopted.has_failed {
            self.machine.end_take_over();
        }
        self.programs = Programs::Ours;
        self.published.programs.send_replace(Programs::Ours);
        // Programs of another layout may have read these rows until now.
        self.services.tables.allow_deletes(now);
        self.services.tables.tick(now);
        info!(pods, "our programs are on their hooks");
    }

    /// Those that have begun, or were used, since the last time that it was done.
    fn adopt_conversations(&self, before: &mut Adopted) {
        let began = clock::monotonic();
        let adopted = self.machine.adopt_conversations(before.since);
        before.note(began, adopted.is_ok());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_adopted_is_looked_at_again() {
        let seconds = Duration::from_secs;
        let mut adopted = Adopted::default();
        adopted.note(seconds(5), false);
        assert_eq!((adopted.since, adopted.has_failed), (Duration::ZERO, true));
        adopted.note(seconds(6), true);
        assert!(!adopted.has_failed);
        let since = adopted.since;
        assert!(since < seconds(6) && since > seconds(5));
        adopted.note(seconds(7), false);
        assert_eq!((adopted.since, adopted.has_failed), (since, true));
    }
}
