//! Random ClusterNetworkPolicies, and that all of their parts occur and mean something.

use proptest::prelude::*;
use proptest::sample::select as one_of;
use weir_agent::model::{
    Block, ClusterPolicy, ClusterRule, PeerSelector, Peers, PodPeers, PortMatch, PortRange, Ports,
    Rule, RuleAction, Tier,
};
use weir_common::Protocol;

use super::random::{CIDRS, NAMESPACE_LABELS, POD_LABELS, protocol, selector};

/// One of its number, if at all, in the nouns that the conversion makes.
pub(super) fn policy(number: u8) -> impl Strategy<Value = Option<ClusterPolicy>> {
    // Few, so that some are equal.
    let priority = one_of(vec![0_u16, 1000]);
    let tier = one_of(vec![Tier::Admin, Tier::Baseline]);
    let rules = |with_blocks| prop::collection::vec(rule(with_blocks), 0..4);
    let rest = (
        tier,
        priority,
        pods(),
        rules(false),
        rules(true),
        prop::bool::weighted(0.2),
    );
    let policy = rest.prop_map(
        move |(tier, priority, subject, ingress, egress, is_audit)| ClusterPolicy {
            name: format!("cnp{number}").into(),
            tier,
            priority,
            subject,
            ingress,
            egress,
            is_audit,
            is_stand_in: false,
        },
    );
    prop::option::weighted(0.8, policy)
}

fn rule(with_blocks: bool) -> impl Strategy<Value = ClusterRule> {
    let action = one_of(vec![RuleAction::Accept, RuleAction::Deny, RuleAction::Pass]);
    let open =
        (action, peers(with_blocks), any::<bool>()).prop_flat_map(|(action, peers, has_ports)| {
            // Networks have no names of ports.
            let may_name = !peers.iter().any(|it| matches!(it, PeerSelector::Block(_)));
            let peers = Peers::Of(peers);
            let ports = if has_ports {
                ports(may_name).boxed()
            } else {
                Just(Ports::Any).boxed()
            };
            ports.prop_map(move |ports| (action, peers.clone(), ports))
        });
    // As the conversion closes what it does not understand.
    let closed = one_of(vec![
        (
            RuleAction::Accept,
            Peers::Of(vec![PeerSelector::Unsupported("planets".into())]),
            Ports::Any,
        ),
        (RuleAction::Deny, Peers::Any, Ports::Any),
    ]);
    prop_oneof![15 => open, 1 => closed].prop_map(|(action, peers, ports)| ClusterRule {
        name: None,
        action,
        rule: Rule { peers, ports },
    })
}

/// `namespaces` is `pods` with a selector of all pods.
fn pods() -> impl Strategy<Value = PodPeers> {
    let namespaces = selector(&NAMESPACE_LABELS, 1);
    (namespaces, selector(&POD_LABELS, 1)).prop_map(|(namespaces, pods)| PodPeers {
        namespaces: Some(namespaces),
        pods,
    })
}

fn peers(with_blocks: bool) -> impl Strategy<Value = Vec<PeerSelector>> {
    let pods = pods().prop_map(PeerSelector::Pods);
    let block = one_of(&CIDRS[..]).prop_map(|cidr| {
        PeerSelector::Block(Block {
            cidr: cidr.parse().unwrap(),
            except: Vec::new(),
        })
    });
    let peer = if with_blocks {
        prop_oneof![2 => pods, 1 => block].boxed()
    } else {
        pods.boxed()
    };
    prop::collection::vec(peer, 1..3)
}

