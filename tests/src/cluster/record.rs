//! What was started, on disk: so that another command finds it, also after the one that started it
//! crashed. A process is its pid and its start time; a pid alone may be another's by now.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::options::Options;
use super::place::Place;

const FILE: &str = "cluster.json";

/// One cluster.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) options: Options,
    pub(super) processes: Vec<Started>,
}

/// A process that we started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Started {
    pub(super) name: String,
    pub(super) pid: i32,
    /// Clock ticks since boot: the 22nd field of `/proc/PID/stat`.
    pub(super) since: u64,
}

impl Record {
    /// The record of the cluster at `place`, if there is one.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn load(place: &Place) -> Result<Option<Self>> {
        let path = place.dir().join(FILE);
        match fs::read(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            read => {
                let bytes = read.with_context(|| format!("read {}", path.display()))?;
                let record = serde_json::from_slice(&bytes);
                record.with_context(|| format!("parse {}", path.display()))
            }
        }
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// The folder is not there or cannot be written.
    pub(super) fn save(&self, place: &Place) -> Result<()> {
        let path = place.dir().join(FILE);
        let part = path.with_added_extension("part");
        fs::write(&part, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("write {}", part.display()))?;
        fs::rename(&part, &path).with_context(|| format!("create {}", path.display()))
    }

    /// The process of that name, if it still runs.
    #[must_use]
    pub(super) fn running(&self, name: &str) -> Option<&Started> {
        let mut named = self.processes.iter().filter(|p| p.name == name);
        named.rfind(|p| p.is_running())
    }
}

impl Started {
    /// The process that has this pid now.
    ///
    /// # Errors
    /// It has ended.
    pub(super) fn now(name: &str, pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid).context("a pid is positive")?;
        let since = start_of(pid).with_context(|| format!("{name} has ended at once"))?;
        Ok(Self {
            name: name.to_owned(),
            pid,
            since,
        })
    }

    #[must_use]
    pub(super) fn is_running(&self) -> bool {
        start_of(self.pid) == Some(self.since)
    }

    /// SIGKILL, to this process and no later one of its pid.
    ///
    /// # Errors
    /// No permission.
    pub(super) fn kill(&self) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), Signal::SIGKILL) {
            Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
            Err(e) => Err(e).with_context(|| format!("kill {}", self.name)),
        }
    }
}

/// When a process started; `None` if there is none or it is a zombie.
fn start_of(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    start_in(&stat)
}

/// A name may hold blanks and parentheses: what follows the last one counts.
fn start_in(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_time_is_read_past_any_name() {
        let rest = "1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        for (stat, since) in [
            (format!("7 (sh) S {rest}"), Some(4711)),
            (format!("7 (a) S 1 (b) R {rest}"), Some(4711)),
            (format!("7 (sh) Z {rest}"), None),
            ("7".to_owned(), None),
        ] {
            assert_eq!(start_in(&stat), since, "{stat}");
        }
    }

    #[test]
    fn a_process_that_started_at_another_time_is_another() {
        let own = Started::now("test", std::process::id()).unwrap();
        assert!(own.is_running());
        let other = Started {
            since: own.since - 1,
            ..own
        };
        assert!(!other.is_running());
    }
}
