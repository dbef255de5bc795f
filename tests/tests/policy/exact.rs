//! Flat tables mean what the oracle says, for every packet there is: as sets of ports, for every address that one of both can tell
//! from its neighbours.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;
use rangemap::RangeInclusiveSet;
use weir_agent::compile::PolicyRows;
use weir_agent::compile::policy::Direction;
use weir_agent::model::{PeerSelector, Peers};
use weir_common::policy::{Action, Class, PortKey, RulesId, VerdictKey};
use weir_common::{Addr, Prefix};
use weir_tests::oracle::{Cluster, Party, Passing, Who, received, sent};

use super::nouns::{Compiled, NODES, compiled, parties};
use super::random::{Parts, cluster};
use super::walk::{class, side};

/// So many random clusters: more with `WEIR_POLICY_SETS`.
const SETS: u32 = 300;

/// What tables let through, as the datapath reads them.
fn of_tables(rows: &PolicyRows, rules: RulesId, class: Class) -> Passing {
    if rules == RulesId::OPEN || class == Class::OWN_NODE {
        return Passing::Everything;
    }
    let row = |class| rows.verdicts.get(&VerdictKey { rules, class });
    let row = row(class).or_else(|| row(Class::WORLD));
    let row = row.expect("a row of every list for the world");
    match row.action {
        Action::ALLOW => Passing::Everything,
        Action::DENY => Passing::Only(BTreeMap::new()),
        Action::BY_PORT => Passing::Only(ports(rows, row.ports)),
        other => panic!("{other:?} is no action"),
    }
}

/// A set of ports. The longest prefix decides, so longer ones come later.
fn ports(rows: &PolicyRows, set: u32) -> BTreeMap<weir_common::Protocol, RangeInclusiveSet<u16>> {
    let mut of_set: Vec<_> = rows.ports.iter().collect();
    of_set.retain(|(key, _)| key.set == set.to_be_bytes());
    of_set.sort_by_key(|(key, _)| key.prefix_len);
    let mut all: BTreeMap<_, RangeInclusiveSet<u16>> = BTreeMap::new();
    for (key, row) in of_set {
        let free = PortKey::ONE_PORT - key.prefix_len;
        let first = u16::from(key.port);
        let last = first | u16::MAX.checked_shr(16 - free).unwrap_or(0);
        let ports = all.entry(key.protocol).or_default();
        match row.action {
            Action::ALLOW => ports.insert(first..=last),
            _ => ports.remove(first..=last),
        }
    }
    all.retain(|_, ports| !ports.is_empty());
    all
}

/// One address of each kind: everybody that there is, and wherever a block or a row of the tables begins, or ends before.
fn peers(cluster: &Cluster, rows: &PolicyRows) -> Vec<Party> {
    let mut all = parties(cluster);
    let known: BTreeSet<IpAddr> = all.iter().map(|it| it.address).collect();
    let number = |address: IpAddr| u128::from_be_bytes(Addr::from(address).0);
    let mut starts = BTreeSet::new();
    let mut range = |first: u128, last: u128| {
        starts.insert(first);
        starts.extend(last.checked_add(1));
    };
    for policy in &cluster.policies {
        for rule in policy.ingress.iter().chain(&policy.egress).flatten() {
            let Peers::Of(items) = &rule.peers else {
                continue;
            };
            for item in items {
                if let PeerSelector::Block(block) = item {
                    for net in block.except.iter().chain([&block.cidr]) {
                        range(number(net.network()), number(last(net)));
                    }
                }
            }
        }
    }
    for Prefix { prefix_len, addr } in rows.cidrs.keys() {
        let first = u128::from_be_bytes(addr.0);
        let inside = u128::MAX.checked_shr(*prefix_len).unwrap_or(0);
        range(first, first | inside);
    }
    let rows = rows.classes.keys().map(|addr| IpAddr::from(*addr));
    for address in known.iter().copied().chain(rows) {
        range(number(address), number(address));
    }
    let strangers = starts
        .into_iter()
        .map(|it| IpAddr::from(Addr(it.to_be_bytes())));
    all.extend(
        strangers
            .filter(|it| !known.contains(it))
            .map(|address| Party {
                address,
                is: Who::Outside,
            }),
    );
    all
}

fn last(net: &IpNet) -> IpAddr {
    net.broadcast()
}

/// Compares everything that there is. Says how many pairs of ends that were.
fn compare(cluster: &Cluster, node: &str, compiled: &Compiled) -> Result<usize, TestCaseError> {
    let rows = compiled.rows();
    let peers = peers(cluster, rows);
    let mut read: HashMap<(RulesId, Class), Passing> = HashMap::new();
    let mut compared = 0;
    for subject in parties(cluster) {
        let Who::Pod(pod) = &subject.is else { continue };
        if pod.node.as_deref() != Some(node) {
            continue;
        }
        // The datapath lets a pod reach itself without asking.
        for peer in peers.iter().filter(|peer| peer.is != subject.is) {
            for direction in [Direction::Ingress, Direction::Egress] {
                let meant = match direction {
                    Direction::Ingress => received(cluster, peer, &subject),
                    Direction::Egress => sent(cluster, &subject, peer),
                };
                let at = (
                    side(rows.rules[&pod.id], direction),
                    class(rows, peer.address),
                );
                let found = read
                    .entry(at)
                    .or_insert_with(|| of_tables(rows, at.0, at.1));
                prop_assert_eq!(
                    &*found,
                    &meant,
                    "{} of {:?} with {:?}",
                    direction,
                    subject,
                    peer
                );
                compared += 1;
            }
        }
    }
    Ok(compared)
}

fn sets() -> ProptestConfig {
    let number = std::env::var("WEIR_POLICY_SETS");
    let number = number.ok().and_then(|text| text.parse().ok());
    ProptestConfig::with_cases(number.unwrap_or(SETS))
}

proptest! {
    #![proptest_config(sets())]

    #[test]
    fn tables_mean_what_the_api_says(cluster in cluster(Parts::Supported)) {
        for (node, _) in NODES {
            let compiled = compiled(&cluster, node);
            prop_assert!(compiled.reports().is_empty(), "{:?}", compiled.reports());
            compare(&cluster, node, &compiled)?;
        }
    }
}
