//! Taking everything of ours out of the node's kernel, for a node that Weir leaves.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};

use super::links::Links;
use super::tc::Tc;
use super::{census, netlink, second_lock, sysctl, uplinks};

/// What came of it.
#[derive(Debug, Default)]
pub struct Cleaned {
    /// What is gone, in words, in the order in which it went.
    pub removed: Vec<String>,
    /// What is left, with the reason.
    pub left: Vec<String>,
}

impl Cleaned {
    fn note<E: std::fmt::Display>(&mut self, what: String, outcome: Result<(), E>) {
        match outcome {
            Ok(()) => self.removed.push(what),
            Err(error) => self.left.push(format!("{what}: {error:#}")),
        }
    }
}

/// Removes the pods' devices, all links, programs and tables, the DNS addresses of the loopback device,
/// routes and the second lock, in this order: no pod is ever open without its policy. Then the node's settings
/// are as they were, by the record in the run folder. Goes on after a failure.
///
/// # Errors
/// The kernel cannot be asked what there is.
pub async fn cleanup(bpffs: &Path, cgroup: &Path, run_dir: &Path) -> Result<Cleaned> {
    let mut cleaned = Cleaned::default();
    let devices = netlink::pod_devices().await?;
    let known: Vec<_> = devices
        .iter()
        .map(|device| (device.name.clone(), device.ifindex))
        .collect();
    let tc = Tc::open().context("open a netlink socket")?;
    let left = census::FormerLinks::Left;
    let found = census::take(&tc, bpffs, cgroup, &known, left)?;
    for (device, _) in known {
        let outcome = netlink::delete_device(&device).await;
        cleaned.note(format!("device {device}"), outcome);
    }
    for it in found {
        let outcome = it.remove();
        cleaned.note(it.what, outcome);
    }
    for folder in [
        Links::folder_in(bpffs),
        uplinks::notes(bpffs),
        bpffs.to_owned(),
    ] {
        match fs::remove_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A bpffs of our own stays mounted.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            outcome => cleaned.note(format!("folder {}", folder.display()), outcome),
        }
    }
    match netlink::remove_loopback_addresses().await {
        Ok(addresses) => {
            let words = addresses.iter().map(|it| format!("address {it} of lo"));
            cleaned.removed.extend(words);
        }
        Err(error) => cleaned.left.push(format!("addresses of lo: {error:#}")),
    }
    match netlink::routes::remove_ours().await {
        Ok(routes) => {
            for (to, outcome) in routes {
                cleaned.note(format!("route to {to}"), outcome);
            }
        }
        Err(error) => cleaned.left.push(format!("routes: {error:#}")),
    }
    match second_lock::open() {
        Ok(true) => cleaned
            .removed
            .push("the second lock (table inet weir)".into()),
        Ok(false) => {}
        Err(error) => cleaned.left.push(format!("the second lock: {error:#}")),
    }
    let (restored, left) = sysctl::restore(run_dir);
    cleaned.removed.extend(restored);
    cleaned.left.extend(left);
    Ok(cleaned)
}
