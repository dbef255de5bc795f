//! The leases of this node: who has which address. Memory decides, and the disk follows: what waits for it writes
//! everything that is waiting, so that thirty leases at once are two transactions. Who must wait for the disk, and
//! when to lease and to release, `server` knows.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
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

/// The leases of this node. What writes to disk says so: give it a thread that may block.
#[derive(Debug)]
pub struct Leases {
    places: Places,
    boot_id: String,
    /// Locked before `state`, and over a write.
    disk: Mutex<Disk>,
    /// Whether `disk` waits for a write that succeeds: known without its lock.
    is_failing: AtomicBool,
    /// Never locked over a write.
    state: Mutex<State>,
    ranges: watch::Sender<Vec<IpNet>>,
}

#[derive(Debug)]
struct Disk {
    store: Store,
    /// Whether the file holds what memory held.
    written: Written,
    /// How many changes of memory the file holds.
    changes: u64,
}

#[derive(Debug)]
struct State {
    pools: Pools,
    leases: LeaseTable,
    /// Whose a device is: its name is a hash, and hashing that of every lease takes longer than leasing.
    by_device: HashMap<String, Attachment>,
    /// Addresses that devices without a lease carry.
    held: HashMap<String, Vec<IpAddr>>,
    /// The order of the next address that is freed.
    next_order: u64,
    /// The addresses that are free again, as they are on disk.
    freed: BTreeMap<u64, IpAddr>,
    /// What the file does not hold yet, in the order in which it happened.
    unwritten: Vec<Change>,
    /// How many changes there were, those included.
    changes: u64,
    /// What was released, by how many changes there were, until the file does not hold it any more.
    unrecorded: HashMap<Attachment, u64>,
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
        let by_device = leases.keys().map(|it| (it.device(), it.clone())).collect();
        let ranges = watch::Sender::new(pools.ranges());
        let state = Mutex::new(State {
            pools,
            leases,
            by_device,
            held: HashMap::new(),
            next_order,
            freed: contents.freed.into_iter().collect(),
            unwritten: Vec::new(),
            changes: 0,
            unrecorded: HashMap::new(),
        });
        let disk = Mutex::new(Disk {
            store,
            written: Written::Everything,
            changes: 0,
        });
        Ok(Self {
            places,
            boot_id,
            disk,
            is_failing: AtomicBool::new(false),
            state,
            ranges,
        })
    }

    /// The ranges that addresses are leased from, IPv4 first; none before there are some.
    pub fn ranges(&self) -> watch::Receiver<Vec<IpNet>> {
        self.ranges.subscribe()
    }

    /// Leases addresses of these ranges from now on, and of no other; those that are leased stay. When it
    /// returns, an agent that starts knows the ranges by [`Ranges::LastServed`]. Writes.
    ///
    /// # Errors
    /// When the ranges make no sense, or the store does not take them. Nothing is changed then.
    pub fn serve(&self, cidrs: &[IpNet]) -> Result<(), LeaseError> {
        let mut pools = Pools::default();
        pools.serve(cidrs)?;
        let ranges = pools.ranges();
        let mut disk = self.disk();
        let before = self.state().pools.ranges();
        if ranges == before && disk.written == Written::Everything {
            return Ok(());
        }
        self.write(&mut disk, [Change::Serve(ranges.clone())])?;
        let mut state = self.state();
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

    /// All leases as they are now: a copy, for who looks at them now and then.
    pub fn all(&self) -> Arc<LeaseTable> {
        Arc::new(self.state().leases.clone())
    }

    /// The lease of one attachment.
    pub fn find(&self, attachment: &Attachment) -> Option<Arc<Lease>> {
        self.state().leases.get(attachment).cloned()
    }

    /// Whether another lease could be had. Writes, after a write failed.
    ///
    /// # Errors
    /// When no address is free, or the store cannot be written since a write failed.
    pub fn check(&self) -> Result<(), LeaseError> {
        self.ensure_writable()?;
        self.state().next()?;
        Ok(())
    }

    /// Whether the last write has failed, so that another must succeed before anything is leased.
    pub fn is_failing(&self) -> bool {
        self.is_failing.load(Ordering::Relaxed)
    }

    /// Nothing to do, unless a write has failed: then everything is written again. Writes.
    ///
    /// # Errors
    /// The store still does not take it.
    pub fn ensure_writable(&self) -> Result<(), LeaseError> {
        // Who may lease does not wait for a write that others wait for.
        if !self.is_failing() {
            return Ok(());
        }
        let mut disk = self.disk();
        if disk.written == Written::Unknown {
            self.write(&mut disk, [])?;
        }
        Ok(())
    }

    /// Leases the next address of each family, in memory: it may be used when [`Self::make_durable`] has returned.
    /// `now` is in seconds since 1970.
    ///
    /// # Errors
    /// Nothing is leased then.
    pub fn lease(&self, add: Add, macs: Macs, now: u64) -> Result<Arc<Lease>, LeaseError> {
        let mut state = self.state();
        if state.leases.contains_key(&add.attachment) {
            return Err(LeaseError::Exists(add.attachment));
        }
        let device = add.attachment.device();
        if let Some(other) = state.by_device.get(&device) {
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
        state.change(Change::Lease(lease.clone()));
        for address in &lease.addresses {
            if let Some(order) = state.pools.take(*address) {
                state.freed.remove(&order);
                state.change(Change::Forget { order });
            }
        }
        state.leases.insert(lease.attachment.clone(), lease.clone());
        state.by_device.insert(device, lease.attachment.clone());
        Ok(lease)
    }

    /// Returns when the disk holds every lease that memory held, and it is everything that it hears of an ADD. Writes.
    ///
    /// # Errors
    /// Not known what it holds. What is leased stays leased: give it back.
    pub fn make_durable(&self) -> Result<(), LeaseError> {
        let changes = self.state().changes;
        let mut disk = self.disk();
        // Somebody who waited before us has written ours too.
        if disk.changes < changes || disk.written == Written::Unknown {
            self.write(&mut disk, [])?;
        }
        Ok(())
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
        Ok(lease)
    }

    /// Frees the addresses of these attachments, in memory; their record goes with the next write. Those that have none are
    /// no error.
    pub fn release<'a>(&self, attachments: impl IntoIterator<Item = &'a Attachment>) {
        let mut state = self.state();
        for attachment in attachments {
            let Some(lease) = state.leases.remove(attachment) else {
                continue;
            };
            state.by_device.remove(&lease.device());
            state.change(Change::Release(attachment.clone()));
            let changes = state.changes;
            state.unrecorded.insert(attachment.clone(), changes);
            for address in &lease.addresses {
                let order = state.next_order;
                state.next_order += 1;
                state.freed.insert(order, *address);
                state.change(Change::Free {
                    order,
                    address: *address,
                });
                if let Some(order) = state.pools.free(*address, order) {
                    state.freed.remove(&order);
                    state.change(Change::Forget { order });
                }
            }
        }
    }

    /// Whether the file may hold a lease of this attachment that memory holds no more.
    pub fn is_unrecorded(&self, attachment: &Attachment) -> bool {
        self.state().unrecorded.contains_key(attachment)
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
        for device in self
            .held()
            .iter()
            .filter(|device| !devices.contains(*device))
        {
            self.let_go(device);
        }
    }

    /// The devices that are held.
    pub fn held(&self) -> Vec<String> {
        self.state().held.keys().cloned().collect()
    }

    /// Whether a device is held.
    pub fn holds(&self, device: &str) -> bool {
        self.state().held.contains_key(device)
    }

    /// Where the plugin leaves releases.
    pub fn released_dir(&self) -> &Path {
        &self.places.released
    }

    /// Makes durable what is not yet, and `more`. After a failure the file is brought to what memory holds first, in
    /// the same transaction: the failed one may have reached the disk all the same.
    fn write(
        &self,
        disk: &mut Disk,
        more: impl IntoIterator<Item = Change>,
    ) -> Result<(), StoreError> {
        // Until it has succeeded: what is taken here to be written is nowhere else.
        let before = std::mem::replace(&mut disk.written, Written::Unknown);
        let (changes, written): (Vec<Change>, u64) = {
            let mut state = self.state();
            let unwritten = std::mem::take(&mut state.unwritten);
            let changes = match before {
                Written::Everything => unwritten,
                Written::Unknown => state.all(),
            };
            (changes, state.changes)
        };
        let changes = changes.into_iter().chain(more);
        let result = match before {
            Written::Everything => disk.store.write(changes),
            Written::Unknown => disk.store.rewrite(changes),
        };
        self.is_failing.store(result.is_err(), Ordering::Relaxed);
        result?;
        disk.written = Written::Everything;
        disk.changes = written;
        self.state()
            .unrecorded
            .retain(|_, change| *change > written);
        Ok(())
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Everything that the file is to hold, but for the ranges.
    fn all(&self) -> Vec<Change> {
        let leases = self.leases.values().cloned().map(Change::Lease);
        let freed = self.freed.iter().map(|(order, address)| Change::Free {
            order: *order,
            address: *address,
        });
        leases.chain(freed).collect()
    }

    fn change(&mut self, change: Change) {
        self.unwritten.push(change);
        self.changes += 1;
    }
}

#[cfg(test)]
mod tests;
