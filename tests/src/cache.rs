//! Where what is expensive to make, and not ours, is kept between checkouts.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a program may be silent before a line says that it still runs.
const SILENCE: Duration = Duration::from_secs(15);

/// A directory in `WEIR_CACHE`, else in `~/.cache/weir`, locked against other runs while this
/// lives. Entries must be moved into place: one that is there is complete.
#[derive(Debug)]
pub struct Cache {
    pub dir: PathBuf,
    _lock: File,
}

impl Cache {
    /// Opens the directory `name`, waiting for other runs that have it.
    ///
    /// # Errors
    /// It cannot be created, or neither `WEIR_CACHE` nor `HOME` is set.
    pub fn open(name: &str) -> Result<Self> {
        let root = match (std::env::var_os("WEIR_CACHE"), std::env::var_os("HOME")) {
            (Some(cache), _) => PathBuf::from(cache),
            (None, Some(home)) => PathBuf::from(home).join(".cache/weir"),
            (None, None) => bail!("set WEIR_CACHE to a directory for built programs"),
        };
        let dir = root.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let lock = File::create(dir.join(".lock"))?;
        lock.lock()
            .with_context(|| format!("lock {}", dir.display()))?;
        Ok(Self { dir, _lock: lock })
    }
}

/// A line on stderr that the test harness does not capture.
pub fn progress(line: &str) {
    // Nobody reads stderr then, and there is nobody to tell.
    std::io::stderr()
        .write_all(format!("{line}\n").as_bytes())
        .ok();
}

/// Runs a program that takes long, with a line of progress now and then.
///
/// # Errors
/// It cannot be started or fails; the error holds the end of what it wrote.
pub fn run_slowly(what: &str, command: &mut Command) -> Result<()> {
    let started = Instant::now();
    // One offset for both, so that neither overwrites the other.
    let mut log = tempfile::tempfile()?;
    let (stdout, stderr) = (log.try_clone()?, log.try_clone()?);
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    progress(&format!("{what} …"));
    let mut child = command
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let mut spoken = started;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if spoken.elapsed() >= SILENCE {
            spoken = Instant::now();
            progress(&format!("{what} … {} s", started.elapsed().as_secs()));
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    if !status.success() {
        let mut said = String::new();
        log.rewind()?;
        log.read_to_string(&mut said)?;
        let tail = said.lines().rev().take(20).collect::<Vec<_>>();
        bail!(
            "{command:?}: {status}\n{}",
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
    progress(&format!("{what}: {:.1} s", started.elapsed().as_secs_f64()));
    Ok(())
}
