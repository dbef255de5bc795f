//! What may pass between two ends, as one set of packets that can be compared with another.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use rangemap::RangeInclusiveSet;
use weir_common::Protocol;

/// The protocols that policy knows ports of.
pub const WITH_PORTS: [Protocol; 3] = [Protocol::TCP, Protocol::UDP, Protocol::SCTP];

/// Packets. Two that hold the same are equal: there is always an entry for each protocol with ports, empty or not, and never one for
/// another; ports are 0 to 65535.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Passing {
    /// ICMP, and every protocol that policy knows no ports of.
    pub others: bool,
    pub ports: BTreeMap<Protocol, RangeInclusiveSet<u16>>,
}

impl Passing {
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            others: false,
            ports: WITH_PORTS.map(|it| (it, RangeInclusiveSet::new())).into(),
        }
    }

    #[must_use]
    pub fn everything() -> Self {
        let mut all = Self::nothing();
        all.others = true;
        for protocol in WITH_PORTS {
            all.set(protocol, 0..=u16::MAX, true);
        }
        all
    }

    /// Is the packet among them? `port` is of a protocol with ports.
    #[must_use]
    pub fn includes(&self, protocol: Protocol, port: u16) -> bool {
        match self.ports.get(&protocol) {
            Some(ports) => ports.contains(&port),
            None => self.others,
        }
    }

    /// These ports are, or are not, among them. What has no ports stays as it is.
    pub fn set(&mut self, protocol: Protocol, numbers: RangeInclusive<u16>, is_among: bool) {
        if let Some(ports) = self.ports.get_mut(&protocol) {
            if is_among {
                ports.insert(numbers);
            } else {
                ports.remove(numbers);
            }
        }
    }

    /// Those of `other` are among them too.
    pub fn add(&mut self, other: &Self) {
        self.others |= other.others;
        for (protocol, ports) in &other.ports {
            for numbers in ports.iter() {
                self.set(*protocol, numbers.clone(), true);
            }
        }
    }

    /// Those of `other` are not among them any more.
    pub fn remove(&mut self, other: &Self) {
        self.others &= !other.others;
        for (protocol, ports) in &other.ports {
            for numbers in ports.iter() {
                self.set(*protocol, numbers.clone(), false);
            }
        }
    }

    /// Those that are among both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let mut without = self.clone();
        without.remove(other);
        let mut both = self.clone();
        both.remove(&without);
        both
    }
}
