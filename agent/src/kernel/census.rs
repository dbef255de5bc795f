//! What of ours is in this node's kernel: pinned links, filters, tables, programs at our hooks. Taking a census
//! changes nothing; each thing found can be removed by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::programs::loaded_programs;
use tracing::debug;
use weir_common::table::TABLES;

use super::links::{Links, pinned_link};
use super::sys::{self, AttachType, Carrier, Kind, Seat};
use super::tc::{At, Filter, Queue, Side, Tc};
use super::{PROGRAM_PREFIX, SOCKET_HOOKS, adopt, block, former, pin_path, uplinks};

/// Something of ours, or something among it.
#[derive(Debug)]
pub struct Found {
    /// In words.
    pub what: String,
    pub state: State,
    place: Place,
}

/// What to think of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum State {
    /// As this version would have made it.
    Current,
    /// A pinned link whose device or cgroup is gone, or whose device is judged in another way by now.
    Stale,
    /// A program of ours at one of our hooks, beside the pinned link: what it decides counts too.
    Stray,
    /// A table of another version that no program uses, as far as we may know.
    Unused,
    /// A table of another version that some program still uses, or the link of an earlier agent by which a device
    /// is judged.
    InUse,
    /// Not of ours, but where only ours should be.
    Unknown,
}

#[derive(Debug)]
enum Place {
    Pin(PathBuf),
    Link(u32),
    /// Attached without a link, to a cgroup or a device.
    Program(u32, Target, AttachType),
    Filter(At, Filter),
    /// Our filters on a device of its own, and its queue if we have made it.
    Uplink(u32, PathBuf),
}

/// What to think of the links by which earlier agents held their programs on devices.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum FormerLinks {
    /// Until our programs are in their place.
    InUse,
    /// They are of no use where a device is under the filters of all pods, or gone.
    Left,
}

#[derive(Clone, Debug)]
enum Target {
    Device(u32),
    Cgroup(PathBuf),
}

/// Programs that the kernel runs: name and maps by number.
type Programs = BTreeMap<u32, (String, Vec<u32>)>;

impl Found {
    /// Takes it out of the kernel. What is gone already is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(&self) -> Result<()> {
        let removed = match &self.place {
            Place::Uplink(index, bpffs) => return uplinks::leave(&Tc::open()?, bpffs, *index),
            Place::Filter(at, filter) => Tc::open().and_then(|tc| tc.remove(*at, filter)),
            Place::Pin(path) => unpin(path),
            Place::Link(id) => sys::link_by_id(*id).and_then(|it| sys::detach_link(it.as_fd())),
            Place::Program(id, Target::Device(index), side) => sys::program_by_id(*id)
                .and_then(|it| sys::detach_program(it.as_fd(), Carrier::Device(*index), *side)),
            Place::Program(id, Target::Cgroup(path), hook) => {
                let cgroup = File::open(path)?;
                sys::program_by_id(*id).and_then(|it| {
                    sys::detach_program(it.as_fd(), Carrier::Cgroup(cgroup.as_fd()), *hook)
                })
            }
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// The kernel takes a link that nobody holds off its hook in its own time; a detached one is off at once.
fn unpin(path: &Path) -> io::Result<()> {
    if let Ok(object) = sys::open_pinned(path)
        && sys::kind(object.as_fd())? == Kind::Link
        && let Err(error) = sys::detach_link(object.as_fd())
    {
        debug!(path = %path.display(), %error, "is off already");
    }
    fs::remove_file(path)
}

/// Looks at the pin folder, at the hooks of the cgroup and at those of these devices, given by name and
/// interface index. Links come first, tables last: the order in which they can be removed.
///
/// # Errors
/// The kernel or the pin folder cannot be read.
pub(super) fn take(
    tc: &Tc,
    bpffs: &Path,
    cgroup: &Path,
    devices: &[(String, u32)],
    former_links: FormerLinks,
) -> Result<Vec<Found>> {
    let folder = File::open(cgroup).with_context(|| format!("open {}", cgroup.display()))?;
    let id = folder.metadata()?.ino();
    let programs = programs();
    let queues = tc.queues().context("list the queues of devices")?;
    let own_filters = uplinks::with_our_filters(tc).context("list the filters of devices")?;
    let mut found = Vec::new();
    let mut pinned = BTreeSet::new();
    for path in files(&Links::folder_in(bpffs))? {
        let (what, state) = match pinned_link(&path) {
            Ok(info) => {
                pinned.insert(info.id);
                let state = match info.seat() {
                    seat if expected_seat(&path, id) == Some(seat) => State::Current,
                    Seat::Device(index, hook) if former::side_of(hook).is_some() => {
                        let is_judged = queues.get(&index) == Some(&Queue::InBlocks)
                            || own_filters.contains(&index);
                        match former_links {
                            FormerLinks::Left if is_judged => State::Stale,
                            _ => State::InUse,
                        }
                    }
                    _ => State::Stale,
                };
                (format!("link {}", path.display()), state)
            }
            Err(_) => (path.display().to_string(), State::Unknown),
        };
        found.push(Found {
            what,
            state,
            place: Place::Pin(path),
        });
    }
    let links = match sys::links() {
        // Numbering all of the kernel's links takes CAP_SYS_ADMIN. Without it strays are not found; what
        // is pinned is, and that is what agents leave.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            debug!("links and programs that nothing pins cannot be looked for");
            Vec::new()
        }
        links => links.context("list the links")?,
    };
    for (_, hook) in SOCKET_HOOKS {
        let attached = sys::attached(Carrier::Cgroup(folder.as_fd()), hook)
            .with_context(|| format!("ask for the programs of {}", cgroup.display()))?;
        let here: Vec<_> = links
            .iter()
            .filter(|link| link.seat() == Seat::Cgroup(id, hook))
            .collect();
        let bare = attached
            .iter()
            .map(|it| it.program)
            .filter(|program| !here.iter().any(|link| link.program == *program))
            .map(|program| (program, 0));
        let linked = here.iter().map(|link| (link.program, link.id));
        for (program, link) in linked.chain(bare) {
            let target = Target::Cgroup(cgroup.to_owned());
            let at = format!("{hook:?} of {}", cgroup.display());
            found.extend(stray(
                &programs,
                &pinned,
                (program, link),
                target,
                hook,
                &at,
            ));
        }
    }
    let named = devices
        .iter()
        .map(|(device, index)| (*index, device.clone()));
    let named = named.chain(former::Former::new(bpffs).uplinks()?);
    for (index, device) in named {
        for side in Side::BOTH.map(former::hook_at) {
            let attached = match sys::attached(Carrier::Device(index), side) {
                // It went meanwhile, and what was on it; or this kernel has no such hooks.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EINVAL)) => {
                    continue;
                }
                attached => attached.with_context(|| format!("ask for programs of {device}"))?,
            };
            for it in attached {
                let target = Target::Device(index);
                let at = format!("{side:?} of {device}");
                let it = (it.program, it.link);
                found.extend(stray(&programs, &pinned, it, target, side, &at));
            }
        }
    }
    found.extend(filters(tc, bpffs, &programs, &queues, own_filters)?);
    for path in files(bpffs)? {
        found.push(table(bpffs, path, &programs, former_links));
    }
    Ok(found)
}

