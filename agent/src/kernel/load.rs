//! Loading: tables opened only when their layout is what the programs expect, then every program
//! through the verifier, before anything that runs is touched.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use thiserror::Error;
use tracing::warn;
use weir_common::node::NodeConfig;
use weir_common::table::{TABLES, Table};
use zerocopy::IntoBytes;

use super::sys::{self, Kind, MapLayout};

/// Why nothing was loaded. Whatever ran before still runs.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error(
        "table {table} is pinned at {path} with another layout: {found}; this version expects {expected}. \
         A newer or older weir-agent made it under the same version number: run `weir-agent cleanup` \
         when no pod needs the node's network, or install the version that made it"
    )]
    Layout {
        table: &'static str,
        path: PathBuf,
        found: String,
        expected: String,
    },
    #[error(
        "what is pinned at {path} is no table {table} ({found:?}): remove it, Weir has not put it there"
    )]
    NoTable {
        table: &'static str,
        path: PathBuf,
        found: Kind,
    },
    #[error("{action} {path}: {source}")]
    Pin {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("the BPF object does not parse: {0}")]
    Object(String),
    #[error("create the tables: {0}")]
    Tables(String),
    #[error("the kernel refuses the program {program}: {reason}")]
    Verifier { program: String, reason: String },
}

/// Loaded programs and their tables.
#[derive(Debug)]
pub struct Loaded {
    ebpf: Ebpf,
    bpffs: PathBuf,
    /// Tables that were not pinned before.
    created: BTreeSet<&'static str>,
    /// Instructions that the verifier visited, by program.
    pub verified: BTreeMap<String, Option<u32>>,
}

/// Capacities that differ from the built-in ones, by table.
pub type Capacities<'a> = &'a [(&'a str, u32)];

/// Loads an object whose tables are pinned in `bpffs`.
///
/// # Errors
/// A pinned table has another layout, or the kernel refuses a table or a program.
pub(super) fn load(
    object: &[u8],
    bpffs: &Path,
    config: NodeConfig,
    capacities: Capacities<'_>,
) -> Result<Loaded, LoadError> {
    fs::create_dir_all(bpffs).map_err(|source| LoadError::Pin {
        action: "create the pin folder",
        path: bpffs.to_owned(),
        source,
    })?;
    let parsed = aya_obj::Object::parse(object).map_err(|e| LoadError::Object(chain(&e)))?;
    verify_layouts(&parsed, bpffs, capacities)?;
    let mut loader = EbpfLoader::new();
    loader.override_global("NODE", config.as_bytes(), true);
    // The log is asked for only after a refusal, so that its price is paid then.
    loader.verifier_log_level(VerifierLogLevel::DEBUG | VerifierLogLevel::STATS);
    for table in TABLES {
        loader.map_pin_path(table.name, pin_path(bpffs, table));
    }
    for (table, entries) in capacities {
        loader.map_max_entries(table, *entries);
    }
    let fresh = NewPins::before(bpffs);
    let loaded = loader
        .load(object)
        .map_err(|error| LoadError::Tables(chain(&error)))
        .and_then(verify);
    match loaded {
        Ok((ebpf, verified)) => Ok(Loaded {
            ebpf,
            bpffs: bpffs.to_owned(),
            created: fresh.names(),
            verified,
        }),
        Err(error) => {
            fresh.remove();
            Err(error)
        }
    }
}

/// What the verifier takes longest for, as it says itself (`weir status` shows the instructions), the first first.
const LONGEST: [&str; 4] = [
    "weir_from_pod",
    "weir_from_net",
    "weir_to_net",
    "weir_to_pod",
];

/// Every program through the verifier, several at a time: the kernel verifies for whoever may load programs without
/// a lock of its own, and a node is without an agent meanwhile. With what it visited of each.
fn verify(mut ebpf: Ebpf) -> Result<(Ebpf, BTreeMap<String, Option<u32>>), LoadError> {
    let mut programs: Vec<(&str, &mut Program)> = ebpf.programs_mut().collect();
    // Taken from the end.
    let turn = |name: &str| LONGEST.iter().position(|longest| *longest == name);
    programs.sort_by_key(|(name, _)| Reverse(turn(name).unwrap_or(LONGEST.len())));
    let threads = thread::available_parallelism().map_or(1, |n| n.get().min(programs.len()));
    let left = Mutex::new(programs);
    let work = || {
        let mut verified = Vec::new();
        loop {
            let next = left.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some((name, program)) = next else {
                return Ok(verified);
            };
            verified.push((name.to_owned(), verify_one(name, program)?));
        }
    };
    let verified = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let results = workers.into_iter().map(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        results.collect::<Result<Vec<Vec<_>>, LoadError>>()
    })?;
    drop(left);
    Ok((ebpf, verified.into_iter().flatten().collect()))
}

fn verify_one(name: &str, program: &mut Program) -> Result<Option<u32>, LoadError> {
    let refused = |reason| LoadError::Verifier {
        program: name.to_owned(),
        reason,
    };
    let loaded = match program {
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        _ => {
            return Err(refused(
                "it is of a type that this agent does not know".into(),
            ));
        }
    };
    loaded.map_err(|error| refused(refusal(&error)))?;
    let info = program.info().ok();
    Ok(info.and_then(|info| info.verified_instruction_count()))
}

/// What the kernel says to a program, with the end of the verifier's log: the instruction that it
/// stumbled over and why.
fn refusal(error: &ProgramError) -> String {
    const LINES: usize = 20;
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return chain(error);
    };
    // aya shows the log as a quoted string.
    let log = verifier_log.to_string();
    let log = log
        .trim_matches('"')
        .replace("\\n", "\n")
        .replace("\\t", "\t");
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let end = &lines[lines.len().saturating_sub(LINES)..];
    format!("{io_error}; the verifier's last words:\n{}", end.join("\n"))
}

