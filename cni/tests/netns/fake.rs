//! A datapath without eBPF: it notes what it is asked, deletes devices for real, and lets a test hold
//! or break each step.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use tokio::sync::watch;
use weir_agent::pods::{Attachment, Datapath, Device, Devices, Lease, LeaseTable};

/// What waiting for a pod's policy does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Policy {
    Known,
    Unknown,
    Broken,
}

#[derive(Clone)]
pub(crate) struct Fake {
    node: String,
    pub(crate) policy: watch::Sender<Policy>,
    /// Whether devices may be deleted; until then it waits.
    pub(crate) deletes: watch::Sender<bool>,
    /// Whether deleting a device fails.
    pub(crate) keeps_devices: Arc<AtomicBool>,
    /// How many ADDs wait for a policy.
    pub(crate) waiting: watch::Sender<usize>,
    pub(crate) ready: Arc<Mutex<Result<(), String>>>,
    /// Whether each call looks at its device, which takes milliseconds.
    pub(crate) looks: Arc<AtomicBool>,
    /// What was asked, with the state of the device at that moment if it looks.
    pub(crate) calls: Arc<Mutex<Vec<String>>>,
    /// Addresses that are open, with their device.
    pub(crate) open: Arc<Mutex<BTreeMap<String, String>>>,
    /// Addresses that were opened while they were open.
    pub(crate) doubled: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    pub(crate) fn new(node: &str) -> Self {
        Self {
            node: node.into(),
            policy: watch::Sender::new(Policy::Known),
            deletes: watch::Sender::new(true),
            keeps_devices: Arc::default(),
            waiting: watch::Sender::new(0),
            ready: Arc::new(Mutex::new(Ok(()))),
            looks: Arc::default(),
            calls: Arc::default(),
            open: Arc::default(),
            doubled: Arc::default(),
        }
    }

    fn note(&self, call: &str, device: &str) {
        if !self.looks.load(Ordering::Relaxed) {
            return;
        }
        let shown = self.ip(&["-br", "link", "show", "dev", device]);
        let state = match shown {
            Some(text) if text.contains(",UP") || text.contains("<UP") => "up",
            Some(_) => "down",
            None => "absent",
        };
        self.calls.lock().unwrap().push(format!("{call} {state}"));
    }

    fn ip(&self, args: &[&str]) -> Option<String> {
        let output = Command::new("ip")
            .args(["-n", &self.node])
            .args(args)
            .output()
            .unwrap();
        output
            .status
            .success()
            .then(|| String::from_utf8(output.stdout).unwrap())
    }
}

impl Datapath for Fake {
    fn ready(&self) -> Result<(), String> {
        self.ready.lock().unwrap().clone()
    }

    fn protect(&self, device: &str, devices: Devices) -> Result<()> {
        assert!(devices.host_ifindex > 0);
        self.note("protect", device);
        Ok(())
    }

    async fn open(&self, lease: &Arc<Lease>) -> Result<()> {
        self.waiting.send_modify(|it| *it += 1);
        let mut policy = self.policy.subscribe();
        let known = *policy.wait_for(|it| *it != Policy::Unknown).await?;
        if known == Policy::Broken {
            bail!("the policy cannot be compiled");
        }
        self.note("open", &lease.device());
        let mut open = self.open.lock().unwrap();
        for address in &lease.addresses {
            if open.insert(address.to_string(), lease.device()).is_some() {
                self.doubled.lock().unwrap().push(address.to_string());
            }
        }
        Ok(())
    }

    fn opened(&self, _lease: &Lease) {}

    async fn close(&self, lease: &Arc<Lease>) -> Result<()> {
        let mut open = self.open.lock().unwrap();
        for address in &lease.addresses {
            open.remove(&address.to_string());
        }
        Ok(())
    }

    async fn delete_device(&self, name: &str) -> Result<()> {
        self.deletes.subscribe().wait_for(|it| *it).await?;
        if self.keeps_devices.load(Ordering::Relaxed) {
            bail!("{name} is kept by the test");
        }
        let (node, name) = (self.node.clone(), name.to_owned());
        tokio::task::spawn_blocking(move || {
            Command::new("ip")
                .args(["-n", &node, "link", "del", &name])
                .output()
        })
        .await??;
        Ok(())
    }

    async fn devices(&self) -> Result<Vec<Device>> {
        let links = self.ip(&["-o", "link"]).unwrap_or_default();
        let mut devices = Vec::new();
        for line in links.lines() {
            let mut fields = line.split([':', '@', ' ']).filter(|it| !it.is_empty());
            let (Some(ifindex), Some(name)) = (fields.next(), fields.next()) else {
                continue;
            };
            if !weir_cni::attachment::is_device(name) {
                continue;
            }
            let mut addresses = Vec::new();
            for family in ["-4", "-6"] {
                let routes = self.ip(&[family, "route", "show", "dev", name]);
                let routes = routes.unwrap_or_default();
                addresses.extend(
                    routes
                        .split_whitespace()
                        .filter_map(|it| it.parse::<IpAddr>().ok()),
                );
            }
            devices.push(Device {
                name: name.into(),
                ifindex: ifindex.parse()?,
                addresses,
            });
        }
        Ok(devices)
    }

    fn device(&self, name: &str) -> Result<Option<u32>> {
        let shown = self.ip(&["-o", "link", "show", "dev", name]);
        let index = shown.and_then(|it| it.split(':').next()?.parse().ok());
        Ok(index)
    }

    async fn orphans(
        &self,
        _leases: Arc<LeaseTable>,
        _devices: BTreeMap<String, u32>,
    ) -> Result<Vec<Attachment>> {
        Ok(Vec::new())
    }
}
