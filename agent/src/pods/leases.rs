//! The leases of this node: who has which address, durable before anybody hears of it. Blocking: it
//! writes to disk under its lock. When to lease and to release, `server` knows.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use thiserror::Error;
use tokio::sync::watch;
use tracing::{info, warn};
use weir_cni::attachment::Attachment;
use weir_cni::wire::{Add, Macs};

use super::pool::{Exhausted, InvalidCidr, Pools};
use super::store::{Change, Store, StoreError};
use super::{Device, Lease, LeaseState};

/// All leases, by attachment.
pub type LeaseTable = BTreeMap<Attachment, Arc<Lease>>;

/// Where leases are kept.
#[derive(Clone, Debug)]
pub struct Places {
    /// The store, usually `<state dir>/leases.redb`.
    pub store: PathBuf,
    /// Where the plugin leaves releases while the agent does not answer.
    pub released: PathBuf,
}

/// Which ranges addresses are leased from.
#[derive(Clone, Copy, Debug)]
pub enum Ranges<'a> {
    /// These: somebody has decided.
    Given(&'a [IpNet]),
    /// Those of the last [`Leases::serve`]; none before the first.
    LastServed,
}

/// Why there is no lease.
#[derive(Debug, Error)]
pub enum LeaseError {
    #[error("this node has no pod CIDR yet")]
    NoRange,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Cidr(#[from] InvalidCidr),
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    #[error("{0} is attached already, and stays as it is")]
    Exists(Attachment),
    #[error("{0} and {1} would have devices of the same name")]
    Clash(Attachment, Attachment),
    #[error("{0} has no lease")]
    NotFound(Attachment),
}

/// How an address was taken back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TakenBack {
    Durably,
    /// The disk does not take it now. The address is free; the record goes with the next write, and
    /// if there is none, an agent that starts finds a lease without a device and drops it.
    InMemory,
}

/// The leases of this node. Most calls that change one write to disk; give them a thread that may
/// block.
#[derive(Debug)]
pub struct Leases {
    places: Places,
    boot_id: String,
    state: Mutex<State>,
    table: watch::Sender<Arc<LeaseTable>>,
    ranges: watch::Sender<Vec<IpNet>>,
}

#[derive(Debug)]
struct State {
    store: Store,
    /// Whether the file holds what memory holds.
    written: Written,
    pools: Pools,
    leases: LeaseTable,
    /// Addresses that devices without a lease carry.
    held: HashMap<String, Vec<IpAddr>>,
    /// The order of the next address that is freed.
    next_order: u64,
    /// The addresses that are free again, as they are on disk.
    freed: BTreeMap<u64, IpAddr>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Written {
    Everything,
    /// A write failed; what the file holds is not known.
    Unknown,
}

impl Leases {
    /// Reads the leases of `places`. Leases outside of `ranges` (they were changed) stay until they are
    /// released. `boot_id` is `/proc/sys/kernel/random/boot_id`.
    ///
    /// # Errors
    /// When the ranges make no sense, or the store cannot be read: without it nothing is leased.
    pub fn open(places: Places, ranges: Ranges<'_>, boot_id: String) -> Result<Self, LeaseError> {
        let mut pools = Pools::default();
        if let Ranges::Given(cidrs) = ranges {
            pools.serve(cidrs)?;
        }
        let (store, contents) = Store::open(&places.store)?;
        if matches!(ranges, Ranges::LastServed) && !contents.ranges.is_empty() {
            pools.serve(&contents.ranges)?;
        }
        let next_order = contents.freed.last().map_or(0, |(order, _)| order + 1);
        for (order, address) in &contents.freed {
            pools.free(*address, *order);
        }
        let mut leases = LeaseTable::new();
        for lease in contents.leases {
            for address in &lease.addresses {
                pools.take(*address);
            }
            leases.insert(lease.attachment.clone(), Arc::new(lease));
        }
        let table = watch::Sender::new(Arc::new(leases.clone()));
        let ranges = watch::Sender::new(pools.ranges());
        let state = Mutex::new(State {
            store,
            written: Written::Everything,
            pools,
            leases,
            held: HashMap::new(),
            next_order,
            freed: contents.freed.into_iter().collect(),
        });
        Ok(Self {
            places,
            boot_id,
            state,
            table,
            ranges,
        })
    }

