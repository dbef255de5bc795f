//! How the kube source goes on: after errors, and from one API server to the next. What counts is what was
//! asked of the servers, not only that everything arrives.

use std::time::{Duration, Instant};

use super::api_server::ApiServer;
use super::kube::{Running, eventually, quick, service};
use crate::model::Kind;
use crate::watch::kube::Timing;
use crate::watch::status::WatchStatus;

const RESOURCES: [&str; 7] = [
    "services",
    "endpointslices",
    "pods",
    "namespaces",
    "nodes",
    "networkpolicies",
    "clusternetworkpolicies",
];

fn is_failing(status: &WatchStatus) -> bool {
    matches!(status, WatchStatus::Retrying { .. })
}

/// How often each kind was listed.
fn lists(server: &ApiServer) -> [usize; 7] {
    RESOURCES.map(|resource| server.lists(resource))
}

impl Running {
    /// The services are exactly these.
    async fn until_services(&mut self, names: &[&str]) {
        self.reader
            .until(&format!("the services are {names:?}"), |r| {
                r.snapshot.services.len() == names.len()
                    && names.iter().all(|name| r.has_service("default", name))
            })
            .await;
    }
}

#[tokio::test]
async fn a_server_that_was_away_is_watched_from_where_it_was_and_not_listed_again() {
    let mut server = ApiServer::start();
    server.put(service("old"));
    let mut running = Running::start(&server).await;
    running.reader.until_complete().await;
    server.stop();
    for kind in Kind::ALL {
        running.until_health(kind, is_failing).await;
    }
    assert!(running.reader.has_service("default", "old"));
    server.delete("services", "default/old");
    server.put(service("new"));
    server.start_again().await;
    running.until_services(&["new"]).await;
    for kind in Kind::ALL {
        running
            .until_health(kind, |s| *s == WatchStatus::Synced)
            .await;
    }
    assert_eq!(lists(&server), [1; 7]);
}

#[tokio::test]
async fn a_place_that_was_forgotten_meanwhile_is_made_up_for_by_a_list() {
    for is_blunt in [false, true] {
        let mut server = ApiServer::start();
        if is_blunt {
            server.refuse_bluntly();
        }
        server.put(service("old"));
        let mut running = Running::start(&server).await;
        running.reader.until_complete().await;
        server.stop();
        running.until_health(Kind::Service, is_failing).await;
        server.delete_silently("services", "default/old");
        server.put(service("new"));
        server.compact();
        server.start_again().await;
        running.until_services(&["new"]).await;
        eventually("every kind is listed once more", || {
            lists(&server) == [2; 7]
        })
        .await;
        running
            .until_health(Kind::Service, |s| *s == WatchStatus::Synced)
            .await;
    }
}

/// A watch from a version that the server has yet to reach says nothing until then.
#[tokio::test]
async fn a_server_that_was_restored_from_a_backup_is_listed() {
    let mut server = ApiServer::start();
    for name in ["a", "b", "c"] {
        server.put(service(name));
    }
    let mut running = Running::start(&server).await;
    running.reader.until_complete().await;
    server.stop();
    running.until_health(Kind::Service, is_failing).await;
    server.restore();
    server.put(service("b"));
    server.start_again().await;
    running.until_services(&["b"]).await;
}

#[tokio::test]
async fn when_the_first_server_dies_the_second_goes_on_where_it_was() {
    let mut first = ApiServer::start();
    let second = first.start_beside();
    first.put(service("old"));
    let mut running = Running::with(&[&first, &second], quick()).await;
    running.reader.until_complete().await;
    assert_eq!(second.calls(), 0, "the first answers");
    let mut health = running.health.clone();
    first.stop();
    second.delete("services", "default/old");
    for name in ["new", "newer"] {
        second.put(service(name));
    }
    running.until_services(&["new", "newer"]).await;
    eventually("every kind is watched", || second.calls() >= 12).await;
    second.put(service("newest"));
    running.until_services(&["new", "newer", "newest"]).await;
    assert_eq!(lists(&second), [1; 7]);
    let failing = health.wait_for(|health| health.values().any(is_failing));
    let failing = tokio::time::timeout(Duration::from_millis(50), failing).await;
    assert!(
        failing.is_err(),
        "nothing is wrong that anybody had to know"
    );
}

