//! The kube source against an API server that misbehaves.

use std::cell::RefCell;
use std::io::Write;
use std::sync::Once;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::Reader;
use super::api_server::ApiServer;
use crate::model::{Kind, ObjectName, PeerSelector, Peers};
use crate::watch::kube::{
    ConnectError, Credentials, KubeOptions, KubeSource, LOG_FILTER, Timing, connect,
};
use crate::watch::status::{Cause, Health, WatchStatus};

pub(super) struct Running {
    pub(super) reader: Reader,
    pub(super) health: watch::Receiver<Health>,
    task: JoinHandle<()>,
}

impl Running {
    pub(super) async fn start(server: &ApiServer) -> Self {
        Self::with(&[server], quick()).await
    }

    pub(super) async fn with(servers: &[&ApiServer], timing: Timing) -> Self {
        let mut options = options("");
        let urls = servers.iter().map(|s| format!("http://{}", s.addr));
        options.servers = urls.collect();
        let servers = connect(&options, &timing).await.unwrap();
        let source = KubeSource::new(servers, timing);
        let health = source.health();
        let (sender, receiver) = mpsc::channel(16);
        Self {
            reader: Reader::new(receiver),
            health,
            task: tokio::spawn(source.run(sender)),
        }
    }

    pub(super) async fn until_health(&mut self, kind: Kind, is_so: impl Fn(&WatchStatus) -> bool) {
        let waiting = self.health.wait_for(|health| is_so(&health[&kind]));
        let is_found = tokio::time::timeout(Duration::from_secs(5), waiting)
            .await
            .is_ok();
        assert!(is_found, "{:?}", self.health.borrow()[&kind]);
    }
}

/// Patient for a tenth of a second, where production is for a minute.
pub(super) fn quick() -> Timing {
    Timing {
        watch: Duration::from_secs(2),
        retry_min: Duration::from_millis(10),
        retry_max: Duration::from_millis(50),
        between_lists: Duration::from_millis(50),
        proof: Duration::from_millis(100),
        ..Timing::default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) async fn eventually(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..500 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 5 s: {what}");
}

pub(super) fn options(server: &str) -> KubeOptions {
    let kubeconfig = tempfile::NamedTempFile::new().unwrap();
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": "https://192.0.2.1:6443"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    });
    std::fs::write(kubeconfig.path(), text.to_string()).unwrap();
    let (_, path) = kubeconfig.keep().unwrap();
    KubeOptions {
        credentials: Credentials::Kubeconfig(path),
        servers: vec![server.to_owned()],
    }
}

pub(super) fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name, "managedFields": [{"manager": "x"}]},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80, "protocol": "TCP"}]},
    })
}

fn slice(address: &str) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"namespace": "default", "name": "web-1",
            "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": null,
        "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": [address]}],
    })
}

pub(super) fn policy(rule: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "default", "name": "p"},
        "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [rule]},
    })
}

#[tokio::test]
async fn an_empty_cluster_is_synced_and_a_silent_one_is_not() {
    let server = ApiServer::start();
    let mut empty = Running::start(&server).await;
    empty.reader.until_complete().await;
    assert!(empty.reader.snapshot.services.is_empty());
    empty
        .until_health(Kind::Service, |s| *s == WatchStatus::Synced)
        .await;

    let mut stopped = ApiServer::start();
    stopped.stop();
    let mut silent = Running::start(&stopped).await;
    silent
        .until_health(Kind::Service, |s| {
            matches!(
                s,
                WatchStatus::Retrying { cause: Cause::Unreachable, error, .. }
                    if error.starts_with("cannot list services: ")
            )
        })
        .await;
    silent.reader.silence(Duration::from_millis(100)).await;
    assert_eq!(silent.reader.snapshot.missing().count(), Kind::ALL.len());
}

