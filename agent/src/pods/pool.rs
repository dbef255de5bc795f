//! Which address is next: one that was never used, then the one that has been free the longest.
//! Pure; ranges are never spelled out, so a `/64` costs no more than a `/24`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

/// How many freed addresses a pool remembers the order of. More matter only in IPv6, where an
/// address that is forgotten would not be reached again in the life of a node anyway.
const REMEMBERED: usize = 65_536;

/// No address is free.
#[derive(Clone, Debug, Eq, PartialEq, Error)]
#[error("no address is free in {cidr}")]
pub struct Exhausted {
    pub cidr: IpNet,
}

/// Pod CIDRs that cannot be served.
#[derive(Clone, Debug, Eq, PartialEq, Error)]
pub enum InvalidCidr {
    #[error("there is no pod CIDR")]
    Absent,
    #[error("{0} and {1} are of the same family; a node has one pod CIDR of each family")]
    SameFamily(IpNet, IpNet),
}

/// All addresses this node hands out: one pool for each family that it has a range of.
#[derive(Debug, Default)]
pub(super) struct Pools {
    pools: Vec<Pool>,
    used: HashSet<IpAddr>,
}

#[derive(Debug)]
struct Pool {
    cidr: IpNet,
    /// The first and the last address it hands out, as numbers.
    first: u128,
    last: u128,
    /// Everything before it is used or was used; `None` when that is everything.
    cursor: Option<u128>,
    /// By the order in which they were freed.
    freed: BTreeMap<u64, IpAddr>,
    order: HashMap<IpAddr, u64>,
}

impl Pools {
    /// Hands out addresses of these ranges from now on, and of no other. What is used stays used; what is
    /// free again, and in which order, has to be said anew.
    ///
    /// # Errors
    /// When there is none, or two of one family. Nothing is changed then.
    pub(super) fn serve(&mut self, cidrs: &[IpNet]) -> Result<(), InvalidCidr> {
        let mut pools: Vec<Pool> = Vec::new();
        for cidr in cidrs {
            let cidr = cidr.trunc();
            if let Some(other) = pools
                .iter()
                .find(|it| it.cidr.addr().is_ipv4() == cidr.addr().is_ipv4())
            {
                return Err(InvalidCidr::SameFamily(other.cidr, cidr));
            }
            pools.push(Pool::new(cidr));
        }
        if pools.is_empty() {
            return Err(InvalidCidr::Absent);
        }
        pools.sort_by_key(|pool| pool.cidr.addr().is_ipv6());
        self.pools = pools;
        Ok(())
    }

    /// The ranges, IPv4 first; none before there are some.
    pub(super) fn ranges(&self) -> Vec<IpNet> {
        self.pools.iter().map(|pool| pool.cidr).collect()
    }

    /// One address of each family, which are not taken yet.
    pub(super) fn next(&mut self) -> Result<Vec<IpAddr>, Exhausted> {
        let used = &self.used;
        self.pools
            .iter_mut()
            .map(|pool| pool.next(used).ok_or(Exhausted { cidr: pool.cidr }))
            .collect()
    }

    /// Takes an address, of this node's ranges or of ranges it had before. Returns the order under
    /// which it was free until now.
    pub(super) fn take(&mut self, address: IpAddr) -> Option<u64> {
        self.used.insert(address);
        self.pools
            .iter_mut()
            .find_map(|pool| pool.forget_freed(address))
    }

    /// Frees an address, after all that were freed with a lower `order`. Returns the order of one
    /// that is too old to be remembered.
    pub(super) fn free(&mut self, address: IpAddr, order: u64) -> Option<u64> {
        self.used.remove(&address);
        let pool = self.pools.iter_mut().find(|pool| pool.serves(address))?;
        pool.forget_freed(address);
        pool.freed.insert(order, address);
        pool.order.insert(address, order);
        if pool.freed.len() <= REMEMBERED {
            return None;
        }
        let (order, address) = pool.freed.pop_first()?;
        pool.order.remove(&address);
        Some(order)
    }

    pub(super) fn is_used(&self, address: IpAddr) -> bool {
        self.used.contains(&address)
    }
}

impl Pool {
    /// Of a range that is large enough we keep the network's and the broadcast address, and the
    /// first for the node itself. In IPv6 the network's is the anycast address of its routers (RFC
    /// 4291, 2.6.1), and there is no broadcast.
    fn new(cidr: IpNet) -> Self {
        let (network, bits) = match cidr {
            IpNet::V4(net) => (u128::from(net.network().to_bits()), 32),
            IpNet::V6(net) => (net.network().to_bits(), 128),
        };
        let host_bits = bits - u32::from(cidr.prefix_len());
        let size_less_one = 1u128.checked_shl(host_bits).map_or(u128::MAX, |it| it - 1);
        let end = network + size_less_one;
        let (first, last) = match (cidr, host_bits) {
            (_, 0 | 1) => (network, end),
            (IpNet::V4(_), _) => (network + 2, end - 1),
            (IpNet::V6(_), _) => (network + 2, end),
        };
        Self {
            cidr,
            first,
            last,
            cursor: Some(first),
            freed: BTreeMap::new(),
            order: HashMap::new(),
        }
    }

