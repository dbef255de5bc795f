//! Flat tables mean what the oracle says, for every packet there is: as sets of ports, for every address that one of both can tell
//! from its neighbours.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;
use weir_agent::compile::PolicyRows;
use weir_agent::compile::policy::Direction;
use weir_agent::model::{ObjectName, PeerSelector, Peers};
use weir_common::policy::{
    Action, Class, PortKey, PortRow, RuleId, RulesId, VerdictKey, VerdictRow,
};
use weir_common::{Addr, Port, Prefix, Protocol};
use weir_tests::oracle::{Cluster, Party, Passing, WITH_PORTS, Who, enforced, received, sent};

use super::nouns::{Compiled, NODES, compiled, parties};
use super::random::{PROBES, Parts, cluster};
use super::walk::{Answer, cell, class, judge, side};

/// So many random clusters: more with `WEIR_POLICY_SETS`.
const SETS: u32 = 300;

/// What tables let through, as the datapath reads them, and what of that is only audited.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Read {
    allowed: Passing,
    audited: Passing,
}

impl Read {
    /// The same about every packet.
    fn always(is_allowed: bool, audit: RuleId) -> Self {
        let all = |is_so| match is_so {
            true => Passing::everything(),
            false => Passing::nothing(),
        };
        Self {
            allowed: all(is_allowed),
            audited: all(is_allowed && audit != RuleId::NONE),
        }
    }
}

fn of_tables(rows: &PolicyRows, rules: RulesId, class: Class) -> Read {
    if rules == RulesId::OPEN || class == Class::OWN_NODE {
        return Read::always(true, RuleId::NONE);
    }
    let row = |class| rows.verdicts.get(&VerdictKey { rules, class });
    let row = row(class).or_else(|| row(Class::WORLD));
    let row = row.expect("a row of every list for the world");
    match row.action {
        Action::ALLOW => Read::always(true, row.audit),
        Action::DENY | Action::END => Read::always(false, row.audit),
        Action::BY_PORT => by_port(rows, row.ports),
        other => panic!("{other:?} is no action"),
    }
}

