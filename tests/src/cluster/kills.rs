//! Killing what serves the nodes while specs run: agents and DNS servers, at a steady pace, by SIGKILL and
//! without a word to anybody. Only processes in the cgroups of this cluster's nodes.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Cluster;
use super::place::Node;
use super::record::Started;
use crate::cgroup;

/// How often somebody looks whether it is time, or whether the next process is there.
const LOOK: Duration = Duration::from_millis(20);

/// Who is killed, and how often.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Unrest {
    /// Kill the agent of every node with SIGKILL, every so many seconds, while specs run.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub kill_agents: Option<u64>,
    /// Likewise weir-dns.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub kill_dns: Option<u64>,
}

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Agent,
    Dns,
}

/// How one of them fared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toll {
    /// In words.
    who: String,
    every: Duration,
    /// How often it was time.
    due: u32,
    /// How often one was found and killed.
    killed: u32,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tolls(Vec<Toll>);

impl Tolls {
    /// Were all killed as often as there was time for? The last one may have been cut short.
    #[must_use]
    pub fn are_enough(&self) -> bool {
        let is_enough = |toll: &Toll| toll.killed > 0 && toll.killed + 1 >= toll.due;
        self.0.iter().all(is_enough)
    }
}

impl fmt::Display for Tolls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for toll in &self.0 {
            let Toll {
                who,
                every,
                due,
                killed,
            } = toll;
            let every = every.as_secs();
            writeln!(f, "{who}: killed {killed} times of {due}, every {every} s")?;
        }
        match self.are_enough() {
            true => Ok(()),
            false => writeln!(f, "that is too few: it was not there to be killed"),
        }
    }
}

/// Runs something while processes die, and says how many did.
///
/// # Errors
/// Processes cannot be looked for or killed.
pub fn during<T>(cluster: &Cluster, unrest: Unrest, run: impl FnOnce() -> T) -> Result<(T, Tolls)> {
    let paces = [
        (Victim::Agent, unrest.kill_agents),
        (Victim::Dns, unrest.kill_dns),
    ];
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (victim, seconds) in paces {
            let Some(seconds) = seconds else { continue };
            for node in Node::all(cluster.options.nodes) {
                let every = Duration::from_secs(seconds);
                let is_over = &is_over;
                threads.push(scope.spawn(move || kill(cluster, node, victim, every, is_over)));
            }
        }
        let done = run();
        is_over.store(true, Ordering::Relaxed);
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(toll) => toll,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        Ok((done, Tolls(joined.collect::<Result<_>>()?)))
    })
}

fn kill(
    cluster: &Cluster,
    node: Node,
    victim: Victim,
    every: Duration,
    is_over: &AtomicBool,
) -> Result<Toll> {
    let begin = Instant::now();
    let mut toll = Toll {
        who: format!("{} of {}", victim.noun(), node.name()),
        every,
        due: 0,
        killed: 0,
    };
    let mut is_due = false;
    while !is_over.load(Ordering::Relaxed) {
        thread::sleep(LOOK);
        if begin.elapsed() >= every * (toll.due + 1) {
            toll.due += 1;
            is_due = true;
        }
        // One that is not there yet is waited for until the next is due, and then counts as missed.
        if is_due && let Some(process) = find(cluster, node, victim)? {
            process.kill()?;
            toll.killed += 1;
            is_due = false;
        }
    }
    Ok(toll)
}

impl Victim {
    fn noun(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Dns => "weir-dns",
        }
    }

    /// Is this the command line of one? Their parents, which run `weir-agent keep`, are none.
    fn is(self, words: &[&str]) -> bool {
        let program = words.first().and_then(|it| Path::new(it).file_name());
        let program = program.and_then(|it| it.to_str()).unwrap_or_default();
        match self {
            Self::Agent => program == "weir-agent" && words.get(1) == Some(&"run"),
            Self::Dns => program == "weir-dns",
        }
    }
}

/// The process of a node that is one.
fn find(cluster: &Cluster, node: Node, victim: Victim) -> Result<Option<Started>> {
    let top = cgroup::mount_point()?.join(cluster.place.cgroup_of(&node.name()));
    let mut pids = Vec::new();
    collect(&top, &mut pids).with_context(|| format!("list the processes of {}", node.name()))?;
    for pid in pids {
        // What ends meanwhile is none.
        let Ok(process) = Started::now(victim.noun(), pid) else {
            continue;
        };
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&str> = line.split('\0').collect();
        if victim.is(&words) {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

/// The processes of a cgroup and of those below it. Cgroups come and go with their containers.
fn collect(cgroup: &Path, pids: &mut Vec<u32>) -> Result<()> {
    let listed = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    pids.extend(listed.lines().filter_map(|pid| pid.parse::<u32>().ok()));
    let Ok(below) = fs::read_dir(cgroup) else {
        return Ok(());
    };
    for entry in below.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), pids)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_and_others_are_not_killed() {
        for (line, victim) in [
            (
                "/usr/bin/weir-agent run --node-name=n1",
                Some(Victim::Agent),
            ),
            ("/usr/bin/weir-dns --listen=1.2.3.4:53", Some(Victim::Dns)),
            ("/usr/bin/weir-agent keep -- /usr/bin/weir-agent run", None),
            ("/usr/bin/weir-agent keep -- /usr/bin/weir-dns", None),
            ("/usr/bin/weir-agent install", None),
            ("/usr/bin/weir status", None),
            ("", None),
        ] {
            let words: Vec<&str> = line.split(' ').collect();
            for it in [Victim::Agent, Victim::Dns] {
                assert_eq!(it.is(&words), victim == Some(it), "{line}: {it:?}");
            }
        }
    }

    #[test]
    fn too_few_kills_are_no_success() {
        for (due, killed, enough) in [(0, 0, false), (1, 1, true), (9, 9, true), (9, 8, true)]
            .into_iter()
            .chain([(9, 7, false), (1, 0, false)])
        {
            let toll = Toll {
                who: "agent of n1".to_owned(),
                every: Duration::from_secs(10),
                due,
                killed,
            };
            assert_eq!(Tolls(vec![toll]).are_enough(), enough, "{killed} of {due}");
        }
        assert!(Tolls::default().are_enough(), "nobody asked for any");
    }
}
