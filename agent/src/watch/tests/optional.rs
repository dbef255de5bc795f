//! The kind that a cluster may be without: absent, there, and absent again.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::api_server::{ApiServer, OPTIONAL};
use super::kube::{Log, Running, eventually, quick};
use crate::model::{Change, Kind, Tier};
use crate::watch::kube::Timing;
use crate::watch::status::{Cause, WatchStatus};

const KIND: Kind = Kind::ClusterNetworkPolicy;

fn policy(name: &str) -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": {"tier": "Baseline", "priority": 7, "subject": {"namespaces": {}}},
    })
}

/// Looks again every 0.3 s at most, where production does every 30 s.
fn looking() -> Timing {
    Timing {
        optional: Duration::from_millis(300),
        ..quick()
    }
}

async fn start(server: &ApiServer) -> Running {
    Running::with(&[server], looking()).await
}

#[tokio::test]
async fn a_kind_that_is_absent_comes_and_goes() {
    Log::install();
    let server = ApiServer::start();
    server.have_optional(&[]);
    let mut running = start(&server).await;
    running.reader.until_complete().await;
    running
        .until_health(KIND, |s| *s == WatchStatus::Synced)
        .await;
    eventually("it looks again and again", || server.lists(OPTIONAL) >= 4).await;
    assert_eq!(server.searches(), 1, "its group tells that nothing is new");
    running.reader.catch_up();
    assert_eq!(running.reader.synced[&KIND], 1, "it is said once");
    assert_eq!(running.health.borrow()[&KIND], WatchStatus::Synced);

    server.have_optional(&["v1alpha2"]);
    server.put(policy("one"));
    let reader = &mut running.reader;
    reader
        .until("the policy is there", |r| {
            r.snapshot.cluster_policies.len() == 1
        })
        .await;
    let one = reader.snapshot.cluster_policies["one"].clone();
    assert_eq!((one.tier, one.priority), (Tier::Baseline, 7));
    server.put(policy("two"));
    reader
        .until("what comes later is watched", |r| {
            r.snapshot.cluster_policies.len() == 2
        })
        .await;

    server.have_optional(&[]);
    reader
        .until("both are gone", |r| r.snapshot.cluster_policies.is_empty())
        .await;
    running
        .until_health(KIND, |s| *s == WatchStatus::Synced)
        .await;

    server.have_optional(&["v1alpha2"]);
    server.put(policy("three"));
    running
        .reader
        .until("it is noticed a second time", |r| {
            r.snapshot.cluster_policies.contains_key("three")
        })
        .await;
    let text = Log::text();
    assert!(!text.contains("WARN") && !text.contains("ERROR"), "{text}");
    assert_eq!(text.matches("has no such kind").count(), 2, "{text}");
    assert_eq!(text.matches("has the kind now").count(), 2, "{text}");
    let in_production = Timing::default().optional;
    assert!(
        in_production <= Duration::from_secs(30),
        "{in_production:?}"
    );
}

#[tokio::test]
async fn a_wrong_404_takes_no_policy_away() {
    let server = ApiServer::start();
    server.put(policy("one"));
    let mut running = start(&server).await;
    running.reader.until_complete().await;
    server.forget_optional(true);
    running
        .until_health(KIND, |s| {
            matches!(s, WatchStatus::Retrying { cause: Cause::Refused, error, .. } if error.contains("answers 404"))
        })
        .await;
    running.reader.catch_up();
    assert!(running.reader.snapshot.cluster_policies.contains_key("one"));
    server.forget_optional(false);
    running
        .until_health(KIND, |s| *s == WatchStatus::Synced)
        .await;
    running.reader.catch_up();
    assert!(running.reader.snapshot.cluster_policies.contains_key("one"));
}

