//! Processes that cannot outlive the test that started them: in a namespace, in a cgroup, with
//! their output in a file. Short commands are `Netns::command`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::Netns;

/// How many lines of a log an error or a panic shows.
const TAIL_LINES: usize = 40;

/// Arguments: the pid of the test, a `cgroup.procs` or nothing, the program. A parent that died
/// before the signal for its death was asked for will send none.
const ENTER: &str = r#"[ "$PPID" = "$1" ] || exit 125
[ -z "$2" ] || echo $$ >"$2" || exit 125
shift 2
exec "$@""#;

/// A process to be.
#[derive(Debug)]
pub struct Launch {
    name: String,
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    dir: Option<PathBuf>,
    netns: Option<PathBuf>,
    cgroup: Option<PathBuf>,
    log: Option<PathBuf>,
}

impl Launch {
    #[must_use]
    pub fn new(name: &str, program: impl AsRef<OsStr>) -> Self {
        Self {
            name: name.to_owned(),
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            dir: None,
            netns: None,
            cgroup: None,
            log: None,
        }
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args
            .extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Started by another program, which gets `before`, then the program's path, then its arguments.
    #[must_use]
    pub fn through(
        mut self,
        launcher: &str,
        before: impl IntoIterator<Item = String>,
        program: &Path,
    ) -> Self {
        let mut args: Vec<OsString> = before.into_iter().map(OsString::from).collect();
        args.push(program.into());
        args.append(&mut self.args);
        Self {
            program: launcher.into(),
            args,
            ..self
        }
    }

    /// With another value of an option that it has.
    ///
    /// # Panics
    /// It has no such option: the test means something else than it says.
    #[must_use]
    pub fn instead(mut self, option: &str, value: impl AsRef<OsStr>) -> Self {
        let at = self.args.iter().position(|a| a == option);
        let at = at.unwrap_or_else(|| panic!("{} has no {option}", self.name));
        self.args[at + 1] = value.as_ref().to_owned();
        self
    }

    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    #[must_use]
    pub fn working_dir(mut self, dir: &Path) -> Self {
        self.dir = Some(dir.to_owned());
        self
    }

    #[must_use]
    pub fn in_netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.path());
        self
    }

    /// The process is in this cgroup before its program starts.
    #[must_use]
    pub fn in_cgroup(mut self, cgroup: &Path) -> Self {
        self.cgroup = Some(cgroup.to_owned());
        self
    }

    /// Where stdout and stderr are appended; discarded if not called.
    #[must_use]
    pub fn log_to(mut self, path: &Path) -> Self {
        self.log = Some(path.to_owned());
        self
    }

    /// # Errors
    /// The launcher (`setpriv`, `sh`, `nsenter`) or the log file cannot be opened. A program that
    /// does not exist shows as a process that ends with 127 and says so in its log.
    pub fn spawn(self) -> Result<Process> {
        let Self { name, log, .. } = &self;
        let output = match log {
            Some(path) => {
                let file = File::options().create(true).append(true).open(path);
                file.with_context(|| format!("open the log {}", path.display()))?
            }
            None => File::options().write(true).open("/dev/null")?,
        };
        let mut command = self.command();
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = spawn_from_the_spawner(command).with_context(|| format!("start {name}"))?;
        Ok(Process {
            name: self.name,
            child,
            log: self.log,
        })
    }

    /// `setpriv`, `sh`, `nsenter` and the program are one process: each replaces the one before.
    fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        // A Ctrl-C is for the one who started it, who then takes it down in order.
        command.process_group(0);
        command.args(["--pdeathsig", "KILL", "--", "sh", "-c", ENTER, "weirt"]);
        command.arg(std::process::id().to_string());
        command.arg(
            self.cgroup
                .as_ref()
                .map(|c| c.join("cgroup.procs"))
                .unwrap_or_default(),
        );
        if let Some(netns) = &self.netns {
            // Not `ip netns exec`: that mounts a new /sys, without the cgroups.
            command
                .arg("nsenter")
                .arg(format!("--net={}", netns.display()))
                .arg("--");
        }
        command.arg(&self.program).args(&self.args);
        command.envs(self.env.iter().map(|(k, v)| (k, v)));
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command
    }
}

