//! Gives weir-dns its zone: what the snapshot says, compiled and handed to the feed. The protocol and
//! the socket are `weir_dns::feed`. It is served here, for as long as the agent runs.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::UnixListener;
use tracing::warn;
use weir_dns::feed::{Peer, Server, ZoneChange};
use weir_dns::hand_over::{FOLDER_MODE, FOLDER_NAME};
use weir_dns::selinux::label_for_containers;
use weir_dns::zone::ServiceName;

use crate::beat::beat;
use crate::compile::zone::{zone_name, zone_service};
use crate::conditions::{Condition, NodeFault, Reporter};
use crate::model::{Kind, ObjectName, Snapshot};

/// The kinds that names come from.
const INPUTS: [Kind; 3] = [Kind::Service, Kind::EndpointSlice, Kind::Namespace];

/// The feed of this node. Clones share it.
#[derive(Clone, Debug)]
pub struct ZoneFeed {
    server: Server,
}

impl ZoneFeed {
    /// A feed for the names of this cluster domain; weir-dns must be told the same.
    pub fn new(domain: impl Into<Arc<str>>) -> Self {
        Self {
            server: Server::new(domain),
        }
    }

    /// A Service or one of its slices changed, appeared or went.
    pub fn service_changed(&self, snapshot: &Snapshot, id: &ObjectName) {
        self.server.publish(match snapshot.services.get(id) {
            None => ZoneChange::Remove(zone_name(id)),
            Some(service) => {
                let slices = snapshot.slices_of(id);
                ZoneChange::Upsert(Arc::new(zone_service(service, slices)))
            }
        });
    }

    /// A Namespace appeared or went.
    pub fn namespace_changed(&self, snapshot: &Snapshot, name: &Arc<str>) {
        self.server
            .publish(match snapshot.namespaces.contains_key(name) {
                true => ZoneChange::Namespace(name.clone()),
                false => ZoneChange::NamespaceGone(name.clone()),
            });
    }

    /// Anything may have changed: says all of the snapshot, takes back what is not in it, and says
    /// that this is everything if the inputs are synced. Nothing is taken back before that: what is
    /// not synced is not empty.
    pub fn everything_changed(&self, snapshot: &Snapshot) {
        for name in snapshot.namespaces.keys() {
            self.namespace_changed(snapshot, name);
        }
        for id in snapshot.services.keys() {
            self.service_changed(snapshot, id);
        }
        if snapshot.missing().any(|kind| INPUTS.contains(&kind)) {
            return;
        }
        let known: HashSet<_> = snapshot.services.keys().map(zone_name).collect();
        for name in self.server.services() {
            if !known.contains(&name) {
                self.server.publish(ZoneChange::Remove(name));
            }
        }
        for name in self.server.namespaces() {
            self.namespace_changed(snapshot, &name);
        }
        self.server.publish(ZoneChange::Synced);
    }

    /// The services that weir-dns is told of.
    pub fn services(&self) -> Vec<ServiceName> {
        self.server.services()
    }

    /// How many weir-dns processes follow.
    pub fn clients(&self) -> usize {
        self.server.clients()
    }
}

/// Where weir-dns is served.
#[derive(Clone, Debug)]
pub struct Place {
    /// The socket. Its folder, and in that the one for the hand-over, are made.
    pub socket: PathBuf,
    /// Who may connect, beside root.
    pub peer: Peer,
    /// How often a socket that cannot be had is tried again.
    pub retry: Duration,
    /// How often one that is had is looked at.
    pub look: Duration,
}

/// Serves a zone for ever. Says so while nobody can be served, and begins again when somebody has taken the socket
/// away.
pub async fn keep_served(zone: ZoneFeed, at: Place, reporter: Reporter) {
    loop {
        match open(&at) {
            Ok((listener, socket)) => {
                reporter.replace([]);
                tokio::select! {
                    () = zone.server.clone().serve(listener, at.peer) => {}
                    () = gone(&at, socket) => warn!(path = %at.socket.display(), "the zone's socket is gone: it is made again"),
                }
            }
            Err(error) => {
                let text = format!("weir-dns gets no zone: {error:#}");
                reporter.replace([Condition::node(NodeFault::ZoneNotServed, text)]);
                tokio::time::sleep(at.retry).await;
            }
        }
    }
}

/// A socket, wherever its name leads later.
type SocketId = (u64, u64);

fn open(at: &Place) -> Result<(UnixListener, SocketId)> {
    let folder = at
        .socket
        .parent()
        .context("the zone's socket has no folder")?;
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let hand_over = folder.join(FOLDER_NAME);
    make_private(&hand_over, at.peer.gid)
        .with_context(|| format!("make {} for weir-dns alone", hand_over.display()))?;
    for folder in [folder, &hand_over] {
        if let Err(error) = label_for_containers(folder) {
            warn!(folder = %folder.display(), %error, "SELinux may keep weir-dns out of the folder");
        }
    }
    let listener = Server::bind(&at.socket, at.peer)?;
    let id = socket_id(at).context("find the socket that was just made")?;
    Ok((listener, id))
}

