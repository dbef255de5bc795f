//! An API server that lists and watches objects, changes those of a generated cluster, and knows when the bytes of an event were
//! written. It runs on the thread that drives it, so that whoever measures wakes no other thread to send.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::body::Body;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::{IncomingStream, Listener};
use axum::{Json, Router};
use futures::stream;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::cluster::{Cluster, Objects, Resource, Revision};

/// How many events are kept for watches that start again.
const KEPT: usize = 4_096;
/// The most of a page when nobody asks for less.
const WHOLE: usize = usize::MAX;
/// How long before the end of a watch a real server says how far it is.
const BOOKMARK: Duration = Duration::from_secs(2);

/// A server for one client.
pub(crate) struct ApiServer<C: Objects> {
    shared: Arc<Shared<C>>,
    serving: JoinHandle<()>,
}

struct Shared<C> {
    store: Mutex<Store<C>>,
    /// Moves with every event.
    version: watch::Sender<u64>,
}

struct Store<C> {
    cluster: C,
    version: u64,
    events: VecDeque<Event>,
    /// Who wants to know when an event is on its way, by version.
    waiting: BTreeMap<u64, oneshot::Sender<Instant>>,
}

struct Event {
    version: u64,
    resource: Resource,
    line: String,
}

/// What becomes of a change.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    /// [`Revision::changed`].
    Seen,
    /// [`Revision::touched`].
    Unseen,
}

impl<C: Objects> ApiServer<C> {
    /// Serves on a socket that is bound, for as long as the current runtime is driven.
    pub(crate) fn start(cluster: C, socket: std::net::TcpListener) -> Result<Self> {
        socket.set_nonblocking(true)?;
        let listener = Stamping(tokio::net::TcpListener::from_std(socket)?);
        let shared = Arc::new(Shared {
            store: Mutex::new(Store::new(cluster)),
            version: watch::Sender::new(1),
        });
        let router = Router::new()
            .route("/api/v1/{resource}", get(of_core::<C>))
            .route("/apis/{group}/v1/{resource}", get(of_group::<C>))
            .route("/apis", get(groups))
            .with_state(shared.clone())
            .into_make_service_with_connect_info::<Stamp>();
        let serving = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the API server of the bench ended: {error}");
            }
        });
        Ok(Self { shared, serving })
    }
}

impl ApiServer<Cluster> {
    /// How often an object was changed so far.
    pub(crate) fn revision(&self, resource: Resource, index: usize) -> Revision {
        self.shared.store().cluster.revision(resource, index)
    }

    /// Changes an object, and returns its new revision with the time right before the bytes of the event
    /// went to the socket.
    ///
    /// # Errors
    /// No watch took it in that time.
    pub(crate) async fn send(
        &self,
        resource: Resource,
        index: usize,
        change: Change,
        within: Duration,
    ) -> Result<(Revision, Instant)> {
        let (reply, written) = oneshot::channel();
        let (revision, version) = self.shared.store().change(resource, index, change, reply);
        self.shared.version.send_replace(version);
        let at = tokio::time::timeout(within, written)
            .await
            .with_context(|| format!("no watch of {resource:?} within {within:?}"))?
            .context("the watch broke off")?;
        Ok((revision, at))
    }
}

/// For a client: where the server is; who asks does not matter.
pub(crate) fn kubeconfig(url: &str) -> String {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "bench", "cluster": {"server": url}}],
        "users": [{"name": "bench", "user": {}}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        "current-context": "bench",
    })
    .to_string()
}

impl<C: Objects> Drop for ApiServer<C> {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl<C> Shared<C> {
    fn store(&self) -> MutexGuard<'_, Store<C>> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: Objects> Store<C> {
    fn new(cluster: C) -> Self {
        Self {
            cluster,
            version: 1,
            events: VecDeque::new(),
            waiting: BTreeMap::new(),
        }
    }

