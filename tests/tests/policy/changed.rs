//! What a change is said to open and close is the difference of what the oracle allows before and after, as sets, for every pair of ends.

use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;
use weir_agent::explain::diff::{Diff, Row};
use weir_common::Protocol;
use weir_tests::oracle::{Cluster, Party, Passing, Who, received, sent};

use super::cases::shop_with;
use super::nouns::{DNS, NODES, ip, only, parties, pods, policy, select, snapshot};
use super::random::{CIDRS, Parts, cluster};

fn diff(before: &Cluster, after: &Cluster) -> Diff {
    Diff::of(&snapshot(before), &snapshot(after), &DNS.map(ip))
}

/// As people read it: `10.0.0.0/8 except 10.1.0.0/16 and 10.2.0.0/16`.
fn is_in(address: IpAddr, text: &str) -> bool {
    let text = text.replace("the world (IPv4)", "0.0.0.0/0");
    let text = text.replace("the world (IPv6)", "::/0");
    let (net, except) = text.split_once(" except ").unwrap_or((&text, ""));
    let is_in = |net: &str| net.parse::<IpNet>().unwrap().contains(&address);
    is_in(net) && !except.split(" and ").filter(|it| !it.is_empty()).any(is_in)
}

fn is_meant(party: &Party, members: &[String]) -> bool {
    members.iter().any(|member| match &party.is {
        Who::Pod(_) if DNS.contains(&&*party.address.to_string()) => {
            *member == format!("the node's DNS {}", party.address)
        }
        Who::Pod(pod) => *member == pod.id.to_string(),
        Who::Outside => {
            member.contains('/') | member.starts_with("the world")
                && (member.starts_with("the world")
                    || member
                        .split(' ')
                        .next()
                        .is_some_and(|net| net.parse::<IpNet>().is_ok()))
                && is_in(party.address, member)
        }
        Who::Node(_) => false,
    })
}

/// The set that words such as `TCP 80 8080-9000` stand for.
fn passing(words: &[String]) -> Passing {
    let mut all = Passing::nothing();
    for word in words {
        let (first, rest) = word.split_once(' ').unwrap_or((word, ""));
        let protocol = match first {
            "everything" => return Passing::everything(),
            "ICMP" => {
                all.others = true;
                continue;
            }
            "TCP" => Protocol::TCP,
            "UDP" => Protocol::UDP,
            "SCTP" => Protocol::SCTP,
            other => panic!("{other}"),
        };
        if rest == "(every port)" {
            all.set(protocol, 0..=u16::MAX, true);
            continue;
        }
        for range in rest.split(' ') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            all.set(
                protocol,
                first.parse().unwrap()..=last.parse().unwrap(),
                true,
            );
        }
    }
    all
}

/// Both ends.
fn both(cluster: &Cluster, from: &Party, to: &Party) -> Passing {
    let receives = match &to.is {
        Who::Pod(_) if DNS.contains(&&*to.address.to_string()) => Passing::everything(),
        _ => received(cluster, from, to),
    };
    let sends = match &from.is {
        Who::Pod(_) if DNS.contains(&&*from.address.to_string()) => Passing::everything(),
        _ => sent(cluster, from, to),
    };
    sends.and(&receives)
}

fn without(all: &Passing, some: &Passing) -> Passing {
    let mut left = all.clone();
    left.remove(some);
    left
}

/// Everybody but nodes, and addresses at the edges of blocks.
fn ends(cluster: &Cluster) -> Vec<Party> {
    let mut all = parties(cluster);
    let nodes = NODES.iter().flat_map(|(_, ips)| ips.map(ip));
    let known: Vec<IpAddr> = all.iter().map(|it| it.address).chain(nodes).collect();
    all.retain(|it| !matches!(it.is, Who::Node(_)));
    for net in CIDRS.map(|it| it.parse::<IpNet>().unwrap()) {
        for address in [net.network(), net.broadcast()] {
            if !known.contains(&address) {
                all.push(Party {
                    address,
                    is: Who::Outside,
                });
            }
        }
    }
    all
}

fn check(before: &Cluster, after: &Cluster) -> Result<usize, TestCaseError> {
    let diff = diff(before, after);
    let ends = ends(before);
    let mut changed = 0;
    for from in &ends {
        for to in &ends {
            let of_one_family = from.address.is_ipv4() == to.address.is_ipv4();
            if !of_one_family || from.is == to.is && from.is != Who::Outside {
                continue;
            }
            let family = if from.address.is_ipv4() {
                "IPv4"
            } else {
                "IPv6"
            };
            let is_about = |row: &&Row| {
                row.families.iter().any(|it| it == family)
                    && is_meant(from, &row.from)
                    && is_meant(to, &row.to)
            };
            let rows: Vec<&Row> = diff.changes.iter().filter(is_about).collect();
            prop_assert!(
                rows.len() <= 1,
                "said twice of {:?} {:?}: {:?}",
                from,
                to,
                rows
            );
            let said = rows
                .first()
                .map(|row| (passing(&row.opened), passing(&row.closed)));
            let said = said.unwrap_or((Passing::nothing(), Passing::nothing()));
            let [old, new] = [before, after].map(|it| both(it, from, to));
            let meant = (without(&new, &old), without(&old, &new));
            prop_assert_eq!(&said, &meant, "{:?} -> {:?}\n{}", from, to, diff.table());
            changed += usize::from(meant != (Passing::nothing(), Passing::nothing()));
        }
    }
    Ok(changed)
}

fn of_parts() -> impl Strategy<Value = Cluster> {
    prop_oneof![cluster(Parts::Supported), cluster(Parts::Tiers)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_said_to_change_is_what_changes(before in of_parts(), other in of_parts()) {
        let after = Cluster {
            pods: before.pods.clone(),
            ..other
        };
        check(&before, &after)?;
        check(&before, &before)?;
    }
}

#[test]
fn a_change_is_said_once_for_all_that_it_is_about() {
    let before = shop_with(Vec::new());
    let rule = only(vec![pods(select("app=web"))]);
    let after = shop_with(vec![policy(
        "shop/p",
        select("app=db"),
        Some(vec![rule]),
        None,
    )]);
    let table = diff(&before, &after).table();
    assert_eq!(
        table,
        "blog/db, blog/web, the node's DNS 169.254.20.10, the node's DNS fd02::10, the world (IPv4), the world (IPv6)\n  \
         -> shop/db\n     closes everything\n1 change between 4 pods and the world\n"
    );
    assert!(check(&before, &after).unwrap() > 0);
}
