//! Taking off a node's disk what Weir put there. Only files whose names are ours; a folder goes when
//! nothing else is in it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use weir_cni::durable;
use weir_dns::hand_over::FOLDER_NAME;

use super::network::FILE;
use super::plugin::PLUGIN;

/// What the agent has in its run folder.
const RUN: &[&str] = &["cni.sock", "admin.sock"];
/// The lock of who runs: an agent, or the cleanup itself, so that its going is no news.
const LOCK: &str = "agent.lock";
/// What it has in its state folder.
const STATE: &[&str] = &[
    "leases.redb",
    "leases.new",
    "cluster-ips.json",
    "released",
    "objects.jsonl",
    "objects.jsonl.part",
    "objects.jsonl.set-aside",
];

/// Where a node has what Weir put there.
#[derive(Clone, Debug)]
pub struct Places {
    /// Network configurations.
    pub cni_conf_dir: PathBuf,
    /// CNI plugins.
    pub cni_bin_dir: PathBuf,
    pub run_dir: PathBuf,
    pub zone_socket: PathBuf,
    pub state_dir: PathBuf,
}

/// What becomes of the addresses that pods of this node hold.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Leases {
    /// For an agent that comes back.
    Kept,
    Removed,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Removed {
    /// What is gone, in words, in the order in which it went.
    pub removed: Vec<String>,
    /// What is left, with the reason.
    pub left: Vec<String>,
}

impl Removed {
    fn note(&mut self, path: &Path, outcome: io::Result<bool>) {
        let path = path.display();
        match outcome {
            Ok(true) => self.removed.push(format!("{path}")),
            Ok(false) => {}
            Err(error) => self.left.push(format!("{path}: {error}")),
        }
    }

    /// Removes a folder with nothing in it. Only one that is left is worth a line.
    fn folder(&mut self, folder: &Path) {
        match fs::remove_dir(folder) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                self.left.push(format!("{}: {error}", folder.display()));
            }
            _ => {}
        }
    }
}

/// The first step: takes the network configuration away, so that the runtime starts no more pods.
pub fn close(places: &Places) -> Removed {
    let mut removed = Removed::default();
    let path = places.cni_conf_dir.join(FILE);
    removed.note(&path, durable::remove(&path));
    removed
}

/// The last step, when the kernel holds nothing of ours any more. Goes on after a failure.
pub fn remove(places: &Places, leases: Leases) -> Removed {
    let mut removed = Removed::default();
    let plugin = places.cni_bin_dir.join(PLUGIN);
    removed.note(&plugin, durable::remove(&plugin));
    removed.note(&places.zone_socket, durable::remove(&places.zone_socket));
    if let Some(folder) = places.zone_socket.parent() {
        // With names of processes that were killed.
        folder_of_ours(&mut removed, folder, &[FOLDER_NAME]);
    }
    if let Err(error) = durable::remove(&places.run_dir.join(LOCK)) {
        removed.left.push(format!("{LOCK}: {error}"));
    }
    folder_of_ours(&mut removed, &places.run_dir, RUN);
    if leases == Leases::Removed {
        folder_of_ours(&mut removed, &places.state_dir, STATE);
    }
    removed
}

fn folder_of_ours(removed: &mut Removed, folder: &Path, ours: &[&str]) {
    for name in ours {
        let path = folder.join(name);
        let gone = match fs::symlink_metadata(&path) {
            // What a crash left beside it may be all there is.
            Err(error) if error.kind() == ErrorKind::NotFound => durable::remove(&path),
            Err(error) => Err(error),
            Ok(found) if found.is_dir() => fs::remove_dir_all(&path).map(|()| true),
            Ok(_) => durable::remove(&path),
        };
        removed.note(&path, gone);
    }
    removed.folder(folder);
}

#[cfg(test)]
mod tests {
    use super::super::{Network, announce, install};
    use super::*;

    #[test]
    fn what_is_ours_goes_and_what_is_not_stays() {
        let node = tempfile::tempdir().unwrap();
        let at = |path: &str| node.path().join(path);
        let places = Places {
            cni_conf_dir: at("etc/cni/net.d"),
            cni_bin_dir: at("opt/cni/bin"),
            run_dir: at("run/weir"),
            zone_socket: at("run/weir-dns/zone.sock"),
            state_dir: at("var/lib/weir"),
        };
        for folder in [
            "opt/cni/bin",
            "run/weir",
            "run/weir-dns/handover",
            "var/lib/weir/released",
        ] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        let others = ["opt/cni/bin/loopback", "var/lib/weir/notes"];
        let ours = [
            "run/weir/cni.sock",
            "run/weir/agent.lock",
            "run/weir-dns/zone.sock",
            "run/weir-dns/handover/169.254.53.53:53.0",
            "var/lib/weir/leases.redb",
            "var/lib/weir/leases.new",
            // What a crash has left of a file that never was there.
            "var/lib/weir/.cluster-ips.json.weir-part",
            "var/lib/weir/released/one",
        ];
        for path in others.iter().chain(&ours) {
            fs::write(at(path), path).unwrap();
        }
        install(&at("opt/cni/bin/loopback"), &places.cni_bin_dir).unwrap();
        let network = Network {
            agent_socket: places.run_dir.join("cni.sock"),
            released_dir: places.state_dir.join("released"),
        };
        announce(&places.cni_conf_dir, &network).unwrap();

        let closed = close(&places);
        assert_eq!(closed.removed.len(), 1, "{closed:?}");
        let kept = remove(&places, Leases::Kept);
        assert!(kept.left.is_empty(), "{kept:?}");
        assert!(!at("run/weir").exists() && !at("run/weir-dns").exists());
        assert!(!at("opt/cni/bin/weir-cni").exists());
        assert!(at("var/lib/weir/leases.redb").exists());

        // A file that nobody of ours made keeps its folder.
        let removed = remove(&places, Leases::Removed);
        assert_eq!(removed.left.len(), 1, "{removed:?}");
        assert!(!at("var/lib/weir/leases.redb").exists());
        fs::remove_file(at("var/lib/weir/notes")).unwrap();
        let again = remove(&places, Leases::Removed);
        assert!(again.left.is_empty(), "{again:?}");
        assert!(at("opt/cni/bin/loopback").exists());
        let nothing = remove(&places, Leases::Removed);
        assert!(
            nothing.removed.is_empty() && nothing.left.is_empty(),
            "{nothing:?}"
        );
    }
}