#[tokio::test]
async fn a_first_server_that_never_answers_does_not_stand_in_the_way_at_a_start() {
    let mut first = ApiServer::start();
    let second = first.start_beside();
    first.put(service("a"));
    first.stop();
    let mut running = Running::with(&[&first, &second], quick()).await;
    running.until_services(&["a"]).await;
    running.reader.until_complete().await;
}

#[tokio::test]
async fn a_server_that_hangs_gives_way_to_the_next() {
    let first = ApiServer::start();
    let second = first.start_beside();
    let timing = Timing {
        quiet: Duration::from_millis(800),
        answer: Duration::from_millis(300),
        ..quick()
    };
    let within = timing.quiet + timing.answer;
    let mut running = Running::with(&[&first, &second], timing).await;
    running.reader.until_complete().await;
    first.freeze();
    let began = Instant::now();
    second.put(service("new"));
    running.until_services(&["new"]).await;
    let took = began.elapsed();
    assert!(took < within + within / 2, "{took:?}");
    assert_eq!(lists(&second), [1; 7]);
}

#[tokio::test]
async fn all_servers_gone_is_said_and_the_first_to_return_is_asked() {
    let mut first = ApiServer::start();
    let mut second = first.start_beside();
    let mut running = Running::with(&[&first, &second], quick()).await;
    running.reader.until_complete().await;
    first.stop();
    second.stop();
    for kind in Kind::ALL {
        running.until_health(kind, is_failing).await;
    }
    first.start_again().await;
    first.put(service("new"));
    running.until_services(&["new"]).await;
    for kind in Kind::ALL {
        running
            .until_health(kind, |s| *s == WatchStatus::Synced)
            .await;
    }
    assert_eq!(lists(&first), [1; 7]);
}

#[tokio::test]
async fn a_silent_watch_is_called_again_and_a_bookmark_is_a_word() {
    let server = ApiServer::start();
    let timing = Timing {
        watch: Duration::from_secs(60),
        silence: Duration::from_millis(400),
        ..quick()
    };
    let mut running = Running::with(&[&server], timing).await;
    running.reader.until_complete().await;
    eventually("it watches", || server.watches("services") == 1).await;
    for _ in 0..20 {
        server.bookmark();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(server.watches("services"), 1, "there were bookmarks");
    eventually("it is called again", || server.watches("services") > 2).await;
    assert_eq!(lists(&server), [1; 7]);
    assert!(
        running
            .health
            .borrow()
            .values()
            .all(|s| *s == WatchStatus::Synced)
    );
}

/// A server that hangs is noticed by one watch, not by all of them calling every minute.
#[tokio::test]
async fn of_watches_of_a_quiet_server_one_is_called_again() {
    let server = ApiServer::start();
    let timing = Timing {
        watch: Duration::from_secs(60),
        quiet: Duration::from_millis(500),
        ..quick()
    };
    let mut running = Running::with(&[&server], timing).await;
    running.reader.until_complete().await;
    let watches = || -> usize { RESOURCES.iter().map(|r| server.watches(r)).sum() };
    eventually("all watch", || watches() == RESOURCES.len()).await;
    tokio::time::sleep(Duration::from_millis(3000)).await;
    // Six rounds of 375 ms to 500 ms, in which two may draw nearly the same time.
    let again = watches() - RESOURCES.len();
    assert!((4..=16).contains(&again), "{again} calls in 3 s");
}

#[tokio::test]
async fn no_two_nodes_end_their_watches_together() {
    let server = ApiServer::start();
    let mut running = Vec::new();
    for _ in 0..4 {
        let mut one = Running::with(&[&server], Timing::default()).await;
        one.reader.until_complete().await;
        running.push(one);
    }
    eventually("all watch", || {
        server.lengths().len() == 4 * RESOURCES.len()
    })
    .await;
    let lengths = server.lengths();
    assert!(
        lengths.iter().all(|l| (300..=600).contains(l)),
        "{lengths:?}"
    );
    let distinct: std::collections::BTreeSet<_> = lengths.iter().collect();
    assert!(distinct.len() > 14, "{lengths:?}");
}
