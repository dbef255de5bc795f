//! Programs on the node's uplinks: filters among those of others. A queue that is not ours stays, with all that is on
//! it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::former::{self, FormerLink};
use super::tc::{At, Queue, Side, Tc};
use super::{Hook, HookOf, Kernel, PROGRAM_PREFIX};

/// What leaves the node and what comes into it meets: program, side.
pub(super) const NET_HOOKS: [(&str, Side); 2] =
    [("weir_from_net", Side::In), ("weir_to_net", Side::Out)];

impl Kernel {
    /// Puts the programs on the uplinks, and takes them off every other device.
    ///
    /// # Errors
    /// The kernel refuses one; the others are done.
    pub fn settle_net_hooks(&self, uplinks: &BTreeMap<u32, String>) -> Result<()> {
        let placed = self.place_net_hooks(uplinks);
        for index in with_our_filters(&self.tc)? {
            if !uplinks.contains_key(&index) {
                leave(&self.tc, self.loaded.bpffs(), index)?;
            }
        }
        for (index, name) in self.former.uplinks()? {
            if !uplinks.contains_key(&index) {
                for (program, side) in NET_HOOKS {
                    let program = self.loaded.program(program)?;
                    if let Some(link) = self.former.update(&name, (index, side), program)? {
                        link.remove()?;
                    }
                }
            }
        }
        placed
    }

    /// Puts the programs where they should be, in place of whatever of ours is there: where packets leave, on all devices,
    /// then where they come in. What our program there leaves to the one that they leave by, an earlier agent's would let
    /// through as it is.
    ///
    /// # Errors
    /// The kernel refuses one; the other devices are done.
    pub fn place_net_hooks(&self, uplinks: &BTreeMap<u32, String>) -> Result<()> {
        let mut first = Ok(());
        let mut refused = BTreeSet::new();
        for (program, side) in NET_HOOKS.into_iter().rev() {
            for (index, device) in uplinks {
                if refused.contains(index) {
                    continue;
                }
                let mut holds = false;
                let placed = self.place_on_uplink(*index, program, side, &mut holds);
                if !holds {
                    refused.insert(*index);
                }
                first = first.and(placed.with_context(|| format!("uplink {device}")));
            }
        }
        first
    }

    /// Says in `holds` whether packets meet our program there, also when not everything could be done.
    fn place_on_uplink(
        &self,
        index: u32,
        program: &str,
        side: Side,
        holds: &mut bool,
    ) -> Result<()> {
        let fd = self.loaded.program(program)?;
        // For a moment a packet may meet a program twice: the second time it finds the packet translated.
        let name = former::uplink_name(index);
        let link = self.former.update(&name, (index, side), fd)?;
        *holds = link.is_some();
        self.see_to_queue(index)?;
        let at = At::Device(index, side);
        let found = self.tc.get(at)?;
        let id = self.loaded.program_id(program)?;
        if !found.is_some_and(|it| it.is_in_our_place() && it.program == id) {
            self.tc
                .put(at, fd, program)
                .with_context(|| format!("put {program} there"))?;
        }
        *holds = true;
        link.map_or(Ok(()), FormerLink::remove)
    }

    fn see_to_queue(&self, index: u32) -> Result<()> {
        match self.tc.give_queue(index) {
            Ok(()) => note_ours(self.loaded.bpffs(), index),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                match self.tc.queue_of(index)? {
                    Some(Queue::Own) => Ok(()),
                    _ => bail!(
                        "somebody has given it a queue (`tc qdisc`) that has no side for what leaves, or whose \
                         filters are in a shared block: make it a clsact queue of its own"
                    ),
                }
            }
            Err(error) => Err(error).context("give it a clsact queue"),
        }
    }

    /// Every hook of an uplink.
    pub(super) fn net_hooks(&self, uplinks: &BTreeMap<u32, String>) -> Vec<Hook> {
        let hooks = uplinks.iter().flat_map(|(index, device)| {
            NET_HOOKS.map(|(program, side)| Hook {
                name: format!("uplink-{device}{}", side.suffix()),
                of: HookOf::Uplink,
                program,
                problem: self.filter_problem(program, self.tc.get(At::Device(*index, side))),
            })
        });
        hooks.collect()
    }
}

/// The devices of their own that hold filters of ours.
///
/// # Errors
/// The kernel does not answer.
pub(super) fn with_our_filters(tc: &Tc) -> io::Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    for (index, queue) in tc.queues()? {
        if queue != Queue::Own {
            continue;
        }
        for side in Side::BOTH {
            let filter = tc.get(At::Device(index, side))?;
            if filter.is_some_and(|it| it.name.starts_with(PROGRAM_PREFIX)) {
                found.insert(index);
            }
        }
    }
    Ok(found)
}

/// Takes our filters off a device, and its queue if we have made it and nobody else uses it.
///
/// # Errors
/// The kernel refuses.
pub(super) fn leave(tc: &Tc, bpffs: &Path, index: u32) -> Result<()> {
    let mut is_empty = true;
    for side in Side::BOTH {
        let at = At::Device(index, side);
        if let Some(filter) = tc.get(at)?
            && filter.name.starts_with(PROGRAM_PREFIX)
        {
            tc.remove(at, &filter)?;
        }
        is_empty &= tc.is_empty(at)?;
    }
    let note = note(bpffs, index);
    if !note.exists() {
        return Ok(());
    }
    if is_empty {
        tc.remove_queue(index)?;
    }
    fs::remove_dir(&note).with_context(|| format!("remove {}", note.display()))
}

/// Where it is noted which queues are ours: folders of a bpffs, which live as long as queues do.
pub(super) fn notes(bpffs: &Path) -> PathBuf {
    bpffs.join("queues")
}

fn note(bpffs: &Path, index: u32) -> PathBuf {
    notes(bpffs).join(index.to_string())
}

fn note_ours(bpffs: &Path, index: u32) -> Result<()> {
    let note = note(bpffs, index);
    fs::create_dir_all(&note).with_context(|| format!("make the folder {}", note.display()))
}
