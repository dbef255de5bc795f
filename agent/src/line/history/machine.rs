//! A node in memory: tables that refuse single rows, and devices that can be gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, bail};
use weir_common::device::{Device, LocalPod};
use weir_common::nat::{InCluster, Uplink};
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation, NodeAddress};
use weir_common::{Addr, Prefix};

use super::super::machine::{Disconnecting, Machine, Plain, Swept, Tables};
use crate::apply::fake::FakeTable;
use crate::apply::{Departed, KernelTable, Origin, Stopped, TableError};
use crate::kernel::{DeviceFault, DeviceProblem, Hooks};

/// What tables refuse in a key, as bytes, and devices that are gone. Shared by everything of a node.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    refused: BTreeSet<Vec<u8>>,
    gone: BTreeSet<u32>,
    /// Devices whose settings cannot be put back.
    stuck: BTreeSet<u32>,
}

impl Faults {
    pub(super) fn refuse<K: Plain>(&self, key: K) {
        self.0
            .lock()
            .unwrap()
            .refused
            .insert(key.as_bytes().to_vec());
    }

    pub(super) fn lose(&self, ifindex: u32) {
        self.0.lock().unwrap().gone.insert(ifindex);
    }

    pub(super) fn stick(&self, ifindex: u32) {
        self.0.lock().unwrap().stuck.insert(ifindex);
    }

    pub(super) fn unstick(&self, ifindex: u32) {
        self.0.lock().unwrap().stuck.remove(&ifindex);
    }

    fn refuses<K: Plain>(&self, key: &K) -> bool {
        let inner = self.0.lock().unwrap();
        let is_in = |refused: &Vec<u8>| {
            key.as_bytes()
                .windows(refused.len())
                .any(|part| part == refused)
        };
        inner.refused.iter().any(is_in)
    }

    pub(super) fn is_gone(&self, ifindex: u32) -> bool {
        self.0.lock().unwrap().gone.contains(&ifindex)
    }
}

/// A table in memory that refuses some keys.
#[derive(Clone, Debug)]
pub(super) struct ShakyTable<K, V> {
    rows: FakeTable<K, V>,
    faults: Faults,
}

impl<K: Plain + Ord, V: Plain> ShakyTable<K, V> {
    fn new(capacity: usize, faults: &Faults) -> Self {
        Self {
            rows: FakeTable::empty(capacity),
            faults: faults.clone(),
        }
    }

    pub(super) fn rows(&self) -> BTreeMap<K, V> {
        self.rows.rows()
    }
}

impl<K: Plain + Ord, V: Plain> KernelTable<K, V> for ShakyTable<K, V> {
    fn load(&mut self) -> Result<Vec<(K, V)>, TableError> {
        self.rows.load()
    }

    fn set(&mut self, rows: &[(K, V)]) -> Result<(), Stopped> {
        for (done, row) in rows.iter().enumerate() {
            if self.faults.refuses(&row.0) {
                let cause = TableError::Io(io::Error::other("injected"));
                return Err(Stopped { done, cause });
            }
            self.rows
                .set(&[*row])
                .map_err(|it| Stopped { done, ..it })?;
        }
        Ok(())
    }

    fn remove(&mut self, keys: &[K]) -> Result<(), Stopped> {
        self.rows.remove(keys)
    }

    fn capacity(&self) -> usize {
        self.rows.capacity()
    }
}

/// The node. Clones share everything, as a restarted agent shares the kernel.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    pub(super) faults: Faults,
    pub(super) frontends: ShakyTable<FrontendKey, Frontend>,
    pub(super) backends: ShakyTable<u32, Backend>,
    live: ShakyTable<BackendId, Generation>,
    nodes: ShakyTable<Addr, NodeAddress>,
    pub(super) classes: ShakyTable<Addr, Class>,
    pub(super) cidrs: ShakyTable<Prefix, Class>,
    pub(super) verdicts: ShakyTable<VerdictKey, VerdictRow>,
    ports: ShakyTable<PortKey, PortRow>,
    epoch: ShakyTable<u32, u32>,
    pub(super) devices: ShakyTable<u32, Device>,
    pods: ShakyTable<Addr, LocalPod>,
    uplinks: ShakyTable<u32, Uplink>,
    cluster: ShakyTable<Prefix, InCluster>,
}