/// A set of `PORTS`. The longest prefix decides, so longer ones come later. One of the set alone is about every protocol, also those
/// without ports, and without any there is a denial.
fn by_port(rows: &PolicyRows, set: u32) -> Read {
    let mut of_set: Vec<_> = rows.ports.iter().collect();
    of_set.retain(|(key, _)| key.set == set.to_be_bytes());
    of_set.sort_by_key(|(key, _)| key.prefix_len);
    let mut all = Read::always(false, RuleId::NONE);
    for (key, row) in of_set {
        let is_allowed = match row.action {
            Action::ALLOW => true,
            Action::DENY | Action::END => false,
            other => panic!("{other:?} is no action of a port"),
        };
        if key.prefix_len == PortKey::ANY_PROTOCOL {
            all = Read::always(is_allowed, row.audit);
            continue;
        }
        assert!(
            (PortKey::ANY_PORT..=PortKey::ONE_PORT).contains(&key.prefix_len)
                && WITH_PORTS.contains(&key.protocol),
            "{key:?} is about a part of a protocol, or of one without ports"
        );
        let free = PortKey::ONE_PORT - key.prefix_len;
        let inside = u16::MAX.checked_shr(16 - free).unwrap_or(0);
        let first = u16::from(key.port) & !inside;
        let ports = first..=first | inside;
        all.allowed.set(key.protocol, ports.clone(), is_allowed);
        let is_audited = is_allowed && row.audit != RuleId::NONE;
        all.audited.set(key.protocol, ports, is_audited);
    }
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
    let of_policies = cluster.policies.iter().flat_map(|policy| {
        let rules = policy.ingress.iter().chain(&policy.egress);
        rules.flatten()
    });
    let of_tiers = cluster.cluster_policies.iter().flat_map(|policy| {
        let rules = policy.ingress.iter().chain(&policy.egress);
        rules.map(|it| &it.rule)
    });
    for rule in of_policies.chain(of_tiers) {
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
    let all = enforced(cluster);
    let mut read: HashMap<(RulesId, Class), Read> = HashMap::new();
    let mut compared = 0;
    for subject in parties(cluster) {
        let Who::Pod(pod) = &subject.is else { continue };
        if pod.node.as_deref() != Some(node) {
            continue;
        }
        // The datapath lets a pod reach itself without asking.
        for peer in peers.iter().filter(|peer| peer.is != subject.is) {
            for direction in [Direction::Ingress, Direction::Egress] {
                let meant = |cluster| match direction {
                    Direction::Ingress => received(cluster, peer, &subject),
                    Direction::Egress => sent(cluster, &subject, peer),
                };
                let allowed = meant(cluster);
                let mut audited = allowed.clone();
                audited.remove(&meant(&all));
                let meant = Read { allowed, audited };
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

/// As the trie answers: the longest prefix, down to the set alone.
#[test]
fn a_set_of_ports_is_read_as_the_kernel_reads_it() {
    let set_alone = PortKey {
        prefix_len: PortKey::ANY_PROTOCOL,
        ..PortKey::exact(7, Protocol(0), Port::ABSENT)
    };
    let some = |protocol, port: u16, free| PortKey {
        prefix_len: PortKey::ONE_PORT - free,
        ..PortKey::exact(7, protocol, Port::from(port))
    };
    let tcp = Protocol::TCP;
    let (all, none) = (Passing::everything(), Passing::nothing());
    let with = |from: &Passing, changes: &[(Protocol, u16, u16, bool)]| {
        let mut passing = from.clone();
        for (protocol, first, last, is_allowed) in changes {
            passing.set(*protocol, *first..=*last, *is_allowed);
        }
        passing
    };
    let (yes, no) = (Action::ALLOW, Action::DENY);
    for (rows, expected) in [
        (vec![], none.clone()),
        (vec![(set_alone, yes)], all.clone()),
        (vec![(set_alone, no)], none.clone()),
        (
            vec![
                (set_alone, yes),
                (PortKey::exact(7, tcp, Port::from(80)), no),
            ],
            with(&all, &[(tcp, 80, 80, false)]),
        ),
        (
            vec![
                (PortKey::any(7, tcp), yes),
                (some(tcp, 80, 3), no),
                (some(tcp, 84, 1), yes),
            ],
            with(
                &none,
                &[
                    (tcp, 0, 65535, true),
                    (tcp, 80, 87, false),
                    (tcp, 84, 85, true),
                ],
            ),
        ),
        (
            vec![(set_alone, yes), (PortKey::any(7, Protocol::UDP), no)],
            with(&all, &[(Protocol::UDP, 0, 65535, false)]),
        ),
        // Of another set.
        (vec![(PortKey::any(8, tcp), yes)], none.clone()),
    ] {
        let rule = RuleId::NONE;
        let row = |action| PortRow {
            action,
            rule,
            ..PortRow::default()
        };
        let mut tables = PolicyRows::default();
        tables
            .ports
            .extend(rows.iter().map(|(key, action)| (*key, row(*action))));
        let verdict = VerdictKey {
            rules: RulesId(1),
            class: Class::WORLD,
        };
        let by_port = VerdictRow {
            action: Action::BY_PORT,
            ports: 7,
            ..VerdictRow::default()
        };
        tables.verdicts.insert(verdict, by_port);
        assert_eq!(
            of_tables(&tables, RulesId(1), Class::WORLD).allowed,
            expected,
            "{rows:?}"
        );
        // And so it is for single packets.
        for probe in PROBES.into_iter().chain([(tcp, 84), (tcp, 87), (tcp, 88)]) {
            let one = cell(&tables, RulesId(1), Class::WORLD, probe);
            assert_eq!(
                one.is_allowed(),
                expected.includes(probe.0, probe.1),
                "{rows:?} {probe:?}"
            );
        }
    }
}

fn sets() -> ProptestConfig {
    let number = std::env::var("WEIR_POLICY_SETS");
    let number = number.ok().and_then(|text| text.parse().ok());
    ProptestConfig::with_cases(number.unwrap_or(SETS))
}

proptest! {
    #![proptest_config(sets())]

    #[test]
    fn tables_mean_what_the_api_says(cluster in prop_oneof![cluster(Parts::Supported), cluster(Parts::Tiers)]) {
        for (node, _) in NODES {
            let compiled = compiled(&cluster, node);
            prop_assert!(compiled.reports().is_empty(), "{:?}", compiled.reports());
            compare(&cluster, node, &compiled)?;
        }
    }
    /// Also whom the tables name: as if there were nothing to audit.
    #[test]
    fn what_is_only_audited_changes_no_verdict(cluster in cluster(Parts::Tiers)) {
        let mut without = cluster.clone();
        without.policies.retain(|it| !it.is_audit);
        without.cluster_policies.retain(|it| !it.is_audit);
        for (node, _) in NODES {
            let [all, less] = [&cluster, &without].map(|it| compiled(it, node));
            let said = |compiled: &Compiled, subject: &ObjectName, peer: &Party, direction, probe| {
                let answer = judge(compiled.rows(), subject, direction, peer.address, probe);
                let (Answer::Allowed(rule) | Answer::Denied(rule)) = answer else {
                    panic!("{answer:?}")
                };
                (answer.is_allowed(), compiled.book().owner(rule).cloned())
            };
            for subject in all.rows().rules.keys() {
                for peer in peers(&cluster, all.rows()) {
                    for direction in [Direction::Ingress, Direction::Egress] {
                        for probe in PROBES {
                            prop_assert_eq!(
                                said(&all, subject, &peer, direction, probe),
                                said(&less, subject, &peer, direction, probe)
                            );
                        }
                    }
                }
            }
        }
    }
}