#[tokio::test]
async fn objects_are_applied_and_deleted_as_they_change() {
    let server = ApiServer::start();
    server.put(service("a"));
    let mut running = Running::start(&server).await;
    running.reader.until_complete().await;
    assert!(running.reader.has_service("default", "a"));
    server.put(service("b"));
    server.delete("services", "default/a");
    running
        .reader
        .until("b has come and a has gone", |r| {
            r.has_service("default", "b") && !r.has_service("default", "a")
        })
        .await;
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_without_a_new_list() {
    let server = ApiServer::start();
    let mut running = Running::start(&server).await;
    running.reader.until_complete().await;
    for round in 0..3 {
        let watches = server.watches("services");
        server.cut();
        eventually("it watches again", || server.watches("services") > watches).await;
        let name = format!("s{round}");
        server.put(service(&name));
        running
            .reader
            .until("the service is there", |r| r.has_service("default", &name))
            .await;
    }
    assert_eq!(server.lists("services"), 1);
}

#[tokio::test]
async fn what_was_deleted_in_a_watch_gap_is_found_by_the_next_list() {
    let server = ApiServer::start();
    server.put(service("stays"));
    server.put(service("goes"));
    let mut running = Running::start(&server).await;
    running.reader.until_complete().await;
    // Nothing is written afterwards that could wake anybody up.
    server.delete_silently("services", "default/goes");
    server.compact();
    server.cut();
    running
        .reader
        .until("the lost deletion is made up for", |r| {
            !r.has_service("default", "goes")
        })
        .await;
    assert!(running.reader.has_service("default", "stays"));
    assert_eq!(server.lists("services"), 2);
}

#[tokio::test]
async fn a_storm_of_410_is_not_a_storm_of_lists() {
    let server = ApiServer::start();
    let timing = Timing {
        watch: Duration::from_secs(2),
        retry_min: Duration::from_millis(1),
        retry_max: Duration::from_millis(2),
        between_lists: Duration::from_millis(300),
        ..Timing::default()
    };
    let mut running = Running::with(&[&server], timing).await;
    running.reader.until_complete().await;
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_millis(1000) {
        server.compact();
        server.cut();
        tokio::time::sleep(Duration::from_millis(10)).await;
        // Otherwise the source would wait for the reader instead.
        running.reader.catch_up();
    }
    let lists = server.lists("services");
    assert!((2..=5).contains(&lists), "{lists} lists in a second");
    assert_eq!(running.health.borrow()[&Kind::Service], WatchStatus::Synced);
}

#[tokio::test]
async fn a_missing_permission_to_list_is_said_once_and_its_return_once() {
    a_missing_permission_is_said_once("list").await;
}

#[tokio::test]
async fn a_missing_permission_to_watch_is_said_once_and_its_return_once() {
    a_missing_permission_is_said_once("watch").await;
}

async fn a_missing_permission_is_said_once(verb: &'static str) {
    Log::install();
    let server = ApiServer::start();
    server.forbid(verb, "networkpolicies");
    let mut running = Running::start(&server).await;
    let is_forbidden = |s: &WatchStatus| {
        matches!(
            s,
            WatchStatus::Retrying {
                cause: Cause::Forbidden,
                ..
            }
        )
    };
    running
        .until_health(Kind::NetworkPolicy, is_forbidden)
        .await;
    // Some ten attempts.
    for _ in 0..60 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        running.reader.catch_up();
        assert!(is_forbidden(&running.health.borrow()[&Kind::NetworkPolicy]));
    }
    let missing: Vec<_> = running.reader.snapshot.missing().collect();
    match verb {
        "list" => assert_eq!(missing, [Kind::NetworkPolicy]),
        _ => assert!(missing.is_empty() && server.lists("networkpolicies") == 1),
    }
    let WatchStatus::Retrying { error, .. } = running.health.borrow()[&Kind::NetworkPolicy].clone()
    else {
        panic!("it is forbidden");
    };
    assert_eq!(
        error,
        format!(
            "not allowed to {verb} networkpolicies: add apiGroups [\"networking.k8s.io\"], resources \
             [\"networkpolicies\"], verbs [\"list\", \"watch\"] to the ClusterRole weir-agent (the API server \
             says: networkpolicies is forbidden: User \"weir\" cannot {verb} resource \"networkpolicies\")"
        )
    );
    server.permit(verb, "networkpolicies");
    running.reader.until_complete().await;
    running
        .until_health(Kind::NetworkPolicy, |s| *s == WatchStatus::Synced)
        .await;
    let text = Log::text();
    assert_eq!(text.matches("not allowed to").count(), 1, "{text}");
    assert_eq!(text.matches("watch recovered").count(), 1, "{text}");
    assert_eq!(text.lines().count(), 2, "{text}");
}

#[tokio::test]
async fn refused_credentials_are_said_to_be_so() {
    let server = ApiServer::start();
    server.lock();
    let mut running = Running::start(&server).await;
    for kind in Kind::ALL {
        running
            .until_health(kind, |s| {
                matches!(
                    s,
                    WatchStatus::Retrying { cause: Cause::Unauthorized, error, .. }
                        if error.contains("check the kubeconfig")
                )
            })
            .await;
    }
}

#[tokio::test]
async fn a_bad_object_keeps_its_last_good_state_and_disturbs_nobody() {
    let server = ApiServer::start();
    server.put(service("good"));
    server.put(service("turns"));
    let mut bad = service("bad");
    bad["spec"]["clusterIP"] = json!("10.96.0");
    server.put(bad);
    let mut running = Running::start(&server).await;
    running.reader.until_complete().await;
    let reader = &mut running.reader;
    assert!(reader.has_service("default", "good"));
    assert!(!reader.has_service("default", "bad"));
    assert_eq!(
        reader.quarantined["Service default/bad"],
        "spec.clusterIPs: \"10.96.0\" is not an IP address"
    );
    let mut turned = service("turns");
    turned["spec"]["ports"] = json!("eighty");
    server.put(turned);
    reader
        .until("turns is quarantined", |r| {
            r.quarantined.contains_key("Service default/turns")
        })
        .await;
    assert!(reader.has_service("default", "turns"));
    assert!(reader.quarantined["Service default/turns"].starts_with("spec.ports: invalid type"));
    server.put(service("turns"));
    server.delete("services", "default/bad");
    reader
        .until("both are released", |r| r.quarantined.is_empty())
        .await;
}

