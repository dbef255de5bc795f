//! Addresses by the blocks (`ipBlock`) that they are in. Each region is what is left of a prefix when the regions inside of it are taken
//! away, so the longest prefix finds it. What a class is made of is in `class`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::predicate::Block;

/// Disjoint regions, and something about each. Addresses outside of all are in no block.
#[derive(Clone, Debug)]
pub(super) struct Regions<T>(Vec<Region<T>>);

#[derive(Clone, Debug)]
struct Region<T> {
    net: IpNet,
    /// The position of the smallest region around it.
    around: Option<usize>,
    about: T,
}

impl<T> Default for Regions<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl Regions<Arc<[usize]>> {
    /// The regions that blocks make, each with the blocks that it is in: their numbers, in order.
    pub(super) fn of<'a>(blocks: impl Iterator<Item = (usize, &'a Block)>) -> Self {
        #[derive(Default)]
        struct Edge {
            entered: Vec<usize>,
            left: Vec<usize>,
        }
        let mut edges: BTreeMap<IpNet, Edge> = BTreeMap::new();
        for (number, block) in blocks {
            edges.entry(block.cidr).or_default().entered.push(number);
            for except in &block.except {
                edges.entry(*except).or_default().left.push(number);
            }
        }
        // In this order what lies around something comes before it.
        let mut regions: Vec<Region<Arc<[usize]>>> = Vec::new();
        let mut around: Vec<usize> = Vec::new();
        for (net, Edge { entered, left }) in edges {
            while around
                .last()
                .is_some_and(|it| !regions[*it].net.contains(&net))
            {
                around.pop();
            }
            let outer: &[usize] = around.last().map_or(&[], |it| &regions[*it].about);
            let mut numbers: BTreeSet<usize> = outer.iter().copied().chain(entered).collect();
            for number in left {
                numbers.remove(&number);
            }
            let is_as_outer = numbers.iter().eq(outer);
            if is_as_outer {
                continue;
            }
            regions.push(Region {
                net,
                around: around.last().copied(),
                about: numbers.into_iter().collect(),
            });
            around.push(regions.len() - 1);
        }
        Self(regions)
    }
}

impl<T> Regions<T> {
    /// What is said about the region that an address is in.
    pub(super) fn at(&self, address: IpAddr) -> Option<&T> {
        self.around(&IpNet::from(address))
    }

    /// What is said about the smallest region around a prefix, or of just that prefix.
    pub(super) fn around(&self, net: &IpNet) -> Option<&T> {
        // Whatever contains the prefix contains the last region that begins no later, or is that one.
        let mut candidate = self.0.partition_point(|it| it.net <= *net).checked_sub(1);
        while let Some(region) = candidate.and_then(|it| self.0.get(it)) {
            if region.net.contains(net) {
                return Some(&region.about);
            }
            candidate = region.around;
        }
        None
    }

    /// Does one begin with just this prefix?
    pub(super) fn has(&self, net: &IpNet) -> bool {
        self.0.binary_search_by(|it| it.net.cmp(net)).is_ok()
    }

    /// The prefixes of all, in order.
    pub(super) fn nets(&self) -> impl Iterator<Item = IpNet> {
        self.0.iter().map(|region| region.net)
    }

    /// Do both say the same about the same regions?
    pub(super) fn is_like(&self, other: &Self) -> bool
    where
        T: PartialEq,
    {
        self.iter().eq(other.iter())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&IpNet, &T)> {
        self.0.iter().map(|region| (&region.net, &region.about))
    }

    /// The same regions, and something else about each.
    pub(super) fn map<U>(&self, about: impl Fn(&T) -> U) -> Regions<U> {
        let of = |region: &Region<T>| Region {
            net: region.net,
            around: region.around,
            about: about(&region.about),
        };
        Regions(self.0.iter().map(of).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(all: &[&str]) -> Vec<IpNet> {
        all.iter().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn an_address_is_in_the_blocks_that_contain_it_and_do_not_except_it() {
        let blocks: Vec<Block> = [
            ("0.0.0.0/0", &["10.0.0.0/8"][..]),
            ("10.0.0.0/8", &["10.1.0.0/16", "10.1.2.0/24", "10.3.0.0/16"]),
            ("10.1.2.0/24", &[]),
            ("10.1.2.0/24", &["10.1.2.0/24"]),
            ("::/0", &["2001:db8::/32"]),
            ("2001:db8:1::/48", &[]),
        ]
        .iter()
        .map(|(cidr, except)| Block::of(cidr.parse().unwrap(), &nets(except)))
        .collect();
        let regions = Regions::of(blocks.iter().enumerate());
        for (address, expected) in [
            ("9.255.255.255", &[0][..]),
            ("10.0.0.0", &[1]),
            ("10.1.1.255", &[]),
            ("10.1.2.0", &[2]),
            ("10.1.2.255", &[2]),
            ("10.1.3.0", &[]),
            ("10.2.0.0", &[1]),
            ("10.3.9.9", &[]),
            ("10.255.255.255", &[1]),
            ("11.0.0.0", &[0]),
            ("255.255.255.255", &[0]),
            ("::1", &[4]),
            ("2001:db8::1", &[]),
            ("2001:db8:1::1", &[5]),
            ("2001:db9::", &[4]),
        ] {
            let found = regions.at(address.parse().unwrap());
            assert_eq!(found.map_or(&[][..], |it| it), expected, "{address}");
        }
    }

    #[test]
    fn a_region_that_says_nothing_new_is_none() {
        let blocks = [
            Block::of("10.0.0.0/8".parse().unwrap(), &nets(&["10.1.0.0/16"])),
            Block::of("10.1.0.0/16".parse().unwrap(), &nets(&["10.1.0.0/16"])),
        ];
        let regions = Regions::of(blocks.iter().enumerate());
        let found: Vec<_> = regions.iter().map(|(net, _)| net.to_string()).collect();
        assert_eq!(found, ["10.0.0.0/8", "10.1.0.0/16"]);
    }
}
