//! The agent's end: holds a full copy of the zone's services, and gives each client that copy and
//! then every change. A client that does not keep up is disconnected and starts over.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::{Frame, VERSION, ZoneChange};
use crate::zone::{ServiceName, ZoneService};

/// How many changes a client may lag behind.
const BACKLOG: usize = 4096;
/// Between two keepalives on a quiet feed. The client gives up after four times that.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// How long a client may take to read one frame.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// One per process of an upgrade, with room for a person who looks.
const MAX_CLIENTS: usize = 8;

/// Who `weir-dns` is: root and this user may connect, and nobody else.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
}

/// Why there is no feed.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    #[error("cannot listen on {path}: {source}")]
    Listen { path: PathBuf, source: io::Error },
}

/// The feed. Clones share it.
#[derive(Clone, Debug)]
pub struct Server {
    domain: Arc<str>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    services: BTreeMap<ServiceName, Arc<ZoneService>>,
    namespaces: BTreeSet<Arc<str>>,
    synced: bool,
    clients: Vec<mpsc::Sender<Arc<[u8]>>>,
}

impl Server {
    /// A feed for a cluster domain, with nothing said yet.
    pub fn new(domain: impl Into<Arc<str>>) -> Self {
        Self {
            domain: domain.into(),
            state: Arc::default(),
        }
    }

    /// Takes a change in and passes it on. A change that changes nothing costs nothing; a removal
    /// of what is not there is one.
    pub fn publish(&self, change: ZoneChange) {
        let mut state = self.lock();
        let frame = match change {
            ZoneChange::Upsert(service) => {
                let old = state
                    .services
                    .insert((*service.name).clone(), service.clone());
                if old.as_ref() == Some(&service) {
                    return;
                }
                Frame::Upsert(service)
            }
            ZoneChange::Remove(name) => match state.services.remove(&name) {
                None => return,
                Some(_) => Frame::Remove(name),
            },
            ZoneChange::Namespace(namespace) => match state.namespaces.insert(namespace.clone()) {
                false => return,
                true => Frame::Namespace(namespace),
            },
            ZoneChange::NamespaceGone(namespace) => match state.namespaces.remove(&namespace) {
                false => return,
                true => Frame::NamespaceGone(namespace),
            },
            ZoneChange::Synced if state.synced => return,
            ZoneChange::Synced => {
                state.synced = true;
                Frame::Synced
            }
        };
        if state.clients.is_empty() {
            return;
        }
        match encode(&frame) {
            Ok(line) => {
                let line: Arc<[u8]> = line.into();
                // Who has gone, or lags a whole backlog behind, loses its sender and so its stream.
                state
                    .clients
                    .retain(|client| client.try_send(line.clone()).is_ok());
            }
            Err(error) => {
                warn!(%error, "zone change cannot be encoded, clients start over");
                state.clients.clear();
            }
        }
    }

    /// The services that the feed holds, for who compares it with what should be.
    pub fn services(&self) -> Vec<ServiceName> {
        self.lock().services.keys().cloned().collect()
    }

    /// The namespaces that the feed holds.
    pub fn namespaces(&self) -> Vec<Arc<str>> {
        self.lock().namespaces.iter().cloned().collect()
    }

    /// How many clients are connected.
    pub fn clients(&self) -> usize {
        let mut state = self.lock();
        state.clients.retain(|client| !client.is_closed());
        state.clients.len()
    }

    /// Opens the socket, in place of a stale one. `peer` gets the right to connect: the socket is
    /// root's, of `peer`'s group, mode 0660. Without the right to change the owner it stays ours.
    pub fn bind(path: &Path, peer: Peer) -> Result<UnixListener, FeedError> {
        let failed = |source| FeedError::Listen {
            path: path.to_owned(),
            source,
        };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        let mode = std::fs::Permissions::from_mode(0o660);
        std::fs::set_permissions(path, mode).map_err(failed)?;
        if let Err(error) = chown(path, None, Some(peer.gid)) {
            warn!(%error, gid = peer.gid, "feed socket keeps its group: weir-dns must run as ours");
        }
        Ok(listener)
    }

    /// Serves clients, for ever. Dropping this lets go of them.
    pub async fn serve(self, listener: UnixListener, peer: Peer) {
        let mut clients = JoinSet::new();
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "feed connection not accepted");
                    // Out of descriptors, most likely: asking again at once would spin.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            while clients.try_join_next().is_some() {}
            match stream.peer_cred() {
                Ok(cred) if cred.uid() == 0 || cred.uid() == peer.uid => {}
                Ok(cred) => {
                    warn!(uid = cred.uid(), "feed refused: not the user of weir-dns");
                    continue;
                }
                Err(error) => {
                    warn!(%error, "feed refused: peer unknown");
                    continue;
                }
            }
            if clients.len() >= MAX_CLIENTS {
                warn!("feed refused: too many clients");
                continue;
            }
            let feed = self.clone();
            clients.spawn(async move {
                info!("zone feed connected");
                match feed.serve_client(stream).await {
                    Ok(()) => warn!("zone feed too slow, it starts over"),
                    Err(error) => info!(%error, "zone feed ended"),
                }
            });
        }
    }

    /// Ends well only when the client lagged behind.
    async fn serve_client(&self, mut stream: UnixStream) -> io::Result<()> {
        let (sender, mut changes) = mpsc::channel(BACKLOG);
        let (services, namespaces, synced) = {
            let mut state = self.lock();
            state.clients.push(sender);
            (
                state.services.values().cloned().collect::<Vec<_>>(),
                state.namespaces.iter().cloned().collect::<Vec<_>>(),
                state.synced,
            )
        };
        let begin = Frame::Begin {
            version: VERSION,
            domain: self.domain.to_string(),
        };
        let frames = std::iter::once(begin)
            .chain(namespaces.into_iter().map(Frame::Namespace))
            .chain(services.into_iter().map(Frame::Upsert))
            .chain(synced.then_some(Frame::Synced));
        let mut batch = Vec::new();
        for frame in frames {
            batch.append(&mut encode(&frame)?);
            if batch.len() >= 64 << 10 {
                write(&mut stream, &batch).await?;
                batch.clear();
            }
        }
        write(&mut stream, &batch).await?;
        let keepalive = encode(&Frame::Keepalive)?;
        loop {
            match tokio::time::timeout(KEEPALIVE, changes.recv()).await {
                Ok(Some(line)) => write(&mut stream, &line).await?,
                Ok(None) => return Ok(()),
                Err(_) => write(&mut stream, &keepalive).await?,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn encode(frame: &Frame) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(frame)?;
    line.push(b'\n');
    Ok(line)
}

async fn write(stream: &mut UnixStream, bytes: &[u8]) -> io::Result<()> {
    tokio::time::timeout(WRITE_TIMEOUT, stream.write_all(bytes))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
