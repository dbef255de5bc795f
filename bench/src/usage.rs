//! What a process takes: time on a CPU, memory, and the kernel's memory of the tables that it holds.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// A process that is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    pid: Pid,
}

/// Bytes of a process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// What is in memory of it.
    pub(crate) resident: u64,
    /// The most that ever was.
    pub(crate) peak: u64,
}

impl Usage {
    /// # Errors
    /// No pid is that large.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        Ok(Self {
            pid: Pid::from_raw(i32::try_from(pid)?),
        })
    }

    /// The time on a CPU since it started, of all its threads, ended ones too, to the nanosecond.
    ///
    /// # Errors
    /// It has ended.
    pub(crate) fn cpu(self) -> Result<Duration> {
        let clock = clock_getcpuclockid(self.pid).context("the CPU clock of a process")?;
        Ok(clock_gettime(clock)?.into())
    }

    /// Keeps all its threads, and those that they start, on one CPU.
    ///
    /// # Errors
    /// It has ended, or there is no such CPU.
    pub(crate) fn pin(self, cpu: usize) -> Result<()> {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        for entry in fs::read_dir(self.proc("task"))? {
            let name = entry?.file_name();
            let tid: i32 = name.to_str().context("a number")?.parse()?;
            match sched_setaffinity(Pid::from_raw(tid), &set) {
                // A thread that has ended since.
                Ok(()) | Err(nix::Error::ESRCH) => {}
                Err(e) => return Err(e).context(format!("pin to CPU {cpu}")),
            }
        }
        Ok(())
    }

    /// # Errors
    /// It has ended.
    pub(crate) fn memory(self) -> Result<Memory> {
        Ok(Memory {
            resident: self.status("VmRSS:")? * 1024,
            peak: self.status("VmHWM:")? * 1024,
        })
    }

    /// Bytes of the kernel for the BPF maps that it has open, each once.
    ///
    /// # Errors
    /// It has ended.
    pub(crate) fn maps(self) -> Result<u64> {
        let mut maps: BTreeMap<u64, u64> = BTreeMap::new();
        for entry in fs::read_dir(self.proc("fdinfo"))? {
            // Files come and go meanwhile.
            let Ok(text) = fs::read_to_string(entry?.path()) else {
                continue;
            };
            if let (Some(id), Some(bytes)) = (field(&text, "map_id:"), field(&text, "memlock:")) {
                maps.insert(id, bytes);
            }
        }
        Ok(maps.values().sum())
    }

    fn status(self, name: &str) -> Result<u64> {
        let path = self.proc("status");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        field(&text, name).with_context(|| format!("{name} in {}", path.display()))
    }

    fn proc(self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.pid))
    }
}

/// The number behind a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_takes_something() {
        let usage = Usage::of(std::process::id()).unwrap();
        let before = usage.cpu().unwrap();
        let work: u64 = (0..2_000_000u64).map(std::hint::black_box).sum();
        assert!(usage.cpu().unwrap() > before, "{work}");
        let memory = usage.memory().unwrap();
        assert!(memory.resident > 100_000 && memory.peak >= memory.resident);
        assert_eq!(usage.maps().unwrap(), 0);
    }
}
