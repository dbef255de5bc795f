//! The kube source without an API server: what an earlier run saved stands in, and is taken back when the
//! server says otherwise.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::Reader;
use super::api_server::ApiServer;
use super::kube::{eventually, options, policy, service};
use crate::model::{ClusterPolicy, Kind, Object, ObjectName, Policy, Tier};
use crate::watch::kube::{KubeSource, Timing, connect};
use crate::watch::saved::{SAVED_OBJECTS, SavedObjects};
use crate::watch::saving::{Pace, Saving};
use crate::watch::status::{Health, WatchStatus};

const PATIENCE: Duration = Duration::from_millis(300);
const SETTLE: Duration = Duration::from_millis(20);
const BETWEEN: Duration = Duration::from_millis(200);

/// A run of the source, with what earlier runs saved in a folder.
struct Run {
    reader: Reader,
    health: watch::Receiver<Health>,
    task: JoinHandle<()>,
}

impl Run {
    async fn start(server: &ApiServer, folder: &Path) -> Self {
        let timing = Timing {
            watch: Duration::from_secs(2),
            retry_min: Duration::from_millis(10),
            retry_max: Duration::from_millis(50),
            between_lists: Duration::from_millis(50),
            proof: Duration::from_millis(100),
            patience: PATIENCE,
            ..Timing::default()
        };
        let servers = connect(&options(&format!("http://{}", server.addr)), &timing)
            .await
            .unwrap();
        let source = KubeSource::new(servers, timing).saving(Saving {
            to: saved(folder),
            pace: Pace {
                settle: SETTLE,
                between: BETWEEN,
                confirm: Duration::from_millis(100),
            },
        });
        let health = source.health();
        let (sender, receiver) = mpsc::channel(16);
        Self {
            reader: Reader::new(receiver),
            health,
            task: tokio::spawn(source.run(sender)),
        }
    }

