//! Exact counters of the kernel side, summed over CPUs when they are asked for.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use weir_common::DropReason;
use weir_common::counter::{Counter, Drops};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::sys;

/// The per-CPU tables of counters.
#[derive(Debug)]
pub struct Counters {
    counters: OwnedFd,
    drops: OwnedFd,
    cpus: usize,
}

impl Counters {
    pub(super) fn new(counters: OwnedFd, drops: OwnedFd) -> io::Result<Self> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        Ok(Self {
            counters,
            drops,
            cpus,
        })
    }

    /// Every counter, since the tables were made.
    ///
    /// # Errors
    /// The kernel refuses to read.
    pub fn all(&self) -> io::Result<Vec<(Counter, u64)>> {
        Counter::ALL
            .iter()
            .map(|counter| {
                let values: Vec<u64> = self.read(&self.counters, *counter as u32)?;
                Ok((*counter, values.iter().sum()))
            })
            .collect()
    }

    /// What was dropped, by reason, since the tables were made.
    ///
    /// # Errors
    /// The kernel refuses to read.
    pub fn drops(&self) -> io::Result<Vec<(DropReason, Drops)>> {
        DropReason::ALL
            .iter()
            .map(|reason| {
                let values: Vec<Drops> = self.read(&self.drops, *reason as u32)?;
                let sum = values.iter().fold(Drops::default(), |sum, cpu| Drops {
                    packets: sum.packets + cpu.packets,
                    bytes: sum.bytes + cpu.bytes,
                });
                Ok((*reason, sum))
            })
            .collect()
    }

    fn read<T: FromBytes + IntoBytes + Immutable>(
        &self,
        map: &OwnedFd,
        index: u32,
    ) -> io::Result<Vec<T>> {
        // Each CPU's value takes a multiple of 8 bytes.
        let stride = size_of::<T>().next_multiple_of(8);
        let mut bytes = vec![0; stride * self.cpus];
        sys::lookup(map.as_fd(), index.as_bytes(), &mut bytes)?;
        bytes
            .chunks_exact(stride)
            .map(|cpu| {
                T::read_from_prefix(cpu)
                    .map(|(value, _)| value)
                    .map_err(|_| io::Error::other("a counter of another size"))
            })
            .collect()
    }
}
