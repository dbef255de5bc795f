//! The server against the agent's own client: pages, lines of a watch, and watches that end.

use std::collections::BTreeMap;

use tokio::sync::mpsc;
use weir_agent::model::{self, Kind, Object};
use weir_agent::watch::kube::connect;
use weir_agent::watch::{Credentials, KubeOptions, KubeSource, Timing};

use super::*;
use crate::cluster::moving_address;

const WITHIN: Duration = Duration::from_secs(20);

/// A server, and what the agent's client makes of it.
async fn watched(
    cluster: Cluster,
    timing: Timing,
) -> (ApiServer<Cluster>, mpsc::Receiver<model::Change>) {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", socket.local_addr().unwrap());
    let server = ApiServer::start(cluster, socket).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kubeconfig");
    std::fs::write(&path, kubeconfig(&url)).unwrap();
    let options = KubeOptions {
        credentials: Credentials::Kubeconfig(path),
        servers: Vec::new(),
    };
    let client = connect(&options, &timing).await.unwrap();
    let (say, said) = mpsc::channel(64);
    tokio::spawn(async move { KubeSource::new(client, timing).run(say).await });
    (server, said)
}

async fn next(said: &mut mpsc::Receiver<model::Change>) -> model::Change {
    let change = tokio::time::timeout(WITHIN, said.recv()).await;
    change.expect("a change in time").expect("a source")
}

/// Reads until every kind is complete; how many objects of each there are.
async fn all(said: &mut mpsc::Receiver<model::Change>) -> BTreeMap<Kind, usize> {
    let mut counts: BTreeMap<Kind, usize> = BTreeMap::new();
    let mut synced = 0;
    while synced < Kind::ALL.len() {
        match next(said).await {
            model::Change::Applied(object) => *counts.entry(object.id().kind).or_default() += 1,
            model::Change::Synced(_) => synced += 1,
            other => panic!("{other:?}"),
        }
    }
    counts
}

#[test]
fn pages_have_every_object_once_and_say_where_it_goes_on() {
    let store = Store::new(Cluster::new(10, 1_234, "own"));
    let (mut names, mut from, mut pages) = (Vec::new(), 0, 0);
    loop {
        let page: serde_json::Value =
            serde_json::from_str(&store.page(Resource::Pods, from, 500)).unwrap();
        let items = page["items"].as_array().unwrap().iter();
        names.extend(items.map(|item| item["metadata"]["name"].to_string()));
        pages += 1;
        match page["metadata"]["continue"].as_str() {
            Some(token) => from = token.parse().unwrap(),
            None => break,
        }
    }
    assert_eq!((names.len(), pages), (1_234, 3));
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 1_234);
}

#[test]
fn a_list_has_the_kind_of_what_is_in_it() {
    let store = Store::new(Cluster::new(2, 10, "own"));
    for (resource, version, kind) in [
        (Resource::Services, "v1", "ServiceList"),
        (
            Resource::EndpointSlices,
            "discovery.k8s.io/v1",
            "EndpointSliceList",
        ),
    ] {
        let page: serde_json::Value = serde_json::from_str(&store.page(resource, 0, 1)).unwrap();
        assert_eq!(
            (&page["apiVersion"], &page["kind"]),
            (&version.into(), &kind.into())
        );
        assert_eq!(page["items"][0]["apiVersion"], version);
        let of_item = page["items"][0]["kind"].as_str().unwrap();
        assert_eq!(format!("{of_item}List"), kind);
    }
}

#[tokio::test]
async fn a_watch_says_what_happened_since_its_version_and_then_how_far_it_is() {
    let shared = Arc::new(Shared {
        store: Mutex::new(Store::new(Cluster::new(10, 10, "own"))),
        version: watch::Sender::new(1),
    });
    for resource in [
        Resource::EndpointSlices,
        Resource::Pods,
        Resource::EndpointSlices,
    ] {
        let (reply, _) = oneshot::channel();
        let (_, version) = shared.store().change(resource, 3, Change::Seen, reply);
        shared.version.send_replace(version);
    }
    let parameters = ["watch", "resourceVersion", "timeoutSeconds"]
        .map(|name| (name.to_owned(), "1".to_owned()));
    let parameters = BTreeMap::from(parameters);
    let answer = respond(shared, Stamp::default(), "endpointslices", &parameters);
    let body = axum::body::to_bytes(answer.into_body(), 1 << 20)
        .await
        .unwrap();
    let said: Vec<_> = std::str::from_utf8(&body)
        .unwrap()
        .lines()
        .map(|line| {
            let event: serde_json::Value = serde_json::from_str(line).unwrap();
            let version = &event["object"]["metadata"]["resourceVersion"];
            (
                event["type"].as_str().unwrap().to_owned(),
                version.as_str().unwrap().to_owned(),
            )
        })
        .collect();
    let expected = [("MODIFIED", "2"), ("MODIFIED", "4"), ("BOOKMARK", "4")];
    assert_eq!(
        said,
        expected.map(|(kind, version)| (kind.to_owned(), version.to_owned()))
    );
}

#[tokio::test]
async fn the_agents_client_understands_every_object() {
    let cluster = Cluster::new(120, 1_234, "own");
    let (_server, mut said) = watched(cluster, Timing::default()).await;
    let counts = all(&mut said).await;
    let expected = [
        (Kind::Service, 120),
        (Kind::EndpointSlice, 120),
        (Kind::Pod, 1_234),
        (Kind::Namespace, 12),
        (Kind::Node, 14),
    ];
    assert_eq!(counts, BTreeMap::from(expected));
}

#[tokio::test]
async fn changes_reach_the_agents_client_over_watches_that_end() {
    let timing = Timing {
        watch: Duration::from_secs(1),
        ..Timing::default()
    };
    let (server, mut said) = watched(Cluster::new(100, 10, "own"), timing).await;
    all(&mut said).await;
    for _ in 0..12 {
        let before = Instant::now();
        let (revision, at) = server
            .send(Resource::EndpointSlices, 3, Change::Seen, WITHIN)
            .await
            .unwrap();
        assert!(before <= at && at <= Instant::now());
        let change = next(&mut said).await;
        let model::Change::Applied(Object::EndpointSlice(slice)) = change else {
            panic!("{change:?}");
        };
        let address = slice.endpoints[0].address;
        assert_eq!(address, moving_address(3, revision));
        // For more than one watch.
        tokio::time::sleep(Duration::from_millis(260)).await;
    }
}
