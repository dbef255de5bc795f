//! A kernel with our programs on a machine of the tests, and what the usual tools say is attached there. Stops at the
//! first surprise.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use weir_agent::kernel::object::OBJECT;
use weir_agent::kernel::{Capacities, Hooks, Kernel};
use weir_common::node::NodeConfig;

use crate::machine::Machine;
use crate::netns::Netns;

/// The node's end of a pair, by a name that is ours.
pub const DEVICE: &str = "weir0000000001";

pub fn pins(machine: &Machine) -> PathBuf {
    machine.bpffs().path().join("weir")
}

pub fn load(machine: &Machine, pins: &Path) -> Kernel {
    try_load(machine, pins, OBJECT, &[]).unwrap()
}

pub fn try_load(
    machine: &Machine,
    pins: &Path,
    object: &[u8],
    capacities: Capacities<'_>,
) -> anyhow::Result<Kernel> {
    let (cgroup, config) = (machine.cgroup().path(), NodeConfig::default());
    Kernel::load(object, pins, cgroup, config, capacities)
}

/// Adds the pair; its interface index.
pub fn add_device(netns: &Netns) -> u32 {
    netns
        .ip(&format!("link add {DEVICE} type veth peer name far"))
        .unwrap();
    let index = || nix::net::if_::if_nametoindex(DEVICE);
    netns.run(index).unwrap().unwrap()
}

/// Every file below a folder, and the folder.
pub fn listing(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    if let Ok(entries) = std::fs::read_dir(folder) {
        found.push(folder.display().to_string());
        for entry in entries.map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                found.extend(listing(&entry.path()));
            } else {
                found.push(entry.path().display().to_string());
            }
        }
    }
    found.sort();
    found
}

/// Pinned links: name, number of the link, number of its program.
pub fn links(pins: &Path) -> BTreeMap<String, (u64, u64)> {
    let folder = listing(&pins.join("links"));
    folder
        .iter()
        .skip(1)
        .map(|pin| {
            let said = output(Command::new("bpftool").args(["-j", "link", "show", "pinned", pin]));
            let link: Value = serde_json::from_str(&said).unwrap();
            let name = Path::new(pin).file_name().unwrap().to_str().unwrap();
            let number = |what: &str| link[what].as_u64().unwrap();
            (name.to_owned(), (number("id"), number("prog_id")))
        })
        .collect()
}

pub fn output(command: &mut Command) -> String {
    let said = command.output().unwrap();
    assert!(
        said.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&said.stderr)
    );
    String::from_utf8(said.stdout).unwrap()
}

pub fn assert_sound(hooks: &Hooks) {
    assert_eq!(hooks.devices, []);
    assert!(hooks.node.iter().all(|h| h.problem.is_none()), "{hooks:?}");
}

/// The programs of the filters in the blocks of all pods, ingress first, by what `tc` says of this thread's namespace.
pub fn filters_of_pods() -> Vec<u64> {
    ["1464158465", "1464158466"]
        .into_iter()
        .flat_map(|block| programs_of_filters(&["block", block]))
        .collect()
}

pub fn programs_of_filters(at: &[&str]) -> Vec<u64> {
    let mut shown = Command::new("tc");
    let said = shown.args(["-j", "filter", "show"]).args(at);
    let said = said.output().unwrap();
    // It fails so when there is no such block.
    if !said.status.success() {
        return Vec::new();
    }
    let filters: Value = serde_json::from_slice(&said.stdout).unwrap();
    let programs = filters.as_array().unwrap().iter();
    programs
        .filter_map(|it| it["options"]["prog"]["id"].as_u64())
        .collect()
}

pub fn tc(words: &str) {
    let words = words.split(' ').map(|word| word.replace('\u{a0}', " "));
    output(Command::new("tc").args(words));
}
