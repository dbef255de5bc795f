//! On the way from one state to the next every packet between two ends is judged as before, or as after, or something between: none
//! passes that neither state lets pass, and none is dropped that both do. After every single write, in any order that the steps
//! leave open.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proptest::prelude::*;
use weir_agent::compile::policy::{Compiler, Direction, Step};
use weir_agent::compile::{PodRules, PolicyRows};
use weir_agent::model::{ClusterPolicy, ObjectName, Pod, Policy, Snapshot};
use weir_common::policy::{PortKey, RulesId};
use weir_common::{Addr, Protocol};
use weir_tests::oracle::{Cluster, Party, Who};

use super::nouns::{
    DNS, OUTSIDE, compiler, ip, labels, namespace, only, parties, pod, pods, pods_in, policy,
    select, snapshot, touched, view,
};
use super::random::{Parts, cluster};
use super::walk::{Answer, cell, class, side};

/// Packets, one of each kind that some set of ports tells apart, and whether they pass.
type Packets = Vec<bool>;

/// Two states, and the steps between.
struct Way {
    old: PolicyRows,
    new: PolicyRows,
    steps: Vec<Step>,
    /// Where the ends are in the old or in the new state: an address, and the pod of this node that is there in each.
    ends: Vec<End>,
    kinds: Vec<(Protocol, u16)>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct End {
    address: IpAddr,
    /// Of this node, before and after; the same one, or it is not asked about.
    pod: Option<ObjectName>,
}

impl Way {
    fn between(before: &Cluster, after: &Cluster, hash_bits: u32) -> Self {
        let (first, second) = (snapshot(before), snapshot(after));
        let mut compiler = compiler(&first, "n1", hash_bits);
        Self::on(&mut compiler, (before, &first), (after, &second))
    }

    fn on(
        compiler: &mut Compiler,
        (before, first): (&Cluster, &Snapshot),
        (after, second): (&Cluster, &Snapshot),
    ) -> Self {
        let old = compiler.rows();
        compiler.update(&touched(first, second), second, &view("n1"));
        let steps = compiler.plan();
        compiler.commit();
        let new = compiler.rows();
        let ends = ends(before, after);
        let mut ports: Vec<PortKey> = old.ports.keys().chain(new.ports.keys()).copied().collect();
        ports.extend(steps.iter().flat_map(|step| step.ports.keys().copied()));
        Self {
            old,
            new,
            steps,
            ends,
            kinds: kinds(&ports),
        }
    }

    /// What passes from one end to another.
    fn packets(&self, rows: &PolicyRows, from: &End, to: &End, known: &mut Known) -> Packets {
        let mut side = |end: &End, direction, peer: &End| -> Packets {
            let Some(pod) = &end.pod else {
                return vec![true; self.kinds.len()];
            };
            let Some(rules) = rows.rules.get(pod) else {
                return vec![false; self.kinds.len()];
            };
            let rules = side(*rules, direction);
            let class = class(rows, peer.address);
            let of = |kind: &(Protocol, u16)| match cell(rows, rules, class, *kind) {
                Answer::Missing => panic!("{rules:?} has no row for {class:?}, nor for the world"),
                answer => answer.is_allowed(),
            };
            let all = || self.kinds.iter().map(of).collect();
            known.0.entry((rules, class.0)).or_insert_with(all).clone()
        };
        let sent = side(from, Direction::Egress, to);
        let received = side(to, Direction::Ingress, from);
        sent.iter().zip(&received).map(|(a, b)| *a && *b).collect()
    }

    fn pairs(&self) -> impl Iterator<Item = (&End, &End)> {
        let all = self.ends.iter();
        all.flat_map(|from| self.ends.iter().map(move |to| (from, to)))
            .filter(|(from, to)| from.address.is_ipv4() == to.address.is_ipv4())
            .filter(|(from, to)| from.pod.is_some() || to.pod.is_some())
            .filter(|(from, to)| {
                from.address != to.address && (from.pod.is_none() || from.pod != to.pod)
            })
    }

    /// Takes the steps, write by write, and looks at every packet after each.
    fn check(&self, order: u64) {
        let mut rows = self.old.clone();
        self.walk(order, &mut rows, |_| false);
        assert_eq!(rows, self.new, "where the steps lead");
    }

    /// The same in a kernel in which rows stay that nothing points to.
    fn check_on(&self, order: u64, kernel: &mut PolicyRows) {
        self.walk(order, kernel, |write| {
            matches!(write, Write::Port(_, None) | Write::Verdict(_, None))
        });
    }