/// A running process. Killed on drop; if the test is panicking the tail of its log is shown.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: Option<PathBuf>,
}

impl Process {
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The pids of the processes that it started and that have not been waited for.
    ///
    /// # Errors
    /// It has ended.
    pub fn children(&self) -> Result<Vec<i32>> {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.pid()));
        let mut found = Vec::new();
        for task in fs::read_dir(&tasks).with_context(|| format!("list {}", tasks.display()))? {
            let children = fs::read_to_string(task?.path().join("children"))?;
            let pids = children.split_whitespace().map(str::parse);
            found.extend(pids.collect::<Result<Vec<i32>, _>>()?);
        }
        Ok(found)
    }

    #[must_use]
    pub fn log_path(&self) -> Option<&Path> {
        self.log.as_deref()
    }

    /// All that it has written so far; empty without a log.
    #[must_use]
    pub fn log(&self) -> String {
        let read = self.log.as_ref().and_then(|path| fs::read(path).ok());
        read.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// The kernel does not know it as our child.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("ask after {}", self.name))
    }

    /// Waits until `is_ready` holds, asking every 10 ms.
    ///
    /// # Errors
    /// The process ended first, or the deadline passed; the error shows the end of its log.
    pub fn wait_until(
        &mut self,
        what: &str,
        within: Duration,
        mut is_ready: impl FnMut() -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + within;
        while !is_ready() {
            if let Some(status) = self.ended()? {
                bail!(
                    "{} ended ({status}) before {what}\n{}",
                    self.name,
                    self.tail()
                );
            }
            if Instant::now() >= deadline {
                bail!(
                    "{}: not {what} within {within:?}\n{}",
                    self.name,
                    self.tail()
                );
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Waits until its log contains `text`.
    ///
    /// # Errors
    /// As [`Process::wait_until`].
    pub fn wait_for_log(&mut self, text: &str, within: Duration) -> Result<()> {
        let log = self
            .log
            .clone()
            .context("a process without a log says nothing")?;
        self.wait_until(&format!("logging {text:?}"), within, || {
            fs::read(&log).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text))
        })
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// It did not within that time.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} still runs after {within:?}\n{}", self.name, self.tail());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        // A pid that has not been waited for cannot be another process's.
        if let Some(status) = self.ended()? {
            bail!("{} has ended ({status})", self.name);
        }
        let pid = i32::try_from(self.pid()).context("a pid is positive")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// SIGKILL, and waits until it is gone. Does nothing to a process that has ended.
    ///
    /// # Errors
    /// No permission.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child
            .kill()
            .with_context(|| format!("kill {}", self.name))?;
        self.child
            .wait()
            .with_context(|| format!("wait for {}", self.name))
    }

    /// SIGTERM, and SIGKILL if it has not ended by then.
    ///
    /// # Errors
    /// No permission.
    pub fn stop(&mut self, within: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        self.wait(within).or_else(|_| self.kill())
    }

    fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
        format!(
            "--- end of the log of {}\n{}\n---",
            self.name,
            tail.join("\n")
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.tail());
        }
        if let Err(e) = self.kill() {
            eprintln!("{e:#}");
        }
    }
}

type Order = (Command, mpsc::SyncSender<io::Result<Child>>);

/// The parent-death signal comes when the *thread* that spawned ends. This one lasts as long as the
/// process; a test's own thread does not.
static SPAWNER: LazyLock<mpsc::SyncSender<Order>> = LazyLock::new(|| {
    let (orders, inbox) = mpsc::sync_channel::<Order>(16);
    thread::spawn(move || {
        for (mut command, reply) in inbox {
            if let Err(mpsc::SendError(Ok(mut orphan))) = reply.send(command.spawn())
                && let Err(e) = orphan.kill()
            {
                eprintln!("kill a process nobody waits for: {e}");
            }
        }
    });
    orders
});

fn spawn_from_the_spawner(command: Command) -> Result<Child> {
    let (reply, child) = mpsc::sync_channel(1);
    SPAWNER
        .send((command, reply))
        .map_err(|_| anyhow!("the spawner thread is gone"))?;
    Ok(child.recv().context("the spawner thread is gone")??)
}
