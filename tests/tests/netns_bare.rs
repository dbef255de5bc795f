//! An agent on a node that offers a kernel and nothing else: no program that it could call, and folders that others
//! made. Needs root.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use weir_agent::kernel::second_lock::{self, Lock};
use weir_tests::node::{Node, NodeOptions, binary};

const PATIENCE: Duration = Duration::from_secs(20);
/// A folder that no program is in.
const NO_PROGRAMS: &str = "PATH=/proc/self/nowhere";

#[test]
fn an_agent_calls_no_program() {
    let node = Node::prepare(NodeOptions::named("bare")).unwrap();
    let launch = node.agent_launch();
    let launch = launch.through(
        "/usr/bin/env",
        [NO_PROGRAMS.to_owned()],
        &binary("weir-agent"),
    );
    let mut agent = launch.spawn().unwrap();
    agent
        .wait_for_log("our programs are on their hooks", PATIENCE)
        .unwrap();
    let netns = node.machine().netns();
    let state = || netns.run(second_lock::state).unwrap().unwrap();
    assert_eq!(state(), Lock::Closed { drops: 0 });
    // The rule is there as before, and the kernel does not ask it.
    let asleep = netns
        .command("nft")
        .arg("add table inet weir { flags dormant; }")
        .status();
    assert!(asleep.unwrap().success());
    agent.wait_for_log("it is closed again", PATIENCE).unwrap();
    assert_eq!(state(), Lock::Closed { drops: 0 });
    let metrics = node.metrics().unwrap();
    assert!(
        metrics.contains("weir_second_lock_drops_total 0"),
        "{metrics}"
    );

    let doctor = netns
        .command("/usr/bin/env")
        .arg(NO_PROGRAMS)
        .arg(binary("weir-agent"))
        .arg("doctor")
        .output()
        .unwrap();
    let said = String::from_utf8(doctor.stdout).unwrap();
    let line = said.lines().find(|line| line.contains("nftables"));
    assert!(line.unwrap().starts_with("ok "), "{said}");
    agent.stop(PATIENCE).unwrap();
}

#[test]
fn what_an_agent_keeps_is_roots_alone() {
    let mut node = Node::prepare(NodeOptions::named("modes")).unwrap();
    let (state, run) = (
        node.machine().dir().join("state"),
        node.machine().dir().join("run"),
    );
    // As kubelet makes the folders of a volume.
    for folder in [&state, &run] {
        fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    }
    node.start_agent().unwrap();
    let agent = node.agent().unwrap();
    agent
        .wait_for_log("our programs are on their hooks", PATIENCE)
        .unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&state), mode(&run)), (0o700, 0o700));
    assert_eq!(mode(&state.join("leases.redb")), 0o600);
    for entry in fs::read_dir(&state).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path) & 0o077, 0, "{}", path.display());
    }
}