    fn walk(&self, order: u64, rows: &mut PolicyRows, stays: impl Fn(&Write) -> bool) {
        let mut known = Known::default();
        let of = |rows, known: &mut Known| -> Vec<Packets> {
            self.pairs()
                .map(|(from, to)| self.packets(rows, from, to, known))
                .collect()
        };
        let olds = of(&self.old, &mut known);
        let mut known = Known::default();
        let news = of(&self.new, &mut known);
        let mut known = Known::default();
        for (number, step) in self.steps.iter().enumerate() {
            for (table, write) in writes(step, order) {
                if stays(&write) {
                    continue;
                }
                let changes_answers = write.apply(rows);
                if changes_answers {
                    known = Known::default();
                }
                let all = self.pairs().zip(olds.iter().zip(&news));
                for ((from, to), (old, new)) in all {
                    let now = self.packets(rows, from, to, &mut known);
                    for (kind, now) in now.iter().enumerate() {
                        let (old, new) = (old[kind], new[kind]);
                        assert!(
                            *now == old || *now == new,
                            "{:?} from {from:?} to {to:?} passes: {now}; before {old}, after {new}; in step {number} of {}, \
                             after {table}: {write:?}",
                            self.kinds[kind],
                            self.steps.len(),
                        );
                    }
                }
            }
        }
    }
}

/// What rules say to a class, until a row of theirs changes.
#[derive(Default)]
struct Known(BTreeMap<(RulesId, u32), Packets>);

/// One write to one table.
#[derive(Clone, Debug)]
enum Write {
    Port(PortKey, Option<weir_common::policy::PortRow>),
    Verdict(
        weir_common::policy::VerdictKey,
        Option<weir_common::policy::VerdictRow>,
    ),
    Class(Addr, Option<weir_common::policy::Class>),
    Cidr(weir_common::Prefix, Option<weir_common::policy::Class>),
    Pod(ObjectName, Option<PodRules>),
}

impl Write {
    /// Does it change what rules say?
    fn apply(&self, rows: &mut PolicyRows) -> bool {
        fn set<K: Ord + Clone, V: Clone>(table: &mut BTreeMap<K, V>, key: &K, row: &Option<V>) {
            match row {
                Some(row) => table.insert(key.clone(), row.clone()),
                None => table.remove(key),
            };
        }
        match self {
            Self::Port(key, row) => set(&mut rows.ports, key, row),
            Self::Verdict(key, row) => set(&mut rows.verdicts, key, row),
            Self::Class(key, row) => set(&mut rows.classes, key, row),
            Self::Cidr(key, row) => set(&mut rows.cidrs, key, row),
            Self::Pod(key, row) => set(&mut rows.rules, key, row),
        }
        matches!(self, Self::Port(..) | Self::Verdict(..))
    }
}

/// The writes of a step, as `apply` takes them: ports, verdicts, addresses, prefixes, those that go, pods, and last rows that
/// nothing points to. Among those of one table in some order.
fn writes(step: &Step, order: u64) -> Vec<(&'static str, Write)> {
    let mut all = Vec::new();
    let mut group = |table: &'static str, mut writes: Vec<Write>| {
        // Any order will do; each seed gives another one.
        let mut state = order | 1;
        for at in (1..writes.len()).rev() {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            writes.swap(at, (state >> 33) as usize % (at + 1));
        }
        all.extend(writes.into_iter().map(|write| (table, write)));
    };
    macro_rules! rows {
        ($name:literal, $field:ident, $kind:ident, $which:ident) => {
            group(
                $name,
                step.$field
                    .iter()
                    .filter(|(_, row)| row.$which())
                    .map(|(key, row)| Write::$kind(key.clone(), row.clone()))
                    .collect(),
            )
        };
    }
    rows!("PORTS", ports, Port, is_some);
    rows!("VERDICTS", verdicts, Verdict, is_some);
    rows!("CLASSES", classes, Class, is_some);
    rows!("CIDRS", cidrs, Cidr, is_some);
    rows!("CLASSES", classes, Class, is_none);
    rows!("CIDRS", cidrs, Cidr, is_none);
    rows!("DEVICES", pods, Pod, is_none);
    rows!("DEVICES", pods, Pod, is_some);
    rows!("VERDICTS", verdicts, Verdict, is_none);
    rows!("PORTS", ports, Port, is_none);
    all
}