impl Memory {
    pub(super) fn new() -> Self {
        let faults = Faults::default();
        Self {
            frontends: ShakyTable::new(64, &faults),
            backends: ShakyTable::new(256, &faults),
            live: ShakyTable::new(256, &faults),
            nodes: ShakyTable::new(64, &faults),
            classes: ShakyTable::new(64, &faults),
            cidrs: ShakyTable::new(64, &faults),
            verdicts: ShakyTable::new(256, &faults),
            ports: ShakyTable::new(256, &faults),
            epoch: ShakyTable::new(1, &faults),
            devices: ShakyTable::new(64, &faults),
            pods: ShakyTable::new(64, &faults),
            uplinks: ShakyTable::new(16, &faults),
            cluster: ShakyTable::new(64, &faults),
            faults,
        }
    }
}

impl Machine for Memory {
    type Table<K: Plain + Ord, V: Plain + PartialEq> = ShakyTable<K, V>;

    fn tables(&mut self) -> io::Result<Tables<Self>> {
        Ok(Tables {
            frontends: self.frontends.clone(),
            backends: self.backends.clone(),
            live: self.live.clone(),
            nodes: self.nodes.clone(),
            classes: self.classes.clone(),
            cidrs: self.cidrs.clone(),
            verdicts: self.verdicts.clone(),
            ports: self.ports.clone(),
            epoch: self.epoch.clone(),
            devices: self.devices.clone(),
            pods: self.pods.clone(),
            uplinks: self.uplinks.clone(),
            cluster: self.cluster.clone(),
            frontends_are: Origin::Kept,
            live_is: Origin::Kept,
            policy_is: Origin::Kept,
        })
    }

    fn place_socket_hooks(&self) -> Result<()> {
        Ok(())
    }

    fn place_net_hooks(&self, _uplinks: &BTreeMap<u32, String>) -> Result<()> {
        Ok(())
    }

    fn place_pod_hooks(&self) -> Result<()> {
        Ok(())
    }

    fn replace_programs(&self, _device: &str, _ifindex: u32) -> Result<()> {
        Ok(())
    }

    fn end_take_over(&self) {}

    fn adopt_conversations(&self, _since: Duration) -> Result<usize> {
        Ok(0)
    }

    fn adopt(&self, device: &str, ifindex: u32) -> Result<()> {
        self.join(device, ifindex)
    }

    fn join(&self, device: &str, ifindex: u32) -> Result<()> {
        if self.faults.is_gone(ifindex) {
            bail!("{device} is gone");
        }
        Ok(())
    }

    fn keep_settings<'a>(&self, pods: &'a [(String, u32)]) -> Vec<(&'a str, String)> {
        let inner = self.faults.0.lock().unwrap();
        let stuck = pods.iter().filter(|(_, index)| inner.stuck.contains(index));
        stuck
            .map(|(device, _)| (device.as_str(), "read-only".to_owned()))
            .collect()
    }

    fn hooks(
        &self,
        pods: Vec<(String, u32)>,
        _uplinks: &BTreeMap<u32, String>,
    ) -> io::Result<Hooks> {
        let gone = pods
            .into_iter()
            .filter(|(_, index)| self.faults.is_gone(*index));
        let devices = gone.map(|(device, ifindex)| DeviceProblem {
            device,
            ifindex,
            problem: DeviceFault::Gone,
        });
        Ok(Hooks {
            node: Vec::new(),
            devices: devices.collect(),
        })
    }

    fn programs(&self) -> BTreeMap<String, (u32, Option<u32>)> {
        BTreeMap::new()
    }

    fn sweep(&mut self, _gone: BTreeSet<Addr>) -> Result<Option<Swept>, BTreeSet<Addr>> {
        Ok(None)
    }

    fn disconnecting(&mut self) -> Disconnecting {
        Disconnecting::Done
    }

    fn disconnect(&mut self, _departed: Departed) {}
}
