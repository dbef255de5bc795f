//! Agent and DNS as their containers run them, under `weir-agent keep`: killed, they are back at once and
//! say so; told to stop, they go in order; without their parent, they do not stay.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weir_tests::node::{Node, NodeOptions, binary};
use weir_tests::process::Process;

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn an_agent_that_is_killed_is_ready_again_and_counts_it() {
    let mut node = Node::prepare(NodeOptions::named("keep")).unwrap();
    node.options.agent = kept(node.machine().dir());
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    assert!(
        node.metrics()
            .unwrap()
            .contains("weir_agent_restarts_total 0")
    );

    for restart in 1..=2 {
        let child = only_child(node.agent().unwrap());
        let begin = Instant::now();
        kill(Pid::from_raw(child), Signal::SIGKILL).unwrap();
        let is_next = |node: &Node| node.ask("status").is_ok_and(|it| it["restarts"] == restart);
        wait_until("another agent answers", || is_next(&node));
        let answers = begin.elapsed().as_millis();
        node.wait_ready().unwrap();
        let ready = begin.elapsed().as_millis();
        println!(
            "kill -9: the next agent answers after {answers} ms and is ready after {ready} ms"
        );
    }
    assert!(
        node.metrics()
            .unwrap()
            .contains("weir_agent_restarts_total 2")
    );
    let said = node.weir("status").output().unwrap().stdout;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("killed and started again 2 times"), "{said}");

    let child = only_child(node.agent().unwrap());
    let ended = node.agent().unwrap().stop(PATIENCE).unwrap();
    assert_eq!(ended.code(), Some(0));
    assert!(node.agent().unwrap().log().contains("going down"));
    assert!(!runs(child));
}

#[test]
fn a_parent_that_is_killed_leaves_no_agent_behind() {
    let mut node = Node::prepare(NodeOptions::named("orphan")).unwrap();
    node.options.agent = kept(node.machine().dir());
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    let child = only_child(node.agent().unwrap());
    node.kill_agent().unwrap();
    wait_until("the agent is gone too", || !runs(child));
    // Nobody has its lock, its sockets, its port.
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
}

/// A program that runs the agent as its container does.
fn kept(folder: &Path) -> PathBuf {
    let path = folder.join("kept-agent");
    let agent = binary("weir-agent").display().to_string();
    let script = format!("#!/bin/sh\nexec {agent} keep -- {agent} \"$@\"\n");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn only_child(keeper: &Process) -> i32 {
    let children = keeper.children().unwrap();
    assert_eq!(children.len(), 1, "{children:?}");
    children[0]
}

/// A zombie does not.
fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