    /// The ranges that addresses are leased from, IPv4 first; none before there are some.
    pub fn ranges(&self) -> watch::Receiver<Vec<IpNet>> {
        self.ranges.subscribe()
    }

    /// Leases addresses of these ranges from now on, and of no other; those that are leased stay. When it
    /// returns, an agent that starts knows the ranges by [`Ranges::LastServed`].
    ///
    /// # Errors
    /// When the ranges make no sense, or the store does not take them. Nothing is changed then.
    pub fn serve(&self, cidrs: &[IpNet]) -> Result<(), LeaseError> {
        let mut state = self.state();
        let mut pools = Pools::default();
        pools.serve(cidrs)?;
        let ranges = pools.ranges();
        let before = state.pools.ranges();
        if ranges == before && state.written == Written::Everything {
            return Ok(());
        }
        state.write(&[Change::Serve(&ranges)])?;
        let State { pools, freed, .. } = &mut *state;
        pools.serve(&ranges)?;
        for (order, address) in freed {
            if !pools.is_used(*address) {
                pools.free(*address, *order);
            }
        }
        if before.iter().any(|range| !ranges.contains(range)) {
            warn!(
                ?before,
                ?ranges,
                "the pod CIDRs changed; what is leased of the former stays until its pods end"
            );
        } else {
            info!(?ranges, "pod CIDRs");
        }
        self.ranges.send_replace(ranges);
        Ok(())
    }

    /// All leases as they are now.
    pub fn all(&self) -> Arc<LeaseTable> {
        self.table.borrow().clone()
    }

    /// All leases, again after every change. A reader that is slow sees the latest only.
    pub fn watch(&self) -> watch::Receiver<Arc<LeaseTable>> {
        self.table.subscribe()
    }

    /// The lease of one attachment.
    pub fn find(&self, attachment: &Attachment) -> Option<Arc<Lease>> {
        self.table.borrow().get(attachment).cloned()
    }

    /// Whether another lease could be had.
    ///
    /// # Errors
    /// When no address is free, or the store cannot be written since a write failed.
    pub fn check(&self) -> Result<(), LeaseError> {
        let mut state = self.state();
        if state.written == Written::Unknown {
            state.write(&[])?;
        }
        state.next()?;
        Ok(())
    }

    /// Leases the next address of each family. When it returns, the lease is durable, and it is
    /// everything the disk hears of an ADD. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// Nothing is leased then.
    pub fn lease(&self, add: Add, macs: Macs, now: u64) -> Result<Arc<Lease>, LeaseError> {
        let mut state = self.state();
        if state.leases.contains_key(&add.attachment) {
            return Err(LeaseError::Exists(add.attachment));
        }
        let device = add.attachment.device();
        if let Some(other) = state.leases.keys().find(|other| other.device() == device) {
            return Err(LeaseError::Clash(add.attachment, other.clone()));
        }
        let addresses = state.next()?;
        let lease = Arc::new(Lease {
            attachment: add.attachment,
            network: add.network,
            netns: add.netns,
            pod: add.pod,
            addresses,
            macs,
            state: LeaseState::Leased,
            boot_id: self.boot_id.clone(),
            leased_at: now,
        });
        let mut changes = vec![Change::Lease(&lease)];
        for address in &lease.addresses {
            changes.extend(
                state
                    .pools
                    .order(*address)
                    .map(|order| Change::Forget { order }),
            );
        }
        state.write(&changes)?;
        for address in &lease.addresses {
            if let Some(order) = state.pools.take(*address) {
                state.freed.remove(&order);
            }
        }
        state.leases.insert(lease.attachment.clone(), lease.clone());
        self.publish(&state);
        Ok(lease)
    }