/// Filters of ours, in the blocks of all pods and on devices of their own.
fn filters(
    tc: &Tc,
    bpffs: &Path,
    programs: &Programs,
    queues: &BTreeMap<u32, Queue>,
    own_filters: BTreeSet<u32>,
) -> Result<Vec<Found>> {
    let is_ours = |filter: &Filter| {
        let program = programs.get(&filter.program);
        let name = program.map_or(&filter.name, |(name, _)| name);
        name.starts_with(PROGRAM_PREFIX)
    };
    let others = block::others(tc, queues).context("list the filters")?;
    let strays = others.into_iter().filter(|(_, filter)| is_ours(filter));
    let strays = strays.map(|(at, filter)| Found {
        what: format!(
            "program {} ({}) in a filter: {at:?}",
            filter.name, filter.program
        ),
        state: State::Stray,
        place: Place::Filter(at, filter),
    });
    let mut found: Vec<_> = strays.collect();
    for side in Side::BOTH {
        let at = At::Pods(side);
        if let Some(filter) = tc.get(at)? {
            found.push(Found {
                what: format!("filter {} of all pods", filter.name),
                state: State::Current,
                place: Place::Filter(at, filter),
            });
        }
    }
    found.extend(own_filters.into_iter().map(|index| Found {
        what: format!("filters of the uplink with number {index}"),
        state: State::Current,
        place: Place::Uplink(index, bpffs.to_owned()),
    }));
    Ok(found)
}

fn stray(
    programs: &Programs,
    pinned: &BTreeSet<u32>,
    (program, link): (u32, u32),
    target: Target,
    hook: AttachType,
    at: &str,
) -> Option<Found> {
    let (name, _) = programs.get(&program)?;
    if !name.starts_with(PROGRAM_PREFIX) || pinned.contains(&link) {
        return None;
    }
    Some(Found {
        what: format!("program {name} ({program}) at {at}"),
        state: State::Stray,
        place: match link {
            0 => Place::Program(program, target, hook),
            link => Place::Link(link),
        },
    })
}

fn table(bpffs: &Path, path: PathBuf, programs: &Programs, former_links: FormerLinks) -> Found {
    let is_of_ours = || {
        let name = path.file_name()?.to_str()?;
        let (_, version) = name.rsplit_once("_v")?;
        version.parse::<u32>().ok()
    };
    let map = || {
        let object = sys::open_pinned(&path)?;
        match sys::kind(object.as_fd())? {
            Kind::Map => sys::map_layout(object.as_fd()).map(|layout| layout.id),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    };
    let state = match map() {
        Ok(_) if TABLES.iter().any(|t| pin_path(bpffs, t) == path) => State::Current,
        // What they say is not ours before we have taken over, also if the programs are.
        Ok(_) if former_links == FormerLinks::InUse && adopt::is_of(&path) => State::InUse,
        Ok(id) if is_of_ours().is_some() => {
            let is_used = programs.values().any(|(_, maps)| maps.contains(&id));
            if is_used { State::InUse } else { State::Unused }
        }
        _ => State::Unknown,
    };
    Found {
        what: format!("table {}", path.display()),
        state,
        place: Place::Pin(path),
    }
}

/// Where a link of this name sits if it is current.
fn expected_seat(pin: &Path, cgroup: u64) -> Option<Seat> {
    let name = pin.file_name()?.to_str()?;
    let (_, hook) = SOCKET_HOOKS.iter().find(|(program, _)| *program == name)?;
    Some(Seat::Cgroup(cgroup, *hook))
}

fn programs() -> Programs {
    loaded_programs()
        .filter_map(|program| {
            // One that goes meanwhile uses nothing any more.
            let program = program.ok()?;
            let maps = program.map_ids().ok().flatten().unwrap_or_default();
            Some((
                program.id(),
                (program.name_as_str().unwrap_or_default().to_owned(), maps),
            ))
        })
        .collect()
}

/// The files of a folder, in the order of their names; none when there is no folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("read {}", folder.display()))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}
