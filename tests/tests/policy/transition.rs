//! On the way from one state to the next every packet is judged as before or as after.

use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::prelude::*;
use weir_agent::compile::PolicyRows;
use weir_agent::compile::policy::{Compiled, Direction, compile};
use weir_agent::model::{ClusterPolicy, ObjectName, Pod, Policy};
use weir_common::policy::{Class, RulesId, VerdictKey};
use weir_tests::oracle::Cluster;

use super::nouns::{
    DNS, OUTSIDE, ip, labels, name, only, parties, pod, pods, policy, select, snapshot, view,
};
use super::random::{PROBES, Parts, cluster};
use super::walk::{Answer, cell, class, side};

/// Two states, and the tables on the way.
struct Way {
    old: Compiled,
    new: Compiled,
    /// Verdicts, ports and the classes of the middle.
    middle: PolicyRows,
}

impl Way {
    fn between(before: &Cluster, after: &Cluster, hash_bits: u32) -> Self {
        let none = Compiled::with_hash_bits(hash_bits);
        let old = compile(&snapshot(before), &view("n1"), &[], &none);
        let new = compile(&snapshot(after), &view("n1"), &[], &old);
        let transition = new.transition_from(&old);
        Self {
            old,
            new,
            middle: PolicyRows {
                classes: transition.classes,
                cidrs: transition.cidrs,
                verdicts: transition.verdicts,
                ports: transition.ports,
                rules: Default::default(),
            },
        }
    }

    /// The pairs of rules of a pod and class of a peer that can meet, in every state on the way.
    fn meetings(
        &self,
        pod: &ObjectName,
        direction: Direction,
        peer: IpAddr,
    ) -> BTreeSet<(RulesId, Class)> {
        let rules = |of: &Compiled| of.rows().rules.get(pod).map(|r| side(*r, direction));
        let (old_rules, new_rules) = (rules(&self.old), rules(&self.new));
        let old_class = class(self.old.rows(), peer);
        let middle = class(&self.middle, peer);
        let new_class = class(self.new.rows(), peer);
        // Step 2 changes classes under old rules, step 3 rules in the middle, step 4 classes again.
        let under_old = old_rules
            .into_iter()
            .flat_map(|r| [(r, old_class), (r, middle)]);
        let under_new = new_rules
            .into_iter()
            .flat_map(|r| [(r, middle), (r, new_class)]);
        under_old.chain(under_new).collect()
    }

    /// Does the pod come to rules that others leave, or leave rules that others come to? Then the rules
    /// may say no for a moment, since no row can be right for both.
    fn is_crossed(&self, pod: &ObjectName, direction: Direction) -> bool {
        let of = |compiled: &Compiled, pod: &ObjectName| {
            compiled.rows().rules.get(pod).map(|r| side(*r, direction))
        };
        let (from, to) = (of(&self.old, pod), of(&self.new, pod));
        let pods = self
            .old
            .rows()
            .rules
            .keys()
            .chain(self.new.rows().rules.keys());
        let mut moves = pods
            .map(|other| (of(&self.old, other), of(&self.new, other)))
            .filter(|(from, to)| from != to);
        from != to && moves.any(|(others_from, others_to)| others_to == from || others_from == to)
    }
}

/// `after`, where the coins say so, and otherwise `before`.
fn mixed(before: &Cluster, after: &Cluster, coins: &[bool]) -> Cluster {
    let mut coins = coins.iter().copied().cycle();
    let mut toss = move || coins.next().unwrap_or(true);
    let mut pick =
        |old: usize, new: usize| -> Vec<bool> { (0..old.max(new)).map(|_| toss()).collect() };
    macro_rules! mix {
        ($field:ident, $key:expr) => {{
            let coins = pick(before.$field.len(), after.$field.len());
            let old = before.$field.iter().enumerate().filter(|(i, _)| !coins[*i]);
            let new = after.$field.iter().enumerate().filter(|(i, _)| coins[*i]);
            let mut mixed: Vec<_> = old.chain(new).map(|(_, item)| item.clone()).collect();
            let mut seen = BTreeSet::new();
            mixed.retain(|item| seen.insert($key(item)));
            mixed
        }};
    }
    Cluster {
        namespaces: after.namespaces.clone(),
        pods: mix!(pods, |pod: &Pod| pod.addresses.clone()),
        policies: mix!(policies, |policy: &Policy| policy.id.clone()),
        cluster_policies: mix!(cluster_policies, |policy: &ClusterPolicy| policy
            .name
            .clone()),
    }
}