    /// The objects of a kind from one index on, as a list with where it goes on.
    fn page(&self, resource: Resource, from: usize, limit: usize) -> String {
        let count = self.cluster.count(resource);
        let end = count.min(from.saturating_add(limit));
        let (version, kind) = resource.kind();
        let mut text = format!(
            r#"{{"kind":"{kind}List","apiVersion":"{version}","metadata":{{"resourceVersion":"{}""#,
            self.version
        );
        if end < count {
            text.push_str(&format!(
                r#","continue":"{end}","remainingItemCount":{}"#,
                count - end
            ));
        }
        text.push_str(r#"},"items":["#);
        for index in from..end {
            if index > from {
                text.push(',');
            }
            self.cluster.write(resource, index, &mut text);
        }
        text.push_str("]}");
        text
    }

    /// The first event of a kind after a version.
    fn next(&mut self, resource: Resource, after: u64) -> Option<(u64, String, Option<Waiting>)> {
        let event = self
            .events
            .iter()
            .find(|e| e.version > after && e.resource == resource)?;
        let waiting = self.waiting.remove(&event.version);
        Some((event.version, event.line.clone(), waiting))
    }
}

impl Store<Cluster> {
    fn change(
        &mut self,
        resource: Resource,
        index: usize,
        change: Change,
        reply: oneshot::Sender<Instant>,
    ) -> (Revision, u64) {
        self.version += 1;
        let version = self.version;
        let revision = match change {
            Change::Seen => self.cluster.change(resource, index, version),
            Change::Unseen => self.cluster.touch(resource, index, version),
        };
        // The type stands first, as the real server writes it.
        let mut line = String::from(r#"{"type":"MODIFIED","object":"#);
        self.cluster.write(resource, index, &mut line);
        line.push_str("}\n");
        self.events.push_back(Event {
            version,
            resource,
            line,
        });
        if self.events.len() > KEPT {
            self.events.pop_front();
        }
        self.waiting.insert(version, reply);
        (revision, version)
    }
}

type Waiting = oneshot::Sender<Instant>;
type Parameters = Query<BTreeMap<String, String>>;

async fn of_core<C: Objects>(
    State(shared): State<Arc<Shared<C>>>,
    ConnectInfo(stamp): ConnectInfo<Stamp>,
    Path(resource): Path<String>,
    parameters: Parameters,
) -> Response {
    respond(shared, stamp, &resource, &parameters)
}

async fn of_group<C: Objects>(
    State(shared): State<Arc<Shared<C>>>,
    ConnectInfo(stamp): ConnectInfo<Stamp>,
    Path((_, resource)): Path<(String, String)>,
    parameters: Parameters,
) -> Response {
    respond(shared, stamp, &resource, &parameters)
}

/// No group that a cluster may be without.
async fn groups() -> Response {
    Json(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})).into_response()
}

fn respond<C: Objects>(
    shared: Arc<Shared<C>>,
    stamp: Stamp,
    resource: &str,
    parameters: &BTreeMap<String, String>,
) -> Response {
    let Some(resource) = Resource::named(resource) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let number = |name: &str| {
        parameters
            .get(name)
            .and_then(|text| text.parse::<u64>().ok())
    };
    let body = if parameters.contains_key("watch") {
        let patience = Duration::from_secs(number("timeoutSeconds").unwrap_or(300));
        let end = tokio::time::Instant::now() + patience;
        Body::from_stream(stream::unfold(
            Watch {
                seen: number("resourceVersion").unwrap_or(0),
                version: shared.version.subscribe(),
                shared,
                resource,
                stamp,
                bookmark: Some(end.checked_sub(BOOKMARK).unwrap_or(end)),
                end,
            },
            Watch::step,
        ))
    } else {
        let from = number("continue").unwrap_or(0) as usize;
        let limit = number("limit").map_or(WHOLE, |limit| limit as usize);
        Body::from(shared.store().page(resource, from, limit))
    };
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

struct Watch<C> {
    shared: Arc<Shared<C>>,
    resource: Resource,
    seen: u64,
    version: watch::Receiver<u64>,
    stamp: Stamp,
    /// When to say how far it is, unless that is done.
    bookmark: Option<tokio::time::Instant>,
    end: tokio::time::Instant,
}

impl<C: Objects> Watch<C> {
    /// The next line; `None` at the end of the time that was asked for.
    async fn step(mut self) -> Option<(Result<String, Infallible>, Self)> {
        loop {
            // What comes while we look counts as changed afterwards.
            self.version.borrow_and_update();
            let next = self.shared.store().next(self.resource, self.seen);
            if let Some((version, line, waiting)) = next {
                self.seen = version;
                if let Some(waiting) = waiting {
                    self.stamp.at_next_write(waiting);
                }
                return Some((Ok(line), self));
            }
            let at = self.bookmark.unwrap_or(self.end);
            tokio::select! {
                changed = self.version.changed() => changed.ok()?,
                () = tokio::time::sleep_until(at) => {
                    self.bookmark.take()?;
                    return Some((Ok(self.how_far()), self));
                }
            }
        }
    }

    fn how_far(&self) -> String {
        let version = self.seen.max(*self.version.borrow());
        let (of, kind) = self.resource.kind();
        format!(
            "{{\"type\":\"BOOKMARK\",\"object\":{{\"kind\":\"{kind}\",\"apiVersion\":\"{of}\",\
             \"metadata\":{{\"resourceVersion\":\"{version}\"}}}}}}\n"
        )
    }
}

/// What a connection shares with the watch that it carries.
#[derive(Clone, Debug, Default)]
struct Stamp(Arc<Mutex<Option<Waiting>>>);

impl Stamp {
    fn at_next_write(&self, waiting: Waiting) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(waiting);
    }

    fn take(&self) -> Option<Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Connected<IncomingStream<'_, Stamping>> for Stamp {
    fn connect_info(stream: IncomingStream<'_, Stamping>) -> Self {
        stream.io().stamp.clone()
    }
}

/// Accepts connections that note when they are written to.
struct Stamping(tokio::net::TcpListener);

impl Listener for Stamping {
    type Io = Stamped;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Stamped, SocketAddr) {
        loop {
            match self.0.accept().await {
                Ok((stream, addr)) if stream.set_nodelay(true).is_ok() => {
                    let stamp = Stamp::default();
                    return (Stamped { stream, stamp }, addr);
                }
                // It has gone again, or we are out of files for a moment.
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// A connection that says when the bytes of an event go to the socket.
#[derive(Debug)]
struct Stamped {
    stream: TcpStream,
    stamp: Stamp,
}

impl Stamped {
    /// Writes, and tells who waits the time right before.
    fn stamped<T>(
        &mut self,
        write: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let waiting = self.stamp.take();
        let before = Instant::now();
        let written = write(Pin::new(&mut self.stream));
        match (waiting, &written) {
            (Some(waiting), Poll::Pending) => self.stamp.at_next_write(waiting),
            // Who stopped waiting has said so.
            (Some(waiting), Poll::Ready(_)) => waiting.send(before).unwrap_or_default(),
            (None, _) => {}
        }
        written
    }
}

impl AsyncRead for Stamped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stamped {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stamped(|stream| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stamped(|stream| stream.poll_write_vectored(context, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests;
