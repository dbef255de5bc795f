//! An API server that lists and watches, and misbehaves on command.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::stream;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

/// The resource that a cluster may be without, and its group.
pub(super) const OPTIONAL: &str = "clusternetworkpolicies";
const GROUP: &str = "policy.networking.k8s.io";

pub(super) struct ApiServer {
    pub(super) addr: SocketAddr,
    front: Arc<Front>,
    /// Its own, so that stopping it takes every connection with it.
    runtime: Option<Runtime>,
}

/// One server; several may have one store.
struct Front {
    shared: Arc<Shared>,
    is_frozen: AtomicBool,
    /// How often it was asked for anything.
    calls: AtomicUsize,
}

struct Shared {
    store: Mutex<Store>,
    /// Moves with every change of the store.
    version: watch::Sender<u64>,
    /// Moves when every open watch is to break.
    cut: watch::Sender<u64>,
    /// Moves when every open watch is to be told how far it is.
    mark: watch::Sender<u64>,
}

#[derive(Default)]
struct Store {
    version: u64,
    /// Watches from before this are answered with 410 Gone.
    compacted: u64,
    objects: BTreeMap<(String, String), Value>,
    /// Version, resource, type and object.
    log: Vec<(u64, String, &'static str, Value)>,
    /// Verb and resource.
    forbidden: BTreeSet<(&'static str, String)>,
    is_locked: bool,
    /// Versions of [`OPTIONAL`]; without any the server has no such kind.
    optional: Vec<&'static str>,
    /// It says so of every kind that exists.
    is_forgetful: bool,
    /// 410 is the answer to the call, and not an event of the watch.
    is_blunt: bool,
    /// How often it was asked for all groups.
    searches: usize,
    /// Without those of a single object.
    lists: BTreeMap<String, usize>,
    watches: BTreeMap<String, usize>,
    /// `timeoutSeconds` of all watches.
    lengths: Vec<u64>,
}

impl ApiServer {
    pub(super) fn start() -> Self {
        Self::of(Arc::new(Shared {
            store: Mutex::new(Store {
                optional: vec!["v1alpha2"],
                ..Store::default()
            }),
            version: watch::Sender::new(0),
            cut: watch::Sender::new(0),
            mark: watch::Sender::new(0),
        }))
    }

    /// Another server of the same cluster.
    pub(super) fn start_beside(&self) -> Self {
        Self::of(self.front.shared.clone())
    }

    fn of(shared: Arc<Shared>) -> Self {
        let front = Arc::new(Front {
            shared,
            is_frozen: AtomicBool::new(false),
            calls: AtomicUsize::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let mut server = Self {
            addr,
            front,
            runtime: None,
        };
        server.serve(listener);
        server
    }

    fn serve(&mut self, listener: TcpListener) {
        let router = Router::new()
            .route("/api/v1/{resource}", get(answer))
            .route("/apis/{group}/{version}/{resource}", get(answer_group))
            .route("/apis", get(groups))
            .route("/apis/{group}", get(group))
            .route("/apis/{group}/{version}", get(resources))
            .with_state(self.front.clone());
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        listener.set_nonblocking(true).unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            axum::serve(listener, router).await.unwrap();
        });
        self.runtime = Some(runtime);
    }

    /// Closes the port and every connection.
    pub(super) fn stop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }

    /// Opens the port again, with whatever was written in between.
    pub(super) async fn start_again(&mut self) {
        for _ in 0..100 {
            match TcpListener::bind(self.addr) {
                Ok(listener) => return self.serve(listener),
                // The listener of before is closed in the background.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        panic!("{} does not become free", self.addr);
    }

    /// Writes an object. Its resource follows from its kind.
    pub(super) fn put(&self, object: Value) {
        self.change(object, Said::Aloud);
    }

    pub(super) fn delete(&self, resource: &str, name: &str) {
        self.remove(resource, name, Said::Aloud);
    }

    /// Deletes without a word to any watch, as if the event were lost.
    pub(super) fn delete_silently(&self, resource: &str, name: &str) {
        self.remove(resource, name, Said::Never);
    }

    /// Breaks every open watch.
    pub(super) fn cut(&self) {
        self.front.shared.cut.send_modify(|n| *n += 1);
    }

    /// Sends a bookmark to every open watch.
    pub(super) fn bookmark(&self) {
        self.front.shared.mark.send_modify(|n| *n += 1);
    }

    /// Forgets every event so far.
    pub(super) fn compact(&self) {
        let mut store = self.store();
        store.version += 1;
        store.compacted = store.version;
        store.log.clear();
    }

    /// Refuses a watch from before [`Self::compact`] with its answer, and not with its first event.
    pub(super) fn refuse_bluntly(&self) {
        self.store().is_blunt = true;
    }

    /// As after a restore from a backup of the empty cluster: versions begin anew.
    pub(super) fn restore(&self) {
        let mut store = self.store();
        store.version = 0;
        store.objects.clear();
        store.log.clear();
    }

    pub(super) fn forbid(&self, verb: &'static str, resource: &str) {
        self.store().forbidden.insert((verb, resource.to_owned()));
    }

    pub(super) fn permit(&self, verb: &'static str, resource: &str) {
        self.store().forbidden.remove(&(verb, resource.to_owned()));
    }

    /// The optional kind is there in these versions. Without any its objects are gone, and its watches break.
    pub(super) fn have_optional(&self, versions: &[&'static str]) {
        let mut store = self.store();
        store.optional = versions.to_vec();
        if versions.is_empty() {
            store
                .objects
                .retain(|(resource, _), _| resource != OPTIONAL);
        }
        drop(store);
        self.cut();
    }

    /// Answers 404 to lists and watches of the optional kind, although it is there.
    pub(super) fn forget_optional(&self, is_so: bool) {
        self.store().is_forgetful = is_so;
        self.cut();
    }

    /// Answers 401 to everything.
    pub(super) fn lock(&self) {
        self.store().is_locked = true;
    }

    /// Keeps every connection open, and never says a word again.
    pub(super) fn freeze(&self) {
        self.front.is_frozen.store(true, Ordering::Relaxed);
    }

    pub(super) fn lists(&self, resource: &str) -> usize {
        self.store().lists.get(resource).copied().unwrap_or(0)
    }

    /// How often it was asked for all that it has.
    pub(super) fn searches(&self) -> usize {
        self.store().searches
    }

    pub(super) fn watches(&self, resource: &str) -> usize {
        self.store().watches.get(resource).copied().unwrap_or(0)
    }

    /// `timeoutSeconds` of all watches so far.
    pub(super) fn lengths(&self) -> Vec<u64> {
        self.store().lengths.clone()
    }

    /// How often this server, of those with one store, was asked.
    pub(super) fn calls(&self) -> usize {
        self.front.calls.load(Ordering::Relaxed)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.front.shared.store.lock().unwrap()
    }

    fn change(&self, mut object: Value, said: Said) {
        let resource = match object["kind"].as_str().unwrap() {
            "NetworkPolicy" => "networkpolicies".to_owned(),
            "ClusterNetworkPolicy" => OPTIONAL.to_owned(),
            kind => format!("{}s", kind.to_lowercase()),
        };
        let mut store = self.store();
        store.version += 1;
        let version = store.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let key = (resource.clone(), full_name(&object));
        let is_new = store.objects.insert(key, object.clone()).is_none();
        if let Said::Aloud = said {
            let event = if is_new { "ADDED" } else { "MODIFIED" };
            store.log.push((version, resource, event, object));
        }
        drop(store);
        self.front.shared.version.send_replace(version);
    }

    fn remove(&self, resource: &str, name: &str, said: Said) {
        let mut store = self.store();
        store.version += 1;
        let version = store.version;
        let key = (resource.to_owned(), name.to_owned());
        let mut object = store.objects.remove(&key).expect("it is there");
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        if let Said::Aloud = said {
            store
                .log
                .push((version, resource.to_owned(), "DELETED", object));
        }
        drop(store);
        self.front.shared.version.send_replace(version);
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

enum Said {
    Aloud,
    Never,
}

fn full_name(object: &Value) -> String {
    let meta = &object["metadata"];
    match meta["namespace"].as_str() {
        Some(namespace) => format!("{namespace}/{}", meta["name"].as_str().unwrap()),
        None => meta["name"].as_str().unwrap().to_owned(),
    }
}

type Parameters = Query<BTreeMap<String, String>>;

async fn answer(
    State(front): State<Arc<Front>>,
    Path(resource): Path<String>,
    parameters: Parameters,
) -> Response {
    front.calls.fetch_add(1, Ordering::Relaxed);
    thaw(&front).await;
    respond(&front, resource, &parameters)
}

async fn answer_group(
    front: State<Arc<Front>>,
    Path((_, version, resource)): Path<(String, String, String)>,
    parameters: Parameters,
) -> Response {
    let is_there = if resource == OPTIONAL {
        let store = front.shared.store.lock().unwrap();
        store.optional.contains(&version.as_str()) && !store.is_forgetful
    } else {
        version == "v1"
    };
    if !is_there {
        front.calls.fetch_add(1, Ordering::Relaxed);
        let mut store = front.shared.store.lock().unwrap();
        *store.lists.entry(resource).or_default() += 1;
        // As the real server says it of a path that nobody serves.
        return (StatusCode::NOT_FOUND, "404 page not found\n").into_response();
    }
    answer(front, Path(resource), parameters).await
}

async fn groups(front: State<Arc<Front>>) -> Response {
    front.shared.store.lock().unwrap().searches += 1;
    let group = described(&front);
    Json(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]})).into_response()
}

async fn group(front: State<Arc<Front>>, Path(_): Path<String>) -> Response {
    Json(described(&front)).into_response()
}

/// The group is there for another kind of it in any case.
fn described(front: &Front) -> Value {
    let mut versions = front.shared.store.lock().unwrap().optional.clone();
    versions.push("v1alpha1");
    let version = |it: &&str| json!({"groupVersion": format!("{GROUP}/{it}"), "version": it});
    let versions: Vec<_> = versions.iter().map(version).collect();
    json!({"kind": "APIGroup", "apiVersion": "v1", "name": GROUP, "versions": versions})
}

async fn resources(
    front: State<Arc<Front>>,
    Path((group, version)): Path<(String, String)>,
) -> Response {
    let store = front.shared.store.lock().unwrap();
    let name = if store.optional.contains(&version.as_str()) {
        OPTIONAL
    } else {
        "adminnetworkpolicies"
    };
    let resource = json!({
        "name": name, "singularName": "", "namespaced": false, "kind": "Any", "verbs": ["list", "watch"],
    });
    Json(json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": format!("{group}/{version}"),
        "resources": [resource],
    }))
    .into_response()
}

async fn thaw(front: &Front) {
    if front.is_frozen.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}

fn respond(front: &Arc<Front>, resource: String, parameters: &Parameters) -> Response {
    let shared = &front.shared;
    let is_watch = parameters.get("watch").is_some();
    let mut store = shared.store.lock().unwrap();
    if store.is_locked {
        return refuse(StatusCode::UNAUTHORIZED, "Unauthorized");
    }
    let verb = if is_watch { "watch" } else { "list" };
    if store.forbidden.contains(&(verb, resource.clone())) {
        return refuse(
            StatusCode::FORBIDDEN,
            &format!(
                "{resource} is forbidden: User \"weir\" cannot {verb} resource \"{resource}\""
            ),
        );
    }
    if !is_watch {
        if parameters.get("limit").is_none_or(|limit| limit != "1") {
            *store.lists.entry(resource.clone()).or_default() += 1;
        }
        let items: Vec<_> = store
            .objects
            .iter()
            .filter(|((r, _), _)| *r == resource)
            .map(|(_, object)| object.clone())
            .collect();
        return Json(json!({
            "kind": "List",
            "apiVersion": "v1",
            "metadata": {"resourceVersion": store.version.to_string()},
            "items": items,
        }))
        .into_response();
    }
    *store.watches.entry(resource.clone()).or_default() += 1;
    let from: u64 = parameters["resourceVersion"].parse().unwrap();
    if store.is_blunt && from < store.compacted {
        return refuse(StatusCode::GONE, "too old resource version");
    }
    let seconds: u64 = parameters["timeoutSeconds"].parse().unwrap();
    store.lengths.push(seconds);
    drop(store);
    let watch = Watch {
        seen: from,
        version: shared.version.subscribe(),
        cut: shared.cut.subscribe(),
        mark: shared.mark.subscribe(),
        end: tokio::time::Instant::now() + Duration::from_secs(seconds),
        front: front.clone(),
        resource,
        is_over: false,
    };
    Body::from_stream(stream::unfold(watch, Watch::step)).into_response()
}

fn refuse(code: StatusCode, message: &str) -> Response {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": code.as_u16(), "message": message, "reason": code.canonical_reason(),
    });
    (code, Json(status)).into_response()
}

