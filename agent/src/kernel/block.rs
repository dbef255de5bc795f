//! The two blocks of filters that all pods' devices share: one program for what pods send, one for what is sent to
//! them. A device is judged when it has joined; one that no row of a table explains is closed.
//!
//! A block is there as long as a device is in it, and a new one is empty, which lets everything pass. So whoever joins
//! sees to it that the filters are there, before the device is up.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result};
use tracing::warn;

use super::former::FormerLink;
use super::tc::{At, Filter, Queue, Side, Tc};
use super::{Hook, HookOf, Kernel, sysctl};

/// The programs of the blocks, by side. What comes into a pod's device is what the pod has sent.
pub(super) const POD_HOOKS: [(&str, Side); 2] =
    [("weir_from_pod", Side::In), ("weir_to_pod", Side::Out)];

/// What is wrong with one pod's device. It says nothing of other devices.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DeviceProblem {
    pub device: String,
    pub ifindex: u32,
    pub problem: DeviceFault,
}

/// How a pod's device can be without our programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DeviceFault {
    #[error("it is gone: somebody has deleted it, or its other end in the pod")]
    Gone,
    #[error("somebody has taken it out of the filters of all pods")]
    Left,
}

impl Kernel {
    /// Puts a pod's device under the programs of all pods, with the settings that such a device has. Until a row of
    /// it is written nothing passes it, in either direction. One that is in place is left as it is.
    ///
    /// # Errors
    /// The kernel refuses. Then the device must not be up.
    pub fn join(&self, device: &str, ifindex: u32) -> Result<()> {
        sysctl::set_pod_device(device)?;
        self.join_blocks(ifindex)
            .with_context(|| format!("put {device} under the filters of all pods"))
    }

