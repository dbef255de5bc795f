//! Leases and devices, brought together: at a start, and again and again. What the plugin asks for is in `server`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tracing::{info, warn};

use super::server::Pods;
use super::{Datapath, Device};
use crate::beat::beat;

/// How often leases are compared with devices.
const AUDIT: Duration = Duration::from_secs(60);

impl<D: Datapath> Pods<D> {
    /// Brings leases and devices together after a start, before anything is served: releases on disk
    /// are taken in; leases without a device (the node rebooted, the namespace ended without a DEL, an
    /// ADD was cut off) are released, the others know their device from here on; devices that no lease
    /// explains are deleted, unless addresses are routed over them: those are held back until DEL or
    /// GC names them.
    ///
    /// # Errors
    /// When devices or releases cannot be listed, or a device cannot be asked for: then nothing may be served.
    pub async fn reconcile(&self) -> Result<()> {
        self.take_in_releases().await?;
        let devices = self.datapath.devices().await.context("list our devices")?;
        let present: HashMap<&str, u32> = devices
            .iter()
            .map(|it| (it.name.as_str(), it.ifindex))
            .collect();
        for lease in self.leases.all().values() {
            let ifindex = match present.get(lease.device().as_str()) {
                Some(ifindex) => Some(*ifindex),
                None => self.datapath.device(&lease.device())?,
            };
            if let Some(ifindex) = ifindex {
                let lease = lease.clone();
                self.blocking(move |it| it.attach(&lease, ifindex)).await?;
                continue;
            }
            let _claim = self.claim(&lease.attachment).await;
            match self.free(&lease.attachment).await {
                Ok(()) => info!(attachment = %lease.attachment, "released at start"),
                Err(error) => {
                    let error = format!("{error:#}");
                    warn!(attachment = %lease.attachment, error, "stays leased until DEL");
                }
            }
            self.delete_device(&lease.device()).await;
        }
        let explained: HashSet<String> = self.leases.all().values().map(|it| it.device()).collect();
        for device in devices.iter().filter(|it| !explained.contains(&it.name)) {
            self.settle_unexplained(device).await;
        }
        Ok(())
    }

    /// Brings leases and devices together again and again: for ever.
    pub async fn keep_audited(self: Arc<Self>) {
        let mut unexplained = HashSet::new();
        loop {
            beat(AUDIT).await;
            match self.audit(unexplained).await {
                Ok(found) => unexplained = found,
                Err(error) => {
                    unexplained = HashSet::new();
                    let error = format!("{error:#}");
                    warn!(error, "leases cannot be compared with devices; later again");
                }
            }
        }
    }

    /// Frees what nobody will free: leases whose device and pod are gone (their DEL never came), and devices
    /// without a lease over which nothing is routed. A device goes a little after its lease, so it has to have been
    /// without one the last time too; says which are without now.
    ///
    /// # Errors
    /// When devices or releases cannot be listed.
    pub async fn audit(&self, last: HashSet<String>) -> Result<HashSet<String>> {
        self.take_in_releases().await?;
        let before = self.leases.all();
        let devices = self.datapath.devices().await.context("list our devices")?;
        let mut there: BTreeMap<String, u32> = devices
            .iter()
            .map(|it| (it.name.clone(), it.ifindex))
            .collect();
        let known = before.values().map(|lease| lease.device());
        for name in known.chain(self.leases.held()) {
            if !there.contains_key(&name) {
                let found = self.datapath.device(&name);
                let found = found.with_context(|| format!("ask for the device {name}"))?;
                there.extend(found.map(|ifindex| (name, ifindex)));
            }
        }
        let names: HashSet<String> = there.keys().cloned().collect();
        self.blocking(move |it| it.let_go_of_all_but(&names)).await;
        for attachment in self.datapath.orphans(before.clone(), there).await? {
            let _claim = self.claim(&attachment).await;
            match self.free(&attachment).await {
                Ok(()) => info!(%attachment, "released: its device and its pod are gone"),
                Err(error) => {
                    let error = format!("{error:#}");
                    warn!(%attachment, error, "stays leased until DEL");
                }
            }
        }
        // A device is made after its lease: those of either moment explain it.
        let after = self.leases.all();
        let leases = before.values().chain(after.values());
        let explained: HashSet<String> = leases.map(|it| it.device()).collect();
        let mut unexplained = HashSet::new();
        for device in devices.iter().filter(|it| !explained.contains(&it.name)) {
            let holding = device.name.clone();
            if self.blocking(move |it| it.holds(&holding)).await {
                continue;
            }
            if last.contains(&device.name) {
                self.settle_unexplained(device).await;
            }
            unexplained.insert(device.name.clone());
        }
        Ok(unexplained)
    }

    async fn settle_unexplained(&self, device: &Device) {
        if device.addresses.is_empty() {
            self.delete_device(&device.name).await;
        } else {
            let addresses = &device.addresses;
            warn!(
                device = device.name,
                ?addresses,
                "held: a device without a lease"
            );
            let device = device.clone();
            self.blocking(move |it| it.hold(&device)).await;
        }
    }
}