    fn next(&mut self, used: &HashSet<IpAddr>) -> Option<IpAddr> {
        while let Some(at) = self.cursor {
            let address = self.address(at);
            if !used.contains(&address) && !self.order.contains_key(&address) {
                return Some(address);
            }
            self.cursor = (at < self.last).then(|| at + 1);
        }
        self.freed.first_key_value().map(|(_, address)| *address)
    }

    fn serves(&self, address: IpAddr) -> bool {
        self.cidr.contains(&address) && (self.first..=self.last).contains(&number(address))
    }

    fn forget_freed(&mut self, address: IpAddr) -> Option<u64> {
        let order = self.order.remove(&address)?;
        self.freed.remove(&order);
        Some(order)
    }

    fn address(&self, number: u128) -> IpAddr {
        match self.cidr {
            // An IPv4 range ends below 2^32.
            IpNet::V4(_) => std::net::Ipv4Addr::from_bits(number as u32).into(),
            IpNet::V6(_) => std::net::Ipv6Addr::from_bits(number).into(),
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pools(cidrs: &[&str]) -> Pools {
        let cidrs: Vec<IpNet> = cidrs.iter().map(|it| it.parse().unwrap()).collect();
        let mut pools = Pools::default();
        pools.serve(&cidrs).unwrap();
        pools
    }

    fn drain(pools: &mut Pools, at_most: usize) -> Vec<String> {
        let mut taken = Vec::new();
        while taken.len() < at_most
            && let Ok(next) = pools.next()
        {
            for address in next {
                pools.take(address);
                taken.push(address.to_string());
            }
        }
        taken
    }

    #[test]
    fn reserved_addresses_are_never_handed_out() {
        let cases: &[(&str, &[&str])] = &[
            ("10.0.0.0/32", &["10.0.0.0"]),
            ("10.0.0.0/31", &["10.0.0.0", "10.0.0.1"]),
            ("10.0.0.0/30", &["10.0.0.2"]),
            (
                "10.0.0.9/29",
                &[
                    "10.0.0.10",
                    "10.0.0.11",
                    "10.0.0.12",
                    "10.0.0.13",
                    "10.0.0.14",
                ],
            ),
            ("fd00::/127", &["fd00::", "fd00::1"]),
            ("fd00::/126", &["fd00::2", "fd00::3"]),
            (
                "ffff:ffff:ffff:ffff::/64",
                &[
                    "ffff:ffff:ffff:ffff::2",
                    "ffff:ffff:ffff:ffff::3",
                    "ffff:ffff:ffff:ffff::4",
                    "ffff:ffff:ffff:ffff::5",
                    "ffff:ffff:ffff:ffff::6",
                    "ffff:ffff:ffff:ffff::7",
                ],
            ),
            ("255.255.255.252/30", &["255.255.255.254"]),
            ("::/0", &["::2", "::3", "::4", "::5", "::6", "::7"]),
        ];
        for (cidr, expected) in cases {
            assert_eq!(drain(&mut pools(&[cidr]), 6), *expected, "{cidr}");
        }
    }

    #[test]
    fn a_node_has_at_most_one_range_of_each_family() {
        let parse = |text: &str| text.parse::<IpNet>().unwrap();
        let (one, two) = (parse("10.0.0.0/24"), parse("10.1.0.0/24"));
        let mut pools = pools(&["10.2.0.0/24"]);
        assert_eq!(pools.serve(&[]), Err(InvalidCidr::Absent));
        assert_eq!(
            pools.serve(&[one, parse("fd00::/64"), two]),
            Err(InvalidCidr::SameFamily(one, two))
        );
        assert_eq!(pools.ranges(), [parse("10.2.0.0/24")], "as before");
    }

    #[test]
    fn both_families_or_none() {
        let mut pools = pools(&["fd00::/64", "10.0.0.0/30"]);
        assert_eq!(drain(&mut pools, 9), ["10.0.0.2", "fd00::2"]);
        assert_eq!(pools.next().unwrap_err().cidr.to_string(), "10.0.0.0/30");
    }

    proptest! {
        /// Against the plainest model: a list of free addresses, in the order in which they go.
        #[test]
        fn the_longest_freed_goes_first(steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 0..200)) {
            let mut pools = pools(&["10.0.0.0/28"]);
            let mut free: std::collections::VecDeque<IpAddr> =
                (2..15).map(|it| IpAddr::from([10, 0, 0, it])).collect();
            let mut used: Vec<IpAddr> = Vec::new();
            for (order, (lease, which)) in steps.into_iter().enumerate() {
                if lease {
                    let next = pools.next().ok().map(|it| it[0]);
                    prop_assert_eq!(next, free.front().copied());
                    if let Some(address) = next {
                        pools.take(address);
                        free.pop_front();
                        used.push(address);
                    }
                } else if !used.is_empty() {
                    let address = used.remove(which.index(used.len()));
                    prop_assert_eq!(pools.free(address, order as u64), None);
                    free.push_back(address);
                }
            }
        }
    }
}
