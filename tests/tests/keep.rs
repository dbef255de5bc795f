//! `weir-agent keep` with real processes: what becomes of the program when it is killed, when it ends by
//! itself, when the parent is told to stop. With agent and DNS: `netns_keep.rs`.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weir_tests::node::binary;
use weir_tests::process::{Launch, Process};

const PATIENCE: Duration = Duration::from_secs(10);
/// What a start may take on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(500);
/// Says on a line of its own who it is and how often it was started again.
const SAY: &str = r#"echo "$$ $WEIR_RESTARTS" >>starts"#;

fn keep(folder: &Path, program: &[&str]) -> Process {
    Launch::new("keep", binary("weir-agent"))
        .args(["keep", "--"])
        .args(program)
        .working_dir(folder)
        .log_to(&folder.join("log"))
        .spawn()
        .unwrap()
}

/// The pid and the number of restarts of every start so far.
fn starts(folder: &Path) -> Vec<(i32, u64)> {
    let said = fs::read_to_string(folder.join("starts")).unwrap_or_default();
    let whole = said
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    let numbers = whole.map(|line| {
        let (pid, restarts) = line.trim().split_once(' ').unwrap();
        (pid.parse().unwrap(), restarts.parse().unwrap())
    });
    numbers.collect()
}

fn wait_for_starts(keeper: &mut Process, folder: &Path, number: usize) -> Vec<(i32, u64)> {
    let so_many = || starts(folder).len() >= number;
    keeper.wait_until("started", PATIENCE, so_many).unwrap();
    starts(folder)
}

fn is_gone(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None).is_err()
}

#[test]
fn a_program_that_is_killed_is_back_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("{SAY}; exec sleep 600");
    let mut keeper = keep(folder.path(), &["sh", "-c", &script]);
    let (pid, _) = wait_for_starts(&mut keeper, folder.path(), 1)[0];
    let begin = Instant::now();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let starts = wait_for_starts(&mut keeper, folder.path(), 2);
    let took = begin.elapsed();
    println!("back {} ms after kill -9", took.as_millis());
    assert!(took < AT_ONCE, "{took:?}");
    assert_eq!([starts[0].1, starts[1].1], [0, 1]);
    let log = keeper.log();
    assert!(log.contains("sh was ended by SIGKILL"), "{log}");
    assert!(is_gone(pid) && !is_gone(starts[1].0));
    // The parent has nobody else to pass this on to.
    let ended = keeper.stop(PATIENCE).unwrap();
    assert_eq!(ended.code(), Some(128 + 15));
    assert!(is_gone(starts[1].0));
}

#[test]
fn a_program_that_keeps_dying_is_started_less_and_less_often() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("{SAY}; kill -9 $$");
    let begin = Instant::now();
    let mut keeper = keep(folder.path(), &["sh", "-c", &script]);
    let starts = wait_for_starts(&mut keeper, folder.path(), 6);
    let took = begin.elapsed();
    // Pauses of 0, 100, 200, 400 and 800 ms.
    let (least, most) = (Duration::from_millis(1500), Duration::from_secs(6));
    assert!((least..most).contains(&took), "{took:?}");
    // In the next pause of 1.6 s nothing runs that could be told.
    let is_pause = || is_gone(starts[5].0);
    keeper.wait_until("ended", PATIENCE, is_pause).unwrap();
    let ended = keeper.stop(PATIENCE).unwrap();
    assert_eq!(ended.code(), Some(0));
}

#[test]
fn a_program_that_ends_by_itself_ends_its_parent_in_the_same_way() {
    let folder = tempfile::tempdir().unwrap();
    for (script, code) in [("exit 0", 0), ("exit 1", 1), ("echo wrong; exit 7", 7)] {
        let mut keeper = keep(folder.path(), &["sh", "-c", script]);
        assert_eq!(
            keeper.wait(PATIENCE).unwrap().code(),
            Some(code),
            "{script}"
        );
    }
    // As with wrong settings: what kubectl shows is the agent's own complaint.
    let agent = binary("weir-agent").display().to_string();
    let mut keeper = keep(folder.path(), &[&agent, "run", "--node-name=", "--mtu=9"]);
    assert_eq!(keeper.wait(PATIENCE).unwrap().code(), Some(1));
    let log = keeper.log();
    assert!(log.contains("--mtu 9: must be"), "{log}");
    let mut keeper = keep(folder.path(), &["/nowhere/program"]);
    assert_eq!(keeper.wait(PATIENCE).unwrap().code(), Some(1));
    let log = keeper.log();
    assert!(log.contains("start /nowhere/program"), "{log}");
}

#[test]
fn a_parent_that_is_told_to_stop_passes_it_on_and_waits() {
    // The program takes its time, and decides with which status it ends.
    let script = format!("trap 'sleep 0.2; exit 5' TERM INT; {SAY}; while :; do sleep 0.02; done");
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let folder = tempfile::tempdir().unwrap();
        let mut keeper = keep(folder.path(), &["sh", "-c", &script]);
        let (pid, _) = wait_for_starts(&mut keeper, folder.path(), 1)[0];
        keeper.signal(signal).unwrap();
        assert_eq!(keeper.wait(PATIENCE).unwrap().code(), Some(5), "{signal}");
        assert!(is_gone(pid), "{signal}");
        assert_eq!(starts(folder.path()).len(), 1, "{signal}");
    }
}

/// Without a handler the first process of a container would not even hear SIGTERM, and nobody would wait
/// for what others left behind.
#[test]
fn the_first_process_of_a_container_hears_signals_and_waits_for_orphans() {
    let folder = tempfile::tempdir().unwrap();
    // Three whose parents end at once. As long as nobody waits for them, /proc shows them.
    let script = format!(
        "for i in 1 2 3; do (sleep 0.01 &); done
         while grep -qs '(sleep)' /proc/[0-9]*/stat; do :; done
         {SAY}; exec sleep 600"
    );
    let mut unshare = Launch::new("container", "unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child=KILL", "--"])
        .arg(binary("weir-agent"))
        .args(["keep", "--", "sh", "-c", &script])
        .working_dir(folder.path())
        .log_to(&folder.path().join("log"))
        .spawn()
        .unwrap();
    let started = wait_for_starts(&mut unshare, folder.path(), 1);
    assert_eq!(started[0].1, 0);
    let first = unshare.children().unwrap();
    assert_eq!(first.len(), 1, "{first:?}");
    kill(Pid::from_raw(first[0]), Signal::SIGTERM).unwrap();
    assert_eq!(unshare.wait(PATIENCE).unwrap().code(), Some(128 + 15));
}