    /// Puts the settings of these devices back, where somebody has changed them since. Says of which that cannot be done,
    /// and why; not of those that are gone.
    pub fn keep_settings<'a>(
        &self,
        devices: impl IntoIterator<Item = &'a str>,
    ) -> Vec<(&'a str, String)> {
        let mut left = Vec::new();
        for device in devices {
            match sysctl::set_pod_device(device) {
                Ok(true) => warn!(
                    device,
                    "somebody has changed the settings of a pod's device; they are put back"
                ),
                Ok(false) => {}
                Err(error) => {
                    let cause = error.downcast_ref::<io::Error>().map(io::Error::kind);
                    if cause != Some(io::ErrorKind::NotFound) {
                        left.push((device, format!("{error:#}")));
                    }
                }
            }
        }
        left
    }

    /// Puts a pod's device that an earlier agent serves under our programs, whatever held that agent's.
    ///
    /// # Errors
    /// The kernel refuses; then a link of an earlier agent still holds a program, ours or its own.
    pub fn adopt(&self, device: &str, ifindex: u32) -> Result<()> {
        // A link's program is the first that a packet meets, and ours has the last word: the filter is met from the
        // moment on when the link goes.
        let links = self.replace_former(device, ifindex)?;
        self.join(device, ifindex)?;
        links.into_iter().try_for_each(|link| link.remove())
    }

    /// Gives the links by which an earlier agent holds its programs on a pod's device ours. Nothing to do without links.
    ///
    /// # Errors
    /// The kernel refuses; then a link still holds the earlier agent's program.
    pub fn replace_programs(&self, device: &str, ifindex: u32) -> Result<()> {
        self.replace_former(device, ifindex).map(drop)
    }

    fn replace_former(&self, device: &str, ifindex: u32) -> Result<Vec<FormerLink>> {
        let mut links = Vec::new();
        for side in Side::BOTH {
            let program = self.pod_program(side)?;
            links.extend(self.former.update(device, (ifindex, side), program)?);
        }
        Ok(links)
    }

    /// Runs our programs for every pod, in place of an earlier agent's. Nothing to do without a pod.
    ///
    /// # Errors
    /// The kernel refuses; a side that was done stays done.
    pub fn place_pod_hooks(&self) -> Result<()> {
        for (program, side) in POD_HOOKS {
            let id = self.loaded.program_id(program)?;
            let found = self.tc.get(At::Pods(side));
            let found = found.with_context(|| format!("look for {program}"))?;
            if found.is_some_and(|it| it.is_in_our_place() && it.program == id) {
                continue;
            }
            if let Err(error) = self.put_pod_hook(side)
                && self.has_pods()?
            {
                return Err(error);
            }
        }
        Ok(())
    }

    fn has_pods(&self) -> io::Result<bool> {
        let queues = self.tc.queues()?;
        Ok(queues.values().any(|queue| *queue == Queue::InBlocks))
    }

    fn join_blocks(&self, ifindex: u32) -> Result<()> {
        if let Err(error) = self.tc.join(ifindex) {
            if error.kind() != io::ErrorKind::AlreadyExists {
                return Err(error.into());
            }
            // A pod's device is ours alone: a queue that somebody else has given it is in the way.
            if self.tc.queue_of(ifindex)? != Some(Queue::InBlocks) {
                self.tc.remove_queue(ifindex)?;
                self.tc.join(ifindex)?;
            }
        }
        for (program, side) in POD_HOOKS {
            // One of an earlier agent stays until ours take over for all pods together.
            let found = self.tc.get(At::Pods(side))?;
            if !found.is_some_and(|it| it.is_in_our_place() && it.name == program) {
                self.put_pod_hook(side)?;
            }
        }
        Ok(())
    }

    fn put_pod_hook(&self, side: Side) -> Result<()> {
        let (program, _) = POD_HOOKS[usize::from(side == Side::Out)];
        let put = self
            .tc
            .put(At::Pods(side), self.loaded.program(program)?, program);
        put.with_context(|| format!("run {program} for all pods"))
    }

    fn pod_program(&self, side: Side) -> io::Result<BorrowedFd<'_>> {
        self.loaded
            .program(POD_HOOKS[usize::from(side == Side::Out)].0)
    }

    /// The filters of all pods. Without a pod there is nothing that could hold them.
    pub(super) fn pod_hooks(&self) -> Vec<Hook> {
        let hooks = POD_HOOKS.map(|(program, side)| {
            let found = self.tc.get(At::Pods(side));
            Hook {
                name: format!("pods{}", side.suffix()),
                of: HookOf::Pods,
                program,
                problem: self.filter_problem(program, found),
            }
        });
        hooks.into()
    }

    /// What is wrong with a filter of ours, if anything.
    pub(super) fn filter_problem(
        &self,
        program: &str,
        found: io::Result<Option<Filter>>,
    ) -> Option<String> {
        match (found, self.loaded.program_id(program)) {
            (Err(error), _) | (_, Err(error)) => Some(error.to_string()),
            (Ok(None), _) => Some("no filter of ours is there".to_owned()),
            (Ok(Some(it)), _) if !it.is_in_our_place() => {
                Some("what the program of the filter says does not count".to_owned())
            }
            (Ok(Some(it)), Ok(id)) if it.program != id => {
                Some(format!("holds program {} instead of {id}", it.program))
            }
            (Ok(Some(_)), Ok(_)) => None,
        }
    }

    /// Those of these devices that are not under the filters of all pods.
    ///
    /// # Errors
    /// The kernel cannot be asked; then nothing is known of any device.
    pub(super) fn device_problems(
        &self,
        devices: Vec<(String, u32)>,
    ) -> io::Result<Vec<DeviceProblem>> {
        let queues = self.tc.queues()?;
        let mut problems = Vec::new();
        for (device, ifindex) in devices {
            let queue = match queues.get(&ifindex) {
                // It may have come since.
                None => self.tc.queue_of(ifindex),
                found => Ok(found.copied()),
            };
            let problem = match queue {
                Ok(Some(Queue::InBlocks)) => continue,
                Ok(_) => DeviceFault::Left,
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => DeviceFault::Gone,
                Err(error) => return Err(error),
            };
            problems.push(DeviceProblem {
                device,
                ifindex,
                problem,
            });
        }
        Ok(problems)
    }
}

/// Filters in the blocks and on devices of their own that are not where ours should be.
pub(super) fn others(tc: &Tc, queues: &BTreeMap<u32, Queue>) -> io::Result<Vec<(At, Filter)>> {
    let mut places = Vec::new();
    if queues.values().any(|queue| *queue == Queue::InBlocks) {
        places.extend(Side::BOTH.map(At::Pods));
    }
    let own = queues.iter().filter(|(_, queue)| **queue == Queue::Own);
    places.extend(own.flat_map(|(index, _)| Side::BOTH.map(|side| At::Device(*index, side))));
    let mut found = Vec::new();
    for at in places {
        let filters = tc.filters(at)?.into_iter();
        let others = filters.filter(|it| !it.is_in_our_place());
        found.extend(others.map(|filter| (at, filter)));
    }
    Ok(found)
}

/// What an agent must never do: between this and the next attachment nothing is balanced or judged.
#[cfg(feature = "broken-detach-first")]
pub(super) fn detach_all(tc: &Tc, bpffs: &std::path::Path) -> Result<()> {
    tracing::warn!("built with broken-detach-first: detaching every program");
    for side in Side::BOTH {
        if let Some(filter) = tc.get(At::Pods(side))? {
            tc.remove(At::Pods(side), &filter)?;
        }
    }
    for index in super::uplinks::with_our_filters(tc)? {
        super::uplinks::leave(tc, bpffs, index)?;
    }
    match std::fs::read_dir(bpffs.join("links")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        pins => {
            for pin in pins? {
                std::fs::remove_file(pin?.path())?;
            }
        }
    }
    Ok(())
}