/// Everybody in the one state or the other. An address that is another pod's after than before is not between the two.
fn ends(before: &Cluster, after: &Cluster) -> Vec<End> {
    let here = |party: &Party| match &party.is {
        Who::Pod(pod) if pod.node.as_deref() == Some("n1") => Some(pod.id.clone()),
        _ => None,
    };
    let all = |of: &Cluster| -> BTreeMap<IpAddr, Option<ObjectName>> {
        parties(of)
            .iter()
            .map(|it| (it.address, here(it)))
            .collect()
    };
    let (before, after) = (all(before), all(after));
    let addresses: BTreeSet<IpAddr> = before.keys().chain(after.keys()).copied().collect();
    let outside = DNS.into_iter().chain(OUTSIDE).map(ip);
    let addresses: BTreeSet<IpAddr> = addresses.into_iter().chain(outside).collect();
    addresses
        .into_iter()
        .filter_map(|address| {
            let pod =
                |of: &BTreeMap<IpAddr, Option<ObjectName>>| of.get(&address).cloned().flatten();
            let (old, new) = (pod(&before), pod(&after));
            let is_handed_on = old.is_some() && new.is_some() && old != new;
            let pod = old.or(new);
            (!is_handed_on).then_some(End { address, pod })
        })
        .collect()
}

/// One packet of each kind that sets of ports tell apart.
fn kinds(ports: &[PortKey]) -> Vec<(Protocol, u16)> {
    let mut starts = BTreeSet::new();
    for key in ports {
        let first = u16::from(key.port);
        let free = PortKey::ONE_PORT.saturating_sub(key.prefix_len).min(16);
        let last = first | u16::MAX.checked_shr(16 - free).unwrap_or(0);
        starts.insert(first);
        starts.extend(last.checked_add(1));
    }
    starts.insert(0);
    let protocols = [Protocol::TCP, Protocol::UDP, Protocol::SCTP];
    let ports = protocols
        .into_iter()
        .flat_map(|it| starts.iter().map(move |port| (it, *port)));
    ports.chain([(Protocol::ICMP, 0)]).collect()
}