    /// Says that the devices of a lease exist. Does not write.
    ///
    /// # Errors
    /// When it is not leased any more.
    pub fn attach(&self, lease: &Arc<Lease>, host_ifindex: u32) -> Result<Arc<Lease>, LeaseError> {
        let mut state = self.state();
        let current = state.leases.get(&lease.attachment);
        // A later lease of the same name is not the one that got these devices.
        if current.is_none_or(|current| !Arc::ptr_eq(current, lease)) {
            return Err(LeaseError::NotFound(lease.attachment.clone()));
        }
        let lease = Arc::new(Lease {
            state: LeaseState::Attached { host_ifindex },
            ..Lease::clone(lease)
        });
        state.leases.insert(lease.attachment.clone(), lease.clone());
        self.publish(&state);
        Ok(lease)
    }

    /// Frees the addresses of these attachments. Those that have none are no error.
    pub fn release<'a>(&self, attachments: impl IntoIterator<Item = &'a Attachment>) -> TakenBack {
        let mut state = self.state();
        let mut changes = Vec::new();
        for attachment in attachments {
            let Some(lease) = state.leases.remove(attachment) else {
                continue;
            };
            changes.push(Change::Release(attachment));
            for address in &lease.addresses {
                let order = state.next_order;
                state.next_order += 1;
                state.freed.insert(order, *address);
                changes.push(Change::Free {
                    order,
                    address: *address,
                });
                if let Some(order) = state.pools.free(*address, order) {
                    state.freed.remove(&order);
                    changes.push(Change::Forget { order });
                }
            }
        }
        if changes.is_empty() {
            return TakenBack::Durably;
        }
        let taken_back = match state.write(&changes) {
            Ok(()) => TakenBack::Durably,
            Err(error) => {
                warn!(%error, "released in memory only");
                TakenBack::InMemory
            }
        };
        self.publish(&state);
        taken_back
    }

    /// Keeps the addresses of a device that no lease explains from being leased while it exists.
    pub fn hold(&self, device: &Device) {
        let mut state = self.state();
        let free: Vec<IpAddr> = device
            .addresses
            .iter()
            .filter(|address| !state.pools.is_used(**address))
            .copied()
            .collect();
        for address in &free {
            if let Some(order) = state.pools.take(*address) {
                state.freed.remove(&order);
            }
        }
        state
            .held
            .entry(device.name.clone())
            .or_default()
            .extend(free);
    }

    /// The opposite of `hold`, when the device is gone.
    pub fn let_go(&self, device: &str) {
        let mut state = self.state();
        for address in state.held.remove(device).unwrap_or_default() {
            let order = state.next_order;
            state.next_order += 1;
            state.freed.insert(order, address);
            state.pools.free(address, order);
            // That this order is not on disk costs nothing but the order.
        }
    }

    /// The opposite of `hold` for every device that is not among these.
    pub fn let_go_of_all_but(&self, devices: &HashSet<String>) {
        let held: Vec<String> = self.state().held.keys().cloned().collect();
        for device in held.iter().filter(|device| !devices.contains(*device)) {
            self.let_go(device);
        }
    }

    /// Whether a device is held.
    pub fn holds(&self, device: &str) -> bool {
        self.state().held.contains_key(device)
    }

    /// Where the plugin leaves releases.
    pub fn released_dir(&self) -> &Path {
        &self.places.released
    }

    fn publish(&self, state: &State) {
        self.table.send_replace(Arc::new(state.leases.clone()));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// One address of each family, which are not taken yet.
    fn next(&mut self) -> Result<Vec<IpAddr>, LeaseError> {
        let next = self.pools.next()?;
        if next.is_empty() {
            return Err(LeaseError::NoRange);
        }
        Ok(next)
    }

    /// Makes `changes` durable. After a failure the file is brought to what memory holds first, in
    /// the same transaction: the failed one may have reached the disk all the same.
    fn write(&mut self, changes: &[Change<'_>]) -> Result<(), StoreError> {
        let result = match self.written {
            Written::Everything => self.store.write(changes.iter().copied()),
            Written::Unknown => {
                let leases = self.leases.values().map(|lease| Change::Lease(lease));
                let freed = self.freed.iter().map(|(order, address)| Change::Free {
                    order: *order,
                    address: *address,
                });
                self.store
                    .rewrite(leases.chain(freed).chain(changes.iter().copied()))
            }
        };
        self.written = match result {
            Ok(()) => Written::Everything,
            Err(_) => Written::Unknown,
        };
        result
    }
}

#[cfg(test)]
mod tests;
