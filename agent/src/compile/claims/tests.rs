//! Histories of claims, and what of them a change may touch. What objects come to is in `tests/golden/claims`.

use std::collections::BTreeSet;

use proptest::prelude::*;
use weir_common::service::{FrontendKey, Scope};
use weir_common::{Addr, Protocol};

use super::*;
use crate::compile::BackendAddr;
use crate::model::ObjectName;

fn key(n: u8, scope: Scope) -> FrontendKey {
    FrontendKey {
        addr: Addr::v4([198, 51, 100, n]),
        port: 80.into(),
        protocol: Protocol::TCP,
        scope,
        pad: [0; 4],
    }
}

fn name(n: u32) -> Owner {
    Owner::Service(ObjectName::new("default", format!("s{n:05}")))
}

/// A Service with these addresses, each for clients inside and outside.
fn plan(owner: &Owner, addresses: &[(u8, Way)]) -> ServicePlan {
    let mut frontends: Vec<_> = addresses
        .iter()
        .flat_map(|(n, way)| [Scope::INTERNAL, Scope::EXTERNAL].map(|scope| (key(*n, scope), *way)))
        .map(|(key, way)| FrontendPlan {
            key,
            way,
            port: key.port,
            backends: Vec::new(),
            affinity: 0,
            flags: 0,
        })
        .collect();
    frontends.sort_by_key(|frontend| frontend.key);
    ServicePlan {
        id: owner.clone(),
        created: None,
        frontends,
        draining: Vec::new(),
        reports: Vec::new(),
    }
}

/// What follows from deltas, kept as `apply` keeps it.
#[derive(Default)]
struct Kept {
    plans: BTreeMap<Owner, Arc<ServicePlan>>,
    reports: BTreeMap<Owner, Vec<Report>>,
}

impl Kept {
    fn take(&mut self, delta: Delta) {
        for (owner, plan) in delta.plans {
            match plan {
                Some(plan) => self.plans.insert(owner, plan),
                None => self.plans.remove(&owner),
            };
        }
        for (owner, reports) in delta.reports {
            if reports.is_empty() {
                self.reports.remove(&owner);
            } else {
                self.reports.insert(owner, reports);
            }
        }
    }

    fn holders(&self) -> BTreeMap<FrontendKey, &Owner> {
        let mut holders = BTreeMap::new();
        for (owner, plan) in &self.plans {
            for frontend in &plan.frontends {
                let other = holders.insert(frontend.key, owner);
                assert_eq!(other, None, "two have {:?}", frontend.key);
            }
        }
        holders
    }
}