/// The folder where one weir-dns gives its sockets to the next. Who may enter it may have them.
fn make_private(folder: &Path, group: u32) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    if !fs::symlink_metadata(folder)?.is_dir() {
        bail!("something else is there");
    }
    if fs::metadata(folder)?.gid() != group {
        chown(folder, None, Some(group)).with_context(|| format!("give it to group {group}"))?;
    }
    Ok(fs::set_permissions(
        folder,
        Permissions::from_mode(FOLDER_MODE),
    )?)
}

fn socket_id(at: &Place) -> Option<SocketId> {
    let there = fs::symlink_metadata(&at.socket).ok()?;
    Some((there.dev(), there.ino()))
}

/// Waits until the name does not lead to our socket any more.
async fn gone(at: &Place, ours: SocketId) {
    while socket_id(at) == Some(ours) {
        beat(at.look).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conditions::Board;
    use crate::model::{
        External, NotReady, Object, ObjectId, Proxying, Service, ServiceKind, TrafficPolicy,
    };

    fn service(name: &str) -> Object {
        Object::Service(Arc::new(Service {
            id: ObjectName::new("default", name),
            created: None,
            kind: ServiceKind::ClusterIp(vec![]),
            ports: vec![],
            selector: None,
            affinity: None,
            internal_traffic_policy: TrafficPolicy::Cluster,
            external: External::default(),
            not_ready: NotReady::Hidden,
            proxying: Proxying::Here,
        }))
    }

    #[tokio::test]
    async fn a_zone_that_cannot_be_served_is_said_and_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("run");
        // What should be a folder is a file.
        fs::write(&at, "").unwrap();
        let board = Arc::new(Board::default());
        let place = Place {
            socket: at.join("zone.sock"),
            peer: Peer {
                uid: 0,
                gid: fs::metadata(folder.path()).unwrap().gid(),
            },
            retry: Duration::from_millis(10),
            look: Duration::from_millis(10),
        };
        let faults = || -> Vec<_> {
            let all = board.all();
            all.iter().map(|it| it.condition.about.fault()).collect()
        };
        let until = async |what: &str, is_so: &dyn Fn() -> bool| {
            for _ in 0..500 {
                if is_so() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("in vain: {what}, {:?}", board.all());
        };
        let feed = ZoneFeed::new("cluster.local");
        let serving = keep_served(feed.clone(), place.clone(), board.reporter("zone"));
        let serving = tokio::spawn(serving);
        until("it is said", &|| faults() == ["ZoneNotServed"]).await;
        fs::remove_file(&at).unwrap();
        until("it is served", &|| place.socket.exists()).await;
        until("it is no longer said", &|| faults().is_empty()).await;
        let hand_over = fs::metadata(at.join(FOLDER_NAME)).unwrap();
        assert_eq!(hand_over.mode() & 0o7777, FOLDER_MODE);

        // Somebody cleans /run.
        fs::remove_file(&place.socket).unwrap();
        until("it is made again", &|| place.socket.exists()).await;
        let client = tokio::net::UnixStream::connect(&place.socket)
            .await
            .unwrap();
        until("clients are served", &|| feed.clients() == 1).await;
        drop(client);
        serving.abort();
    }

    fn names(feed: &ZoneFeed) -> Vec<String> {
        feed.services().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nothing_is_taken_back_before_every_input_is_synced() {
        let feed = ZoneFeed::new("cluster.local");
        let mut snapshot = Snapshot::default();
        snapshot.apply(service("a"));
        snapshot.apply(service("b"));
        feed.everything_changed(&snapshot);
        assert_eq!(names(&feed), ["default/a", "default/b"]);

        let gone = ObjectId {
            kind: Kind::Service,
            name: ObjectName::new("default", "a"),
        };
        snapshot.delete(&gone);
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Namespace] {
            feed.everything_changed(&snapshot);
            assert_eq!(names(&feed), ["default/a", "default/b"], "before {kind}");
            snapshot.mark_synced(kind);
        }
        feed.everything_changed(&snapshot);
        assert_eq!(names(&feed), ["default/b"]);
    }

    #[test]
    fn a_change_of_one_service_touches_that_one() {
        let feed = ZoneFeed::new("cluster.local");
        let mut snapshot = Snapshot::default();
        snapshot.apply(service("a"));
        snapshot.apply(service("b"));
        feed.service_changed(&snapshot, &ObjectName::new("default", "b"));
        assert_eq!(names(&feed), ["default/b"]);
        snapshot.delete(&ObjectId {
            kind: Kind::Service,
            name: ObjectName::new("default", "b"),
        });
        feed.service_changed(&snapshot, &ObjectName::new("default", "b"));
        assert!(names(&feed).is_empty());
    }
}