    async fn until_all(&mut self, what: &str, is_so: impl Fn(&WatchStatus) -> bool) {
        let waiting = self.health.wait_for(|health| health.values().all(&is_so));
        let found = tokio::time::timeout(Duration::from_secs(5), waiting)
            .await
            .is_ok();
        assert!(found, "{what}: {:?}", self.health.borrow());
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn saved(folder: &Path) -> SavedObjects {
    SavedObjects::new(folder.join(SAVED_OBJECTS), "n1".into())
}

/// The names of the services in the file.
fn saved_services(folder: &Path) -> Option<Vec<String>> {
    let objects = saved(folder).load()?.objects;
    let mut names: Vec<_> = objects
        .iter()
        .map(|object| object.id())
        .filter(|id| id.kind == Kind::Service)
        .map(|id| id.name.name.to_string())
        .collect();
    names.sort();
    Some(names)
}

fn is_stale(status: &WatchStatus) -> bool {
    matches!(status, WatchStatus::Stale { .. })
}

/// A folder in which a run has saved these services and a policy.
async fn saved_by_a_run(server: &ApiServer, services: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in services {
        server.put(service(name));
    }
    server.put(policy(json!({})));
    let mut run = Run::start(server, folder.path()).await;
    run.reader.until_complete().await;
    let mut names = services.to_vec();
    names.sort_unstable();
    eventually("they are saved", || {
        saved_services(folder.path()).is_some_and(|saved| saved == names)
    })
    .await;
    folder
}

#[tokio::test]
async fn what_was_saved_stands_in_for_a_server_that_is_away() {
    let mut server = ApiServer::start();
    let folder = saved_by_a_run(&server, &["stays", "goes"]).await;
    server.stop();
    let began = SystemTime::now();

    let mut run = Run::start(&server, folder.path()).await;
    run.reader.until_complete().await;
    assert!(
        began.elapsed().unwrap() >= PATIENCE,
        "the server is asked first"
    );
    run.until_all("stale, and why", |status| {
        matches!(
            status,
            WatchStatus::Stale { of, error: Some(error), .. }
                if *of <= began && error.starts_with("cannot list ")
        )
    })
    .await;
    let reader = &run.reader;
    assert!(reader.has_service("default", "stays") && reader.has_service("default", "goes"));
    let name = ObjectName::new("default", "p");
    assert!(reader.snapshot.policies.contains_key(&name));

    // Nothing that could wake anybody is written afterwards.
    server.delete_silently("services", "default/goes");
    server.delete_silently("networkpolicies", "default/p");
    server.put(service("new"));
    server.start_again().await;
    run.reader
        .until("the state of now is there", |r| {
            r.has_service("default", "new")
                && !r.has_service("default", "goes")
                && r.snapshot.policies.is_empty()
        })
        .await;
    assert!(run.reader.has_service("default", "stays"));
    run.until_all("current", |status| *status == WatchStatus::Synced)
        .await;
    eventually("the state of now is saved", || {
        saved_services(folder.path()).is_some_and(|saved| saved == ["new", "stays"])
    })
    .await;
}

#[tokio::test]
async fn a_server_that_answers_in_time_goes_before_what_was_saved() {
    let server = ApiServer::start();
    let folder = saved_by_a_run(&server, &["stays", "goes"]).await;
    server.delete("services", "default/goes");
    let mut run = Run::start(&server, folder.path()).await;
    run.reader.until_complete().await;
    tokio::time::sleep(2 * PATIENCE).await;
    run.reader.catch_up();
    assert!(!run.reader.has_service("default", "goes"));
    let was_said = |change: &crate::model::Change| format!("{change:?}").contains("\"goes\"");
    assert!(!run.reader.seen.iter().any(was_said));
    assert!(run.reader.synced.values().all(|times| *times == 1));
}

#[tokio::test]
async fn one_kind_that_is_refused_is_stale_alone() {
    let server = ApiServer::start();
    let folder = saved_by_a_run(&server, &["a"]).await;
    server.put(service("b"));
    server.forbid("list", "networkpolicies");
    let mut run = Run::start(&server, folder.path()).await;
    run.reader.until_complete().await;
    let stale: Vec<_> = {
        let health = run.health.borrow();
        let stale = health.iter().filter(|(_, status)| is_stale(status));
        stale.map(|(kind, _)| *kind).collect()
    };
    assert_eq!(stale, [Kind::NetworkPolicy]);
    assert!(run.reader.has_service("default", "b"));
    assert_eq!(run.reader.snapshot.policies.len(), 1);
    // What is not all from the server is not saved: the file would look newer than the policies are.
    tokio::time::sleep(3 * BETWEEN).await;
    assert_eq!(saved_services(folder.path()).unwrap(), ["a"]);
    server.permit("list", "networkpolicies");
    eventually("saved when all of it is from the server", || {
        saved_services(folder.path()).unwrap() == ["a", "b"]
    })
    .await;
}

#[tokio::test]
async fn nothing_saved_and_nothing_usable_saved_stand_in_for_nothing() {
    let mut server = ApiServer::start();
    let folder = saved_by_a_run(&server, &["a"]).await;
    server.stop();
    let path = folder.path().join(SAVED_OBJECTS);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("10.96.0.1", "10.96.0.2")).unwrap();
    for what in ["damaged", "absent"] {
        let mut run = Run::start(&server, folder.path()).await;
        run.reader.silence(2 * PATIENCE).await;
        assert!(!run.health.borrow().values().any(is_stale), "{what}");
        assert!(!path.exists(), "{what}");
    }
}

#[tokio::test]
async fn it_is_written_when_something_changed_and_not_often() {
    let server = ApiServer::start();
    let folder = saved_by_a_run(&server, &["s0"]).await;
    let mut run = Run::start(&server, folder.path()).await;
    run.reader.until_complete().await;
    // A file that is replaced is another file.
    let path = folder.path().join(SAVED_OBJECTS);
    let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
    let modified = || fs::metadata(&path).unwrap().modified().unwrap();
    let size = || fs::metadata(&path).unwrap().len();
    tokio::time::sleep(2 * BETWEEN).await;
    let (first, age, at_first) = (inode(), modified(), size());
    eventually("what stays the same is confirmed", || modified() > age).await;
    assert_eq!(
        (inode(), size()),
        (first, at_first),
        "and not written again"
    );

    let mut sizes = std::collections::BTreeSet::from([at_first]);
    let began = std::time::Instant::now();
    let mut i = 0;
    while began.elapsed() < 10 * BETWEEN {
        i += 1;
        server.put(service(&format!("s{i}")));
        tokio::time::sleep(Duration::from_millis(5)).await;
        run.reader.catch_up();
        sizes.insert(size());
    }
    let last = format!("s{i}");
    run.reader
        .until("the last", |r| r.has_service("default", &last))
        .await;
    eventually("the last is saved", || {
        saved_services(folder.path()).unwrap().contains(&last)
    })
    .await;
    assert!((2..=12).contains(&sizes.len()), "{} times", sizes.len());
    assert_eq!(inode(), first, "changes go behind what is there");
}

/// However the source ends: nobody reads any more, or its task is ended.
#[tokio::test]
async fn what_was_said_last_is_saved_when_it_ends() {
    for is_ended in [false, true] {
        let server = ApiServer::start();
        let folder = saved_by_a_run(&server, &["s0"]).await;
        let mut run = Run::start(&server, folder.path()).await;
        run.reader.until_complete().await;
        let path = folder.path().join(SAVED_OBJECTS);
        let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
        let before = inode();
        eventually("this run has saved", || inode() != before).await;
        // What follows comes before the next time to write.
        server.put(service("last"));
        run.reader
            .until("it is said", |r| r.has_service("default", "last"))
            .await;
        assert_eq!(saved_services(folder.path()).unwrap(), ["s0"], "not yet");
        if is_ended {
            run.task.abort();
        } else {
            run.reader = Reader::new(mpsc::channel(1).1);
        }
        let began = std::time::Instant::now();
        eventually("it is saved", || {
            saved_services(folder.path()).unwrap() == ["last", "s0"]
        })
        .await;
        assert!(began.elapsed() < BETWEEN / 2, "before its time");
    }
}

#[tokio::test]
async fn a_file_that_somebody_takes_away_is_written_again() {
    let server = ApiServer::start();
    let folder = saved_by_a_run(&server, &["a"]).await;
    let mut run = Run::start(&server, folder.path()).await;
    run.reader.until_complete().await;
    let path = folder.path().join(SAVED_OBJECTS);
    tokio::time::sleep(2 * BETWEEN).await;
    fs::remove_file(&path).unwrap();
    server.put(service("b"));
    eventually("all of it is there again", || {
        path.exists() && saved_services(folder.path()).is_some_and(|saved| saved == ["a", "b"])
    })
    .await;
}

fn cluster_policy(name: &str, tier: &str, priority: u32) -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": {"tier": tier, "priority": priority, "subject": {"namespaces": {}},
            "ingress": [{"action": "Accept", "from": [{"namespaces": {}}]}]},
    })
}