fn way() -> impl Strategy<Value = Way> {
    prop_oneof![
        1 => Just(Way::ClusterIp),
        1 => Just(Way::NodePort),
        2 => Just(Way::ExternalIp),
        1 => Just(Way::HostPort),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Against the rule itself: the best way has it, of equal ways who has it.
    #[test]
    fn every_address_has_one_holder_whom_only_a_better_way_or_himself_puts_out(
        steps in prop::collection::vec(
            (0..5u32, prop::option::weighted(0.8, prop::collection::btree_map(0..3u8, way(), 0..3))),
            1..40,
        ),
    ) {
        let mut claims = Claims::resume([]);
        claims.everything_said();
        let mut kept = Kept::default();
        let mut asked: BTreeMap<u32, BTreeMap<u8, Way>> = BTreeMap::new();
        let mut holders: BTreeMap<u8, u32> = BTreeMap::new();
        for (s, addresses) in steps {
            let owner = name(s);
            let wanted = addresses.map(|addresses| {
                // The API server gives a cluster IP to one Service only.
                let granted = |(n, way)| match way {
                    Way::ClusterIp if u32::from(n) != s => (n, Way::ExternalIp),
                    way => (n, way),
                };
                let addresses: Vec<_> = addresses.into_iter().map(granted).collect();
                (plan(&owner, &addresses), addresses)
            });
            let delta = claims.update(&owner, wanted.as_ref().map(|(plan, _)| plan.clone()));
            kept.take(delta);
            match wanted {
                Some((_, addresses)) => asked.insert(s, addresses.into_iter().collect()),
                None => asked.remove(&s),
            };
            for n in 0..3u8 {
                let way_of = |s: u32| asked.get(&s).and_then(|ways| ways.get(&n)).copied();
                let best = (0..5).filter_map(way_of).min();
                let old = holders.remove(&n).filter(|s| best.is_some() && way_of(*s) == best);
                let new = old.or_else(|| (0..5).find(|s| best.is_some() && way_of(*s) == best));
                if let Some(new) = new {
                    holders.insert(n, new);
                }
            }
            let mut wanted = BTreeMap::new();
            for (n, s) in &holders {
                for scope in [Scope::INTERNAL, Scope::EXTERNAL] {
                    wanted.insert(key(*n, scope), name(*s));
                }
            }
            let found: BTreeMap<_, _> = kept.holders().into_iter().map(|(k, o)| (k, o.clone())).collect();
            prop_assert_eq!(&found, &wanted);
            let without: BTreeSet<Owner> = asked
                .iter()
                .filter(|(s, ways)| ways.keys().any(|n| holders[n] != **s))
                .map(|(s, _)| name(*s))
                .collect();
            let told: BTreeSet<Owner> = kept.reports.keys().cloned().collect();
            prop_assert_eq!(&told, &without);
            for (owner, reports) in claims.reported() {
                prop_assert_eq!(kept.reports.get(owner), Some(&reports));
            }

            // A start after this one gives nothing to another, in whatever order objects are said.
            let numbers = found.iter().map(|(k, o)| (*k, o.numbers().next().unwrap()));
            let mut next = Claims::resume(numbers);
            let mut resumed = Kept::default();
            for s in asked.keys().rev() {
                let asked = claims.asked().find(|plan| plan.id == name(*s)).cloned();
                resumed.take(next.update(&name(*s), asked));
            }
            resumed.take(next.everything_said());
            prop_assert_eq!(&resumed.plans, &kept.plans);
            prop_assert_eq!(&resumed.reports, &kept.reports);
        }
    }
}

#[test]
fn a_change_touches_those_whom_it_concerns_and_no_others() {
    let mut claims = Claims::resume([]);
    claims.everything_said();
    for s in 0..2_000 {
        let address = if s < 1_000 { 1 } else { 2 };
        claims.update(
            &name(s),
            Some(plan(&name(s), &[(address, Way::ExternalIp)])),
        );
    }
    // Its own address, of which nobody else knows.
    let mut own = plan(&name(9_999), &[(7, Way::ClusterIp)]);
    let delta = claims.update(&name(9_999), Some(own.clone()));
    assert_eq!((delta.plans.len(), delta.reports.len()), (1, 0));
    own.frontends[0].affinity = 1;
    let delta = claims.update(&name(9_999), Some(own.clone()));
    assert_eq!((delta.plans.len(), delta.reports.len()), (1, 0));
    assert_eq!(claims.update(&name(9_999), Some(own)), Delta::default());
    // One more who goes without.
    let more = plan(&name(10_000), &[(1, Way::ExternalIp)]);
    let delta = claims.update(&name(10_000), Some(more));
    assert_eq!((delta.plans.len(), delta.reports.len()), (1, 1));
    // Another holder: two change, and who still goes without is told by whom.
    let delta = claims.update(&name(0), None);
    let changed: Vec<_> = delta.plans.keys().collect();
    assert_eq!(changed, [&name(0), &name(1)]);
    assert_eq!(delta.reports.len(), 1_000);
}

#[test]
fn what_the_kernel_holds_for_somebody_waits_for_him_and_a_cluster_ip_does_not() {
    let holder = name(3);
    let number = holder.numbers().next().unwrap();
    let held = || [(key(1, Scope::INTERNAL), number)];
    let mut claims = Claims::resume(held());
    let delta = claims.update(&name(1), Some(plan(&name(1), &[(1, Way::ExternalIp)])));
    assert_eq!(delta.plans[&name(1)].as_ref().unwrap().frontends, []);
    assert!(delta.reports.is_empty(), "nobody has taken it yet");
    let delta = claims.update(&holder, Some(plan(&holder, &[(1, Way::ExternalIp)])));
    assert_eq!(delta.plans[&holder].as_ref().unwrap().frontends.len(), 2);
    assert_eq!(delta.reports.keys().collect::<Vec<_>>(), [&name(1)]);

    // He does not come back.
    let mut claims = Claims::resume(held());
    claims.update(&name(1), Some(plan(&name(1), &[(1, Way::ExternalIp)])));
    let delta = claims.everything_said();
    assert_eq!(delta.plans[&name(1)].as_ref().unwrap().frontends.len(), 2);

    let mut claims = Claims::resume(held());
    let delta = claims.update(&name(1), Some(plan(&name(1), &[(1, Way::ClusterIp)])));
    assert_eq!(delta.plans[&name(1)].as_ref().unwrap().frontends.len(), 2);
}

#[test]
fn another_object_of_the_same_name_has_had_nothing_yet() {
    let born = |owner: &Owner, created| ServicePlan {
        created,
        ..plan(owner, &[(1, Way::ExternalIp)])
    };
    let mut claims = Claims::resume([]);
    claims.everything_said();
    claims.update(&name(1), Some(born(&name(1), None)));
    claims.update(&name(2), Some(born(&name(2), Some(5))));
    // It is the same one, of which more is known.
    claims.update(&name(1), Some(born(&name(1), Some(7))));
    assert_eq!(claims.holder(&key(1, Scope::INTERNAL)), Some(&name(1)));
    claims.update(&name(1), Some(born(&name(1), Some(9))));
    assert_eq!(claims.holder(&key(1, Scope::INTERNAL)), Some(&name(2)));
}

#[test]
fn who_loses_an_address_keeps_the_connections_that_came_by_it() {
    let backend = |n| BackendAddr {
        addr: Addr::v4([10, 0, 0, n]),
        port: 8080.into(),
    };
    let leads = |owner: &Owner, addresses: &[(u8, Way, u8)]| {
        let ways: Vec<_> = addresses.iter().map(|(n, way, _)| (*n, *way)).collect();
        let mut plan = plan(owner, &ways);
        for frontend in &mut plan.frontends {
            let to = addresses.iter().find(|(n, ..)| {
                [Scope::INTERNAL, Scope::EXTERNAL]
                    .map(|s| key(*n, s))
                    .contains(&frontend.key)
            });
            frontend.backends = vec![backend(to.unwrap().2)];
        }
        plan.draining = vec![(Protocol::TCP, backend(9))];
        plan
    };
    let mut claims = Claims::resume([]);
    claims.everything_said();
    let asked = leads(
        &name(1),
        &[
            (1, Way::ExternalIp, 7),
            (2, Way::ExternalIp, 8),
            (3, Way::ExternalIp, 7),
        ],
    );
    claims.update(&name(1), Some(asked.clone()));
    let better = |addresses: &[(u8, Way)]| Some(plan(&name(2), addresses));
    // What the other one has, and what drains of the first.
    type Case<'a> = (&'a [(u8, Way)], &'a [u8]);
    let cases: [Case<'_>; 4] = [
        (&[(1, Way::LoadBalancer)], &[9]),
        (&[(2, Way::LoadBalancer)], &[8, 9]),
        (&[(1, Way::LoadBalancer), (3, Way::LoadBalancer)], &[7, 9]),
        (&[], &[9]),
    ];
    for (taken, draining) in cases {
        let mut delta = claims.update(&name(2), better(taken));
        let granted = delta.plans.remove(&name(1)).flatten().unwrap();
        let expected: Vec<_> = draining
            .iter()
            .map(|n| (Protocol::TCP, backend(*n)))
            .collect();
        assert_eq!(granted.draining, expected, "{taken:?}");
    }
    assert_eq!(claims.asked().next(), Some(&asked));
}