#[tokio::test]
async fn a_bad_endpoint_is_left_out_by_number() {
    let server = ApiServer::start();
    server.put(slice("127.0.0.1"));
    let mut running = Running::start(&server).await;
    let reader = &mut running.reader;
    reader.until_complete().await;
    assert_eq!(
        reader.quarantined["EndpointSlice default/web-1 endpoint 1"],
        "127.0.0.1 is a loopback address"
    );
    let name = ObjectName::new("default", "web-1");
    assert_eq!(reader.snapshot.slices[&name].endpoints.len(), 1);
    server.put(slice("10.0.0.2"));
    reader
        .until("the endpoint is well", |r| r.quarantined.is_empty())
        .await;
    assert_eq!(reader.snapshot.slices[&name].endpoints.len(), 2);
}

#[tokio::test]
async fn a_policy_that_is_not_understood_closes_until_it_was_understood_once() {
    let name = ObjectName::new("default", "p");
    let unknown = || policy(json!({"from": [{"podSelector": {}}], "except": []}));
    let server = ApiServer::start();
    server.put(unknown());
    let mut running = Running::start(&server).await;
    let reader = &mut running.reader;
    reader.until_complete().await;
    let reason =
        "spec.ingress[0].except: unknown field `except`, expected one of `from`, `to`, `ports`";
    assert_eq!(reader.quarantined["NetworkPolicy default/p"], reason);
    let closed = reader.snapshot.policies[&name].clone();
    assert_eq!(closed.subject.requirements.len(), 1);
    let rules = closed.ingress.as_ref().unwrap();
    assert!(
        matches!(&rules[..], [rule] if rule.peers == Peers::Of(vec![PeerSelector::Unsupported(reason.into())]))
    );
    assert_eq!(closed.egress, None);

    server.put(policy(json!({"from": [{"podSelector": {}}]})));
    reader
        .until("it is understood", |r| r.quarantined.is_empty())
        .await;
    let good = reader.snapshot.policies[&name].clone();
    assert_ne!(good, closed);
    server.put(unknown());
    reader
        .until("it is not any more", |r| !r.quarantined.is_empty())
        .await;
    assert_eq!(reader.snapshot.policies[&name], good);
    server.delete("networkpolicies", "default/p");
    reader
        .until("it is gone", |r| {
            r.quarantined.is_empty() && r.snapshot.policies.is_empty()
        })
        .await;
}

#[tokio::test]
async fn a_server_that_falls_silent_is_noticed() {
    let server = ApiServer::start();
    server.put(service("a"));
    let timing = Timing {
        quiet: Duration::from_millis(800),
        answer: Duration::from_millis(300),
        ..quick()
    };
    let within = timing.quiet + timing.answer;
    let mut running = Running::with(&[&server], timing).await;
    running.reader.until_complete().await;
    server.freeze();
    let began = std::time::Instant::now();
    for kind in Kind::ALL {
        running
            .until_health(kind, |s| {
                matches!(
                    s,
                    WatchStatus::Retrying { cause: Cause::Unreachable, error, .. }
                        if error.contains(": no answer within 300ms")
                )
            })
            .await;
    }
    let took = began.elapsed();
    assert!(took < within + within / 2, "{took:?}");
    assert!(running.reader.has_service("default", "a"));
    let Timing { quiet, answer, .. } = Timing::default();
    assert!(quiet + answer <= Duration::from_secs(60), "in production");
}

#[tokio::test]
async fn the_source_ends_when_nobody_reads() {
    let server = ApiServer::start();
    let mut running = Running::start(&server).await;
    running.reader = Reader::new(mpsc::channel(1).1);
    let task = std::mem::replace(&mut running.task, tokio::spawn(async {}));
    tokio::time::timeout(Duration::from_secs(2), task)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn wrong_options_say_what_to_change() {
    let timing = Timing::default();
    let wrong = options("10.0.0.1:6443");
    assert!(matches!(
        connect(&wrong, &timing).await,
        Err(ConnectError::Server(_))
    ));
    let absent = KubeOptions {
        credentials: Credentials::Kubeconfig("/nonexistent/config".into()),
        servers: Vec::new(),
    };
    let Err(error) = connect(&absent, &timing).await else {
        panic!("there is no such file");
    };
    let text = error.to_string();
    assert!(text.contains("/nonexistent/config"), "{text}");
}

/// What this thread has logged. A subscriber of one thread alone would not do: which call sites are on is
/// remembered for the whole process.
pub(super) struct Log;

thread_local! {
    static TEXT: RefCell<String> = const { RefCell::new(String::new()) };
}

impl Log {
    pub(super) fn install() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            tracing_subscriber::fmt()
                .with_env_filter(format!("info,{LOG_FILTER}"))
                .with_ansi(false)
                .with_writer(|| Self)
                .init();
        });
    }

    pub(super) fn text() -> String {
        TEXT.with_borrow(String::clone)
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        TEXT.with_borrow_mut(|text| text.push_str(&String::from_utf8_lossy(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