struct Watch {
    front: Arc<Front>,
    resource: String,
    seen: u64,
    version: watch::Receiver<u64>,
    cut: watch::Receiver<u64>,
    mark: watch::Receiver<u64>,
    end: tokio::time::Instant,
    is_over: bool,
}

impl Watch {
    async fn step(mut self) -> Option<(Result<String, Infallible>, Self)> {
        loop {
            if self.is_over {
                return None;
            }
            if let Some(text) = self.news() {
                thaw(&self.front).await;
                return Some((Ok(text), self));
            }
            tokio::select! {
                changed = self.version.changed() => changed.unwrap(),
                _ = self.cut.changed() => return None,
                _ = self.mark.changed() => {
                    thaw(&self.front).await;
                    let mark = json!({"type": "BOOKMARK", "object": {
                        "kind": "Any", "apiVersion": "v1",
                        "metadata": {"resourceVersion": self.seen.to_string()},
                    }});
                    return Some((Ok(format!("{mark}\n")), self));
                }
                () = tokio::time::sleep_until(self.end) => {
                    thaw(&self.front).await;
                    return None;
                }
            }
        }
    }

    fn news(&mut self) -> Option<String> {
        let store = self.front.shared.store.lock().unwrap();
        if self.seen < store.compacted {
            self.is_over = true;
            let gone = json!({"type": "ERROR", "object": {
                "kind": "Status", "apiVersion": "v1", "status": "Failure",
                "code": 410, "reason": "Expired", "message": "too old resource version",
            }});
            return Some(format!("{gone}\n"));
        }
        let text: String = store
            .log
            .iter()
            .filter(|(v, r, _, _)| *v > self.seen && *r == self.resource)
            .map(|(_, _, kind, object)| {
                // The type stands first, as the real server writes it.
                format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
            })
            .collect();
        self.seen = self.seen.max(store.version);
        (!text.is_empty()).then_some(text)
    }
}