fn ports(may_name: bool) -> impl Strategy<Value = Ports> {
    let range = prop_oneof![
        4 => (one_of(vec![1_u16, 53, 79, 80, 81]), 0_u16..3).prop_map(|(first, more)| (first, first + more)),
        1 => Just((81, 65535)),
        1 => Just((1, 65535)),
    ];
    let numbers = (protocol(), range).prop_map(|(protocol, (first, last))| {
        let port = PortRange::Numbers { first, last };
        vec![PortMatch { protocol, port }]
    });
    let named = one_of(vec!["http", "dns"]).prop_map(|name| {
        let of = |protocol| PortMatch {
            protocol,
            port: PortRange::Named(name.into()),
        };
        vec![of(Protocol::TCP), of(Protocol::UDP), of(Protocol::SCTP)]
    });
    let item = if may_name {
        prop_oneof![3 => numbers, 1 => named].boxed()
    } else {
        numbers.boxed()
    };
    prop::collection::vec(item, 1..3).prop_map(|items| Ports::Of(items.concat()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::strategy::ValueTree;
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
    use weir_tests::oracle::{Cluster, Passing, Who, received, sent};

    use super::super::nouns::parties;
    use super::super::random::{Parts, cluster};
    use super::*;

    /// The same clusters in every run.
    fn some(count: usize) -> Vec<Cluster> {
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let clusters = cluster(Parts::Tiers);
        let one = |_| clusters.new_tree(&mut runner).unwrap().current();
        (0..count).map(one).collect()
    }

    /// What the oracle says of every pair of ends.
    fn meaning(cluster: &Cluster) -> Vec<Passing> {
        let parties = parties(cluster);
        let mut all = Vec::new();
        for subject in &parties {
            if !matches!(&subject.is, Who::Pod(pod) if pod.node.is_some()) {
                continue;
            }
            for peer in &parties {
                all.push(sent(cluster, subject, peer));
                all.push(received(cluster, peer, subject));
            }
        }
        all
    }

    fn rules(cluster: &mut Cluster) -> impl Iterator<Item = &mut ClusterRule> {
        cluster
            .cluster_policies
            .iter_mut()
            .flat_map(|it| it.ingress.iter_mut().chain(&mut it.egress))
    }

    #[test]
    fn every_part_of_a_cluster_policy_occurs() {
        let mut found: BTreeMap<String, usize> = BTreeMap::new();
        let mut count = |what: String| *found.entry(what).or_default() += 1;
        for cluster in some(300) {
            let policies = &cluster.cluster_policies;
            for (i, policy) in policies.iter().enumerate() {
                let same =
                    |it: &&ClusterPolicy| (it.tier, it.priority) == (policy.tier, policy.priority);
                if policies[..i].iter().any(|it| same(&it)) {
                    count(format!("equal priority in {:?}", policy.tier));
                }
                for (direction, rules) in [("in", &policy.ingress), ("out", &policy.egress)] {
                    if rules.is_empty() {
                        count(format!("no rule {direction}"));
                    }
                    for it in rules {
                        count(format!("{:?} {:?} {direction}", policy.tier, it.action));
                        let peers = match &it.rule.peers {
                            Peers::Any => "any".to_owned(),
                            Peers::Of(peers) => {
                                let kinds = peers.iter().map(|it| match it {
                                    PeerSelector::Pods(_) => "pods",
                                    PeerSelector::Block(_) => "block",
                                    PeerSelector::Unsupported(_) => "unsupported",
                                });
                                kinds
                                    .collect::<std::collections::BTreeSet<_>>()
                                    .into_iter()
                                    .collect::<Vec<_>>()
                                    .join("+")
                            }
                        };
                        count(format!("{:?} of {peers} {direction}", it.action));
                        let Ports::Of(ports) = &it.rule.ports else {
                            count("no ports".to_owned());
                            continue;
                        };
                        for port in ports {
                            let what = match &port.port {
                                PortRange::Any => "any",
                                PortRange::Numbers { .. } => "numbers",
                                PortRange::Named(_) => "named",
                            };
                            count(format!("{what} of {}", port.protocol.0));
                        }
                    }
                }
            }
        }
        let mut expected = vec!["no ports".to_owned()];
        for tier in ["Admin", "Baseline"] {
            expected.push(format!("equal priority in {tier}"));
        }
        for direction in ["in", "out"] {
            expected.push(format!("no rule {direction}"));
            expected.push(format!("Accept of unsupported {direction}"));
            expected.push(format!("Deny of any {direction}"));
            for action in ["Accept", "Deny", "Pass"] {
                for tier in ["Admin", "Baseline"] {
                    expected.push(format!("{tier} {action} {direction}"));
                }
                expected.push(format!("{action} of pods {direction}"));
            }
        }
        for action in ["Accept", "Deny", "Pass"] {
            expected.push(format!("{action} of block out"));
            expected.push(format!("{action} of block+pods out"));
        }
        for protocol in [6, 17, 132] {
            expected.push(format!("numbers of {protocol}"));
            expected.push(format!("named of {protocol}"));
        }
        expected.sort();
        let seen: Vec<String> = found.keys().cloned().collect();
        // Nothing that the conversion would not make, and everything often enough.
        assert_eq!(seen, expected);
        for (what, times) in &found {
            assert!(*times >= 5, "{what}: {times}; {found:#?}");
        }
    }

    /// A comparison with the oracle sees a compiler that forgets any of these.
    #[test]
    fn every_part_of_a_cluster_policy_decides_something_somewhere() {
        type Change = fn(&mut Cluster);
        let without: [(&str, Change); 8] = [
            ("the Admin tier", |it| {
                it.cluster_policies.retain(|it| it.tier != Tier::Admin);
            }),
            ("the Baseline tier", |it| {
                it.cluster_policies.retain(|it| it.tier != Tier::Baseline);
            }),
            ("that Baseline comes after NetworkPolicies", |it| {
                it.cluster_policies
                    .iter_mut()
                    .for_each(|it| it.tier = Tier::Admin);
            }),
            ("NetworkPolicies below tiers", |it| it.policies.clear()),
            ("that Pass is no Accept", |it| {
                rules(it)
                    .filter(|it| it.action == RuleAction::Pass)
                    .for_each(|it| it.action = RuleAction::Accept);
            }),
            ("Pass at all", |it| {
                for policy in &mut it.cluster_policies {
                    policy.ingress.retain(|it| it.action != RuleAction::Pass);
                    policy.egress.retain(|it| it.action != RuleAction::Pass);
                }
            }),
            ("priorities", |it| {
                it.cluster_policies
                    .iter_mut()
                    .for_each(|it| it.priority = 0);
            }),
            ("the order of names", |it| {
                let names: Vec<_> = it
                    .cluster_policies
                    .iter()
                    .map(|it| it.name.clone())
                    .collect();
                let renamed = it.cluster_policies.iter_mut().zip(names.into_iter().rev());
                renamed.for_each(|(it, name)| it.name = name);
            }),
        ];
        let clusters = some(100);
        let meanings: Vec<_> = clusters.iter().map(meaning).collect();
        for (what, change) in without {
            let differs = |(cluster, before): &(&Cluster, &Vec<Passing>)| {
                let mut changed = (*cluster).clone();
                change(&mut changed);
                meaning(&changed) != **before
            };
            let found = clusters.iter().zip(&meanings).filter(differs).count();
            println!(
                "without {what}: {found} of {} clusters mean something else",
                clusters.len()
            );
            assert!(
                found >= 2,
                "{what} decides in {found} of {} clusters",
                clusters.len()
            );
        }
    }
}
