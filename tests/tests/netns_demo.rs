//! Ring 4: the demo that the README tells a person to run, whole, and that nothing of it stays.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use weir_tests::cgroup;
use weir_tests::node::binary;

/// Everything of a run with this pid that others could see.
fn left_by(pid: u32) -> BTreeSet<String> {
    let of_it = format!("weirt-{pid}-");
    let mut left = BTreeSet::new();
    for folder in [
        Path::new("/run/netns"),
        Path::new("/tmp"),
        &cgroup::mount_point().unwrap(),
    ] {
        let Ok(entries) = fs::read_dir(folder) else {
            continue;
        };
        let names = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
        left.extend(
            names
                .filter(|n| n.starts_with(&of_it))
                .map(|n| format!("{}/{n}", folder.display())),
        );
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    left.extend(
        mounts
            .lines()
            .filter(|l| l.contains(&of_it))
            .map(ToOwned::to_owned),
    );
    left
}

#[test]
fn the_demo_ends_well_and_leaves_nothing() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let start = Instant::now();
    let child = Command::new(binary("demo"))
        .current_dir(root)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    let took = start.elapsed();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let noise = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}\n{noise}");
    assert!(said.contains(" 0 wrong"), "{said}");
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_eq!(left_by(pid), BTreeSet::new());
}