/// The policy of [`policy`], and these ClusterNetworkPolicies by name.
fn policies(run: &Run) -> (Policy, [ClusterPolicy; 2]) {
    let snapshot = &run.reader.snapshot;
    let policy = &snapshot.policies[&ObjectName::new("default", "p")];
    let tiered = ["good", "never"].map(|it| ClusterPolicy::clone(&snapshot.cluster_policies[it]));
    (Policy::clone(policy), tiered)
}

/// What a run has saved of the last two.
fn saved_stand_ins(folder: &Path) -> Vec<bool> {
    let objects = saved(folder).load().map_or_else(Vec::new, |it| it.objects);
    let tiered = |it: &Object| matches!(it, Object::ClusterPolicy(_)).then(|| it.is_stand_in());
    objects.iter().filter_map(tiered).collect()
}

#[tokio::test]
async fn what_is_not_understood_any_more_means_the_same_before_and_after_a_restart() {
    let server = ApiServer::start();
    let folder = tempfile::tempdir().unwrap();
    server.put(policy(json!({})));
    server.put(cluster_policy("good", "Admin", 7));
    server.put(cluster_policy("never", "Admin", 2000));
    let mut run = Run::start(&server, folder.path()).await;
    run.reader.until_complete().await;
    let first = policies(&run);
    server.put(policy(json!({"from": [{"nobody": "knows"}]})));
    server.put(cluster_policy("good", "Baseline", 2000));
    run.reader
        .until("three are not understood", |r| r.quarantined.len() == 3)
        .await;
    let before = policies(&run);
    assert_eq!(before, first, "the last good state holds");
    assert!(!before.1[0].is_stand_in && before.1[1].is_stand_in);
    eventually("they are saved", || {
        saved_stand_ins(folder.path()) == [false, true]
    })
    .await;
    // Again and again: the file of a run is read by the next.
    for _ in 0..2 {
        drop(run);
        run = Run::start(&server, folder.path()).await;
        run.reader.until_complete().await;
        run.reader
            .until("they are reported", |r| r.quarantined.len() == 3)
            .await;
        assert_eq!(policies(&run), before);
        eventually("they are saved again", || {
            saved_stand_ins(folder.path()) == [false, true]
        })
        .await;
    }
    // What was never understood has no last good state, also where it is another now.
    drop(run);
    server.put(cluster_policy("never", "Baseline", 2000));
    let mut run = Run::start(&server, folder.path()).await;
    run.reader.until_complete().await;
    let (_, [good, never]) = policies(&run);
    assert_eq!(good, before.1[0]);
    assert!(never.is_stand_in && never.tier == Tier::Baseline);
}

#[tokio::test]
async fn of_what_is_gone_when_the_agent_starts_no_last_good_state_is_left() {
    let server = ApiServer::start();
    let folder = saved_by_a_run(&server, &["a"]).await;
    server.delete("networkpolicies", "default/p");
    let mut run = Run::start(&server, folder.path()).await;
    run.reader.until_complete().await;
    server.put(policy(json!({"from": [{"nobody": "knows"}]})));
    run.reader
        .until("another of its name", |r| !r.snapshot.policies.is_empty())
        .await;
    let policy = run.reader.snapshot.policies.values().next().unwrap();
    assert!(Object::Policy(policy.clone()).is_stand_in(), "{policy:?}");
}
