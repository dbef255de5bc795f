//! What of ours is in this node's kernel: pinned links, tables, programs at our hooks. Taking a census
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
use super::{POD_HOOKS, SOCKET_HOOKS, pin_path, uplinks};

/// How the names of our programs begin.
const PROGRAM_PREFIX: &str = "weir_";

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
    /// A pinned link whose device or cgroup is gone.
    Stale,
    /// A program of ours at one of our hooks, beside the pinned link: what it decides counts too.
    Stray,
    /// A table of another version that no program uses, as far as we may know.
    Unused,
    /// A table of another version that some program still uses.
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
    pub fn remove(&self) -> io::Result<()> {
        let removed = match &self.place {
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
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
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
pub fn take(bpffs: &Path, cgroup: &Path, devices: &[(String, u32)]) -> Result<Vec<Found>> {
    let folder = File::open(cgroup).with_context(|| format!("open {}", cgroup.display()))?;
    let id = folder.metadata()?.ino();
    let programs = programs();
    // Uplinks are named after their index, and judged like a pod's device of that name.
    let uplinks = uplinks::pinned(bpffs)?;
    let devices: Vec<_> = devices.iter().cloned().chain(uplinks).collect();
    let devices = &devices;
    let mut found = Vec::new();
    let mut pinned = BTreeSet::new();
    for path in files(&Links::folder_in(bpffs))? {
        let expected = expected_seat(&path, id, devices);
        let (what, state) = match pinned_link(&path) {
            Ok(info) => {
                pinned.insert(info.id);
                let is_current = expected == Some(info.seat());
                let state = if is_current {
                    State::Current
                } else {
                    State::Stale
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
    for (device, index) in devices {
        for (_, side) in POD_HOOKS {
            let attached = match sys::attached(Carrier::Device(*index), side) {
                // It went meanwhile, and what was on it.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => continue,
                attached => attached.with_context(|| format!("ask for programs of {device}"))?,
            };
            for it in attached {
                let target = Target::Device(*index);
                let at = format!("{side:?} of {device}");
                let it = (it.program, it.link);
                found.extend(stray(&programs, &pinned, it, target, side, &at));
            }
        }
    }
    for path in files(bpffs)? {
        found.push(table(bpffs, path, &programs));
    }
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

fn table(bpffs: &Path, path: PathBuf, programs: &Programs) -> Found {
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
fn expected_seat(pin: &Path, cgroup: u64, devices: &[(String, u32)]) -> Option<Seat> {
    let name = pin.file_name()?.to_str()?;
    if let Some((_, hook)) = SOCKET_HOOKS.iter().find(|(program, _)| *program == name) {
        return Some(Seat::Cgroup(cgroup, *hook));
    }
    POD_HOOKS.iter().find_map(|(_, side)| {
        let device = name.strip_suffix(Links::suffix(*side))?;
        let (_, index) = devices.iter().find(|(known, _)| known == device)?;
        Some(Seat::Device(*index, *side))
    })
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