/// The pins that are not there before a load and are after it. Those of a load that fails are of no
/// use to anybody, and would be taken for tables of a version that ran.
struct NewPins {
    absent: Vec<(&'static Table, PathBuf)>,
}

impl NewPins {
    fn before(bpffs: &Path) -> Self {
        let pins = TABLES.iter().map(|table| (table, pin_path(bpffs, table)));
        Self {
            absent: pins.filter(|(_, path)| !path.exists()).collect(),
        }
    }

    fn names(&self) -> BTreeSet<&'static str> {
        self.absent.iter().map(|(table, _)| table.name).collect()
    }

    fn remove(self) {
        for (_, path) in self.absent {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    warn!(path = %path.display(), %error, "a table without programs stays pinned");
                }
                _ => {}
            }
        }
    }
}

/// Where a table is pinned: the version of its layout is part of the path.
pub fn pin_path(bpffs: &Path, table: &Table) -> PathBuf {
    bpffs.join(format!("{}_v{}", table.name, table.version))
}

impl Loaded {
    /// Where the tables are pinned.
    pub(super) fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// Was the table made by this load? Then nothing of an earlier agent is in it.
    pub fn is_created(&self, table: &str) -> bool {
        self.created.contains(table)
    }

    /// The descriptor of a program.
    ///
    /// # Errors
    /// The object has no such program.
    pub fn program(&self, name: &str) -> io::Result<BorrowedFd<'_>> {
        let missing = || io::Error::other(format!("the BPF object has no program {name}"));
        let fd = match self.ebpf.program(name).ok_or_else(missing)? {
            Program::SchedClassifier(program) => program.fd(),
            Program::CgroupSockAddr(program) => program.fd(),
            _ => return Err(missing()),
        };
        fd.map(AsFd::as_fd).map_err(io::Error::other)
    }

    /// The kernel's number of a program.
    ///
    /// # Errors
    /// The object has no such program.
    pub fn program_id(&self, name: &str) -> io::Result<u32> {
        let missing = || io::Error::other(format!("the BPF object has no program {name}"));
        let program = self.ebpf.program(name).ok_or_else(missing)?;
        program
            .info()
            .map(|info| info.id())
            .map_err(io::Error::other)
    }

    /// Names of all programs.
    pub fn programs(&self) -> impl Iterator<Item = &str> {
        self.ebpf.programs().map(|(name, _)| name)
    }

    /// The descriptor of a pinned table.
    ///
    /// # Errors
    /// It is not pinned, which somebody else must have done since.
    pub(super) fn table(&self, name: &str) -> io::Result<OwnedFd> {
        let table = TABLES.iter().find(|t| t.name == name);
        let table = table.ok_or_else(|| io::Error::other(format!("there is no table {name}")))?;
        sys::open_pinned(&pin_path(&self.bpffs, table))
    }

    /// The loader's own handle of a map, for those that user space reads through aya.
    pub(super) fn take_map(&mut self, name: &str) -> Option<aya::maps::Map> {
        self.ebpf.take_map(name)
    }
}

/// aya opens a pinned map of any layout and then trusts the object's sizes: what it reads is past the
/// end of something. So the layouts are compared before it opens any.
fn verify_layouts(
    object: &aya_obj::Object,
    bpffs: &Path,
    capacities: Capacities<'_>,
) -> Result<(), LoadError> {
    for table in TABLES {
        let path = pin_path(bpffs, table);
        let Some(map) = object.maps.get(table.name) else {
            return Err(LoadError::Object(format!("it has no table {}", table.name)));
        };
        let pinned = match sys::open_pinned(&path) {
            Ok(pinned) => pinned,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => {
                return Err(LoadError::Pin {
                    action: "open",
                    path,
                    source,
                });
            }
        };
        let unreadable = |source| LoadError::Pin {
            action: "inspect",
            path: path.clone(),
            source,
        };
        let kind = sys::kind(pinned.as_fd()).map_err(unreadable)?;
        if kind != Kind::Map {
            return Err(LoadError::NoTable {
                table: table.name,
                path,
                found: kind,
            });
        }
        let found = sys::map_layout(pinned.as_fd()).map_err(unreadable)?;
        let entries = capacities
            .iter()
            .find(|(name, _)| *name == table.name)
            .map(|(_, n)| *n);
        let expected = MapLayout {
            kind: map.map_type(),
            id: found.id,
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: entries.unwrap_or(map.max_entries()),
            flags: map.map_flags(),
        };
        if found != expected {
            return Err(LoadError::Layout {
                table: table.name,
                path,
                found: describe(&found),
                expected: describe(&expected),
            });
        }
    }
    Ok(())
}

fn describe(layout: &MapLayout) -> String {
    format!(
        "type {}, key {} B, value {} B, {} entries, flags {:#x}",
        layout.kind, layout.key_size, layout.value_size, layout.max_entries, layout.flags
    )
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