fn check(way: &Way, peers: &BTreeSet<IpAddr>) {
    let pods: BTreeSet<&ObjectName> = way
        .old
        .rows()
        .rules
        .keys()
        .chain(way.new.rows().rules.keys())
        .collect();
    for pod in pods {
        for direction in [Direction::Ingress, Direction::Egress] {
            let crossed = way.is_crossed(pod, direction);
            for &peer in peers {
                for probe in PROBES {
                    let final_answer = |of: &Compiled| {
                        let rules = side(*of.rows().rules.get(pod)?, direction);
                        Some(cell(of.rows(), rules, class(of.rows(), peer), probe).is_allowed())
                    };
                    let states = [final_answer(&way.old), final_answer(&way.new)];
                    let before_or_after: BTreeSet<bool> = states.into_iter().flatten().collect();
                    for (rules, class) in way.meetings(pod, direction, peer) {
                        let answer = cell(&way.middle, rules, class, probe);
                        let closed = crossed && answer != Answer::Missing && !answer.is_allowed();
                        assert!(
                            answer != Answer::Missing
                                && (closed || before_or_after.contains(&answer.is_allowed())),
                            "{answer:?} is neither of {states:?}: {pod} {direction} {peer} {probe:?} \
                             with {rules:?} and {class:?}"
                        );
                    }
                }
            }
        }
    }
}

/// Whatever the order of writes, there is a row.
fn has_every_row(way: &Way) {
    let rules = |of: &Compiled| -> Vec<RulesId> {
        let sides = of.rows().rules.values().flat_map(|r| [r.ingress, r.egress]);
        sides.filter(|rules| *rules != RulesId::OPEN).collect()
    };
    let classes = |rows: &PolicyRows| -> BTreeSet<Class> {
        let all = rows.classes.values().chain(rows.cidrs.values());
        let all = all.copied().chain([Class::WORLD]);
        all.filter(|class| *class != Class::OWN_NODE).collect()
    };
    let classes: BTreeSet<Class> = [way.old.rows(), way.new.rows(), &way.middle]
        .into_iter()
        .flat_map(classes)
        .collect();
    for rules in rules(&way.old).into_iter().chain(rules(&way.new)) {
        for &class in &classes {
            let key = VerdictKey { rules, class };
            assert!(way.middle.verdicts.contains_key(&key), "{key:?} has no row");
        }
    }
}

/// A row that both states have says the same in both.
fn rows_keep_their_meaning(way: &Way) {
    for of in [way.old.rows(), way.new.rows()] {
        for (key, row) in &of.verdicts {
            assert_eq!(way.middle.verdicts.get(key), Some(row), "{key:?}");
        }
        for (key, row) in &of.ports {
            assert_eq!(way.middle.ports.get(key), Some(row), "{key:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_packet_on_the_way_is_judged_as_before_or_as_after(
        before in cluster(Parts::Supported),
        after in cluster(Parts::Supported),
        coins in prop::collection::vec(any::<bool>(), 12),
        hash_bits in prop_oneof![Just(32_u32), Just(2)],
    ) {
        let after = mixed(&before, &after, &coins);
        let way = Way::between(&before, &after, hash_bits);
        let peers = parties(&before).into_iter().chain(parties(&after)).map(|p| p.address);
        let peers = peers.chain(DNS.map(ip)).chain(OUTSIDE.map(ip)).collect();
        rows_keep_their_meaning(&way);
        has_every_row(&way);
        check(&way, &peers);
    }
}

#[test]
fn nothing_moves_when_nothing_changes() {
    let cluster = super::cases::shop();
    let way = Way::between(&cluster, &cluster, 32);
    assert_eq!(&way.middle.verdicts, &way.new.rows().verdicts);
    assert_eq!(&way.middle.ports, &way.new.rows().ports);
    assert_eq!(&way.middle.classes, &way.new.rows().classes);
    assert_eq!(&way.middle.cidrs, &way.new.rows().cidrs);
}

/// The rules of one pod become another's, and the peer that both meet changes too: what the rules said
/// of the old peer is for the pod that leaves, not for the one that comes.
#[test]
fn a_pod_that_comes_to_rules_is_not_given_what_they_used_to_allow() {
    let mut before = super::cases::shop();
    let from_web = vec![only(vec![pods(select("app=web"))])];
    before.policies = vec![
        policy("shop/db", select("app=db"), Some(from_web), None),
        policy("shop/back", select("app=back"), Some(vec![]), None),
    ];
    before.pods.push(pod("shop/back", "app=back", 5));
    let mut after = before.clone();
    let relabel = |pod: &mut Pod| {
        pod.labels = match &*pod.id.name {
            "db" => labels("app=back"),
            "back" => labels("app=db"),
            _ => labels("app=stranger"),
        }
    };
    after.pods.iter_mut().for_each(relabel);
    let way = Way::between(&before, &after, 32);
    let web = ip("10.0.0.1");
    assert!(way.is_crossed(&name("shop/back"), Direction::Ingress));
    assert_ne!(class(&way.middle, web), class(way.old.rows(), web));
    check(&way, &BTreeSet::from([web]));
}