#[tokio::test]
async fn a_kind_of_other_versions_alone_is_no_absence() {
    let server = ApiServer::start();
    server.have_optional(&["v1beta9"]);
    let mut running = start(&server).await;
    running
        .until_health(KIND, |s| {
            matches!(s, WatchStatus::Retrying { cause: Cause::Refused, error, .. }
                if error.contains("as v1beta9, and not as v1alpha2 or v1beta1"))
        })
        .await;
    running.reader.catch_up();
    let missing: Vec<_> = running.reader.snapshot.missing().collect();
    assert!(missing.contains(&KIND), "{missing:?}");
}

/// Of both the agent reads, whichever is there; v1alpha2 where both are.
#[tokio::test]
async fn either_version_is_read_and_followed_when_it_goes_for_the_other() {
    let server = ApiServer::start();
    server.have_optional(&["v1beta1"]);
    server.put(policy("one"));
    let mut running = start(&server).await;
    running.reader.until_complete().await;
    let has = |name: &'static str| {
        move |r: &super::Reader| r.snapshot.cluster_policies.contains_key(name)
    };
    running.reader.until("it is there", has("one")).await;
    server.put(policy("two"));
    running.reader.until("it is watched", has("two")).await;
    for (versions, name) in [
        (&["v1alpha2", "v1beta1"][..], "three"),
        (&["v1alpha2"], "four"),
        (&["v1beta1"], "five"),
    ] {
        server.have_optional(versions);
        server.put(policy(name));
        running.reader.until("it is followed", has(name)).await;
        running
            .until_health(KIND, |s| *s == WatchStatus::Synced)
            .await;
    }
    assert_eq!(running.reader.snapshot.cluster_policies.len(), 5);
    let gone = |change: &Change| matches!(change, Change::Deleted(_));
    assert!(!running.reader.seen.iter().any(gone), "none was away");

    let both = ApiServer::start();
    both.have_optional(&["v1beta1", "v1alpha2"]);
    let mut running = start(&both).await;
    running.reader.until_complete().await;
    assert_eq!(both.searches(), 0, "the first that is asked for is there");
}

/// Within one look, where every tenth was, which is 5 min in production.
#[tokio::test]
async fn another_version_that_comes_later_is_seen_at_the_next_look() {
    for (version, is_read) in [("v1beta1", true), ("v1beta9", false)] {
        let server = ApiServer::start();
        server.have_optional(&[]);
        let timing = Timing {
            optional: Duration::from_secs(1),
            ..quick()
        };
        let mut running = Running::with(&[&server], timing).await;
        running.reader.until_complete().await;
        let begun = Instant::now();
        server.have_optional(&[version]);
        server.put(policy("one"));
        if is_read {
            let has = |r: &super::Reader| r.snapshot.cluster_policies.contains_key("one");
            running.reader.until("it is there", has).await;
        } else {
            running
                .until_health(KIND, |s| matches!(s, WatchStatus::Retrying { .. }))
                .await;
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(3), "{version}: {took:?}");
    }
}

#[tokio::test]
async fn other_versions_that_come_later_are_seen_too() {
    let server = ApiServer::start();
    server.have_optional(&[]);
    let mut running = start(&server).await;
    running.reader.until_complete().await;
    server.have_optional(&["v1beta9"]);
    running
        .until_health(
            KIND,
            |s| matches!(s, WatchStatus::Retrying { error, .. } if error.contains("as v1beta9")),
        )
        .await;
    server.have_optional(&["v1beta9", "v1alpha2"]);
    server.put(policy("one"));
    running
        .reader
        .until("the policy is there", |r| {
            r.snapshot.cluster_policies.len() == 1
        })
        .await;
}

#[tokio::test]
async fn a_forbidden_kind_is_no_absence() {
    let server = ApiServer::start();
    server.forbid("list", OPTIONAL);
    let mut running = start(&server).await;
    running
        .until_health(KIND, |s| {
            matches!(s, WatchStatus::Retrying { cause: Cause::Forbidden, error, .. }
                if error.contains("apiGroups [\"policy.networking.k8s.io\"], resources [\"clusternetworkpolicies\"]"))
        })
        .await;
}