/// `after`, where the coins say so, and otherwise `before`.
pub(super) fn mixed(before: &Cluster, after: &Cluster, coins: &[bool]) -> Cluster {
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

fn ways() -> ProptestConfig {
    let number = std::env::var("WEIR_POLICY_SETS");
    let number = number.ok().and_then(|text| text.parse().ok());
    ProptestConfig::with_cases(number.unwrap_or(256))
}

proptest! {
    #![proptest_config(ways())]

    #[test]
    fn every_packet_on_the_way_is_judged_between_before_and_after(
        before in prop_oneof![cluster(Parts::Supported), cluster(Parts::Tiers)],
        after in prop_oneof![cluster(Parts::Supported), cluster(Parts::Tiers)],
        coins in prop::collection::vec(any::<bool>(), 12),
        hash_bits in prop_oneof![Just(32_u32), Just(2)],
        order in any::<u64>(),
    ) {
        let after = mixed(&before, &after, &coins);
        Way::between(&before, &after, hash_bits).check(order);
    }
}

#[test]
fn nothing_moves_when_nothing_changes() {
    let cluster = super::cases::shop();
    assert_eq!(Way::between(&cluster, &cluster, 32).steps, []);
}

/// One policy that lets out and not in becomes one that lets in and not out: between the two both would let a packet pass, or
/// neither.
#[test]
fn a_policy_of_both_ends_that_turns_around_lets_nothing_pass_on_the_way() {
    let mut before = super::cases::shop();
    let from_all = || Some(vec![super::nouns::anything()]);
    before.policies = vec![policy("shop/both", select(""), Some(vec![]), from_all())];
    let mut after = before.clone();
    after.policies = vec![policy("shop/both", select(""), from_all(), Some(vec![]))];
    let way = Way::between(&before, &after, 32);
    assert!(way.steps.len() > 1);
    for order in 0..20 {
        way.check(order);
    }
}

/// A namespace that gets another label: nobody comes to other rules, and two ends see somebody else.
#[test]
fn a_namespace_that_is_relabelled_lets_nothing_pass_on_the_way() {
    let env = |name| vec![only(vec![pods_in(select(name), select(""))])];
    let mut before = super::cases::shop();
    before.policies = vec![policy(
        "shop/env",
        select(""),
        Some(env("env=dev")),
        Some(env("env=prod")),
    )];
    let relabelled = |name: &str| {
        let mut cluster = before.clone();
        let shop = cluster.namespaces.iter_mut().find(|it| &*it.name == "shop");
        shop.unwrap().labels = labels(name);
        cluster
    };
    let way = Way::between(&relabelled("env=dev"), &relabelled("env=prod"), 32);
    assert!(way.steps.len() > 1);
    for order in 0..20 {
        way.check(order);
    }
}

/// The rules of one pod become another's, and the peer that both meet changes too.
#[test]
fn pods_that_change_places_are_never_given_what_neither_may() {
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
    for order in 0..20 {
        way.check(order);
    }
}

/// Most changes in a cluster: one write, and no more.
#[test]
fn a_pod_elsewhere_is_one_row() {
    let mut before = super::cases::shop();
    before.policies = vec![policy(
        "shop/db",
        select("app=db"),
        Some(vec![only(vec![pods(select("app=web"))])]),
        None,
    )];
    let mut after = before.clone();
    let elsewhere = pod("shop/new", "app=web", 77);
    after.pods.push(Pod {
        node: Some("n2".into()),
        addresses: vec![ip("10.0.0.77")],
        ..elsewhere
    });
    let way = Way::between(&before, &after, 32);
    let [step] = &way.steps[..] else {
        panic!("{} steps", way.steps.len());
    };
    let rows = (
        step.ports.len(),
        step.verdicts.len(),
        step.cidrs.len(),
        step.pods.len(),
    );
    assert_eq!((step.classes.len(), rows), (1, (0, 0, 0, 0)));
}

/// Two pods get another label, one within the second after the other, in which rows that nothing points to any more are still there.
#[test]
fn rows_of_the_way_before_say_nothing_on_the_next() {
    let state = |one: &str, two: &str| Cluster {
        namespaces: vec![namespace("shop", "")],
        pods: vec![
            pod("shop/x", "app=x", 5),
            pod("shop/one", one, 6),
            pod("shop/two", two, 7),
        ],
        policies: vec![
            policy(
                "shop/x",
                select("app=x"),
                None,
                Some(vec![only(vec![pods(select("app=b"))])]),
            ),
            policy("shop/b", select("app=b"), Some(vec![]), None),
        ],
        cluster_policies: Vec::new(),
    };
    let all = [
        state("app=a", "app=a"),
        state("app=b", "app=a"),
        state("app=b", "app=b"),
        state("app=a", "app=b"),
        state("app=b", "app=a"),
    ];
    let mut compiler = compiler(&snapshot(&all[0]), "n1", u32::BITS);
    let mut kernel = compiler.rows();
    for pair in all.windows(2) {
        let [first, second] = [0, 1].map(|at| snapshot(&pair[at]));
        let way = Way::on(&mut compiler, (&pair[0], &first), (&pair[1], &second));
        way.check_on(7, &mut kernel);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ways().cases / 2))]

    /// One way after another, with plans that are given up in between, and rows that stay for a while.
    #[test]
    fn ways_that_follow_each_other_do_not_mix(
        clusters in prop::collection::vec(prop_oneof![cluster(Parts::Supported), cluster(Parts::Tiers)], 5),
        coins in prop::collection::vec(any::<bool>(), 16),
        gives_up in prop::collection::vec(any::<bool>(), 5),
        hash_bits in prop_oneof![Just(32_u32), Just(2)],
        order in any::<u64>(),
    ) {
        let mut before = clusters[0].clone();
        let mut first = snapshot(&before);
        let mut compiler = compiler(&first, "n1", hash_bits);
        let mut kernel = compiler.rows();
        for (at, next) in clusters[1..].iter().enumerate() {
            let mut after = mixed(&before, next, &coins[at..]);
            if coins[at] {
                after.namespaces = before.namespaces.clone();
            }
            if at > 0 && coins[at + 1] {
                after = clusters[0].clone();
            }
            let second = snapshot(&after);
            if gives_up[at] {
                let other = snapshot(next);
                for (from, to) in [(&first, &other), (&other, &second)] {
                    compiler.update(&touched(from, to), to, &view("n1"));
                    compiler.plan();
                    compiler.abandon();
                }
            }
            let way = Way::on(&mut compiler, (&before, &first), (&after, &second));
            way.check_on(order, &mut kernel);
            (before, first) = (after, second);
        }
    }
}
