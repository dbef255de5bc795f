//! The feed from both ends, over a real socket.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hickory_proto::rr::{Name, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use weir_dns::feed::{Client, Peer, Server, SharedZone, ZoneChange};
use weir_dns::zone::{Answer, ServiceName, Zone};

use crate::support::{PATIENCE, cluster_ip, domain, external, headless, until};

const PEER: Peer = Peer { uid: 0, gid: 0 };

struct Agent {
    feed: Server,
    task: JoinHandle<()>,
}

impl Agent {
    fn start(path: &Path) -> Self {
        let feed = Server::new("cluster.local");
        let listener = Server::bind(path, PEER).unwrap();
        let task = tokio::spawn(feed.clone().serve(listener, PEER));
        Self { feed, task }
    }

    fn say(&self, names: &[&str]) {
        for (n, name) in names.iter().enumerate() {
            let address = format!("10.96.1.{n}");
            self.feed
                .publish(ZoneChange::Upsert(cluster_ip(name, &address)));
        }
    }

    async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

struct Dns {
    zone: SharedZone,
    task: JoinHandle<()>,
}

impl Dns {
    fn start(path: PathBuf) -> Self {
        let zone = SharedZone::default();
        let client = Client::new(path, domain(), 5, zone.clone());
        Self {
            zone,
            task: tokio::spawn(client.run()),
        }
    }

    /// Which of these names the zone has; `None` without a zone.
    fn has(&self, names: &[&str]) -> Option<Vec<bool>> {
        let zone = self.zone.load();
        let zone = zone.as_ref()?;
        Some(
            names
                .iter()
                .map(|name| {
                    let name =
                        Name::from_ascii(format!("{name}.default.svc.cluster.local.")).unwrap();
                    matches!(zone.answer(&name, RecordType::A), Answer::Records { .. })
                })
                .collect(),
        )
    }

    async fn until(&self, names: &[&str], expected: Option<Vec<bool>>) {
        until(&format!("{names:?} are {expected:?}"), async || {
            self.has(names) == expected
        })
        .await;
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_while_nobody_looked_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zone.sock");
    let names = ["a", "b", "c"];
    let dns = Dns::start(path.clone());
    let agent = Agent::start(&path);
    agent.say(&["a", "b"]);
    until("connected", async || agent.feed.clients() == 1).await;
    assert_eq!(
        dns.has(&names),
        None,
        "nothing is served before all is said"
    );
    agent.feed.publish(ZoneChange::Synced);
    dns.until(&names, Some(vec![true, true, false])).await;

    agent.say(&["a", "b", "c"]);
    dns.until(&names, Some(vec![true, true, true])).await;
    agent
        .feed
        .publish(ZoneChange::Remove(ServiceName::new("default", "a")));
    dns.until(&names, Some(vec![false, true, true])).await;

    agent.kill().await;
    assert_eq!(
        dns.has(&names),
        Some(vec![false, true, true]),
        "the last zone stays"
    );
    let agent = Agent::start(&path);
    agent.say(&["c"]);
    until("connected again", async || agent.feed.clients() == 1).await;
    assert_eq!(
        dns.has(&names),
        Some(vec![false, true, true]),
        "half a zone is not served"
    );
    agent.feed.publish(ZoneChange::Synced);
    dns.until(&names, Some(vec![false, false, true])).await;
    agent.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_client_gets_the_same_zone_whenever_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zone.sock");
    let agent = Agent::start(&path);
    agent.feed.publish(ZoneChange::Namespace("default".into()));
    agent.feed.publish(ZoneChange::Namespace("gone".into()));
    agent.feed.publish(ZoneChange::Synced);
    let mut random = fastrand::Rng::with_seed(3);
    let mut expected = BTreeMap::new();
    let mut clients = Vec::new();
    for n in 0..2000 {
        if n % 500 == 0 {
            clients.push(Dns::start(path.clone()));
        }
        let name = format!("s{}", random.u8(0..50));
        let change = match random.u8(0..4) {
            0 => {
                expected.remove(&name);
                ZoneChange::Remove(ServiceName::new("default", name))
            }
            kind => {
                let service = match kind {
                    1 => cluster_ip(&name, &format!("10.96.0.{}", random.u8(..))),
                    2 => headless(&name, random.u16(0..20)),
                    _ => external(&name, "www.example.com"),
                };
                expected.insert(name, service.clone());
                ZoneChange::Upsert(service)
            }
        };
        agent.feed.publish(change);
        if n % 20 == 0 {
            tokio::task::yield_now().await;
        }
    }
    agent.feed.publish(ZoneChange::NamespaceGone("gone".into()));
    let mut built = Zone::new(domain(), 5, 0);
    built.announce(&"default".into());
    for service in expected.into_values() {
        built.upsert(service);
    }
    for (n, client) in clients.iter().enumerate() {
        until(&format!("client {n} has all"), async || {
            client
                .zone
                .load()
                .as_ref()
                .is_some_and(|zone| zone.same_names(&built))
        })
        .await;
    }
    agent.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_let_go() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zone.sock");
    let agent = Agent::start(&path);
    agent.feed.publish(ZoneChange::Synced);
    let mut idle = UnixStream::connect(&path).await.unwrap();
    until("connected", async || agent.feed.clients() == 1).await;
    let mut published = 0u32;
    until("let go", async || {
        for _ in 0..500 {
            published += 1;
            let address = std::net::Ipv4Addr::from(published).to_string();
            agent
                .feed
                .publish(ZoneChange::Upsert(cluster_ip("web", &address)));
        }
        agent.feed.clients() == 0
    })
    .await;
    assert!(published > 4000, "only after a whole backlog: {published}");
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).await.unwrap();
    assert!(!rest.is_empty());
    agent.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_a_feed_of_ours_is_hung_up_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zone.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let dns = Dns::start(path);
    for said in [
        "{\"begin\":{\"version\":1,\"domain\":\"other.local\"}}\n\"synced\"\n",
        "{\"begin\":{\"version\":999,\"domain\":\"cluster.local\"}}\n\"synced\"\n",
        "\"synced\"\n",
        "{\"begin\":{\"version\":1,\"domain\":\"cluster.local\"}}\nnot json\n",
    ] {
        let accepted = tokio::time::timeout(PATIENCE, listener.accept()).await;
        let (mut stream, _) = accepted.expect("it tries again").unwrap();
        stream.write_all(said.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "it hangs up after {said}");
        assert!(dns.zone.load().is_none(), "{said}");
    }
    let (mut stream, _) = listener.accept().await.unwrap();
    let right = "{\"begin\":{\"version\":1,\"domain\":\"cluster.local\"}}\n\"synced\"\n";
    stream.write_all(right.as_bytes()).await.unwrap();
    until("it believes a right one", async || {
        dns.zone.load().is_some()
    })
    .await;
}
