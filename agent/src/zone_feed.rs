//! Gives weir-dns its zone: what the snapshot says, compiled and handed to the feed. The protocol and
//! the socket are `weir_dns::feed`.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use weir_dns::feed::{FeedError, Peer, Server, ZoneChange};

use crate::compile::zone::{zone_name, zone_service};
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

    /// How many weir-dns processes follow.
    pub fn clients(&self) -> usize {
        self.server.clients()
    }

    /// Serves on the socket at `path`, for ever. Root and `peer` may connect.
    pub async fn serve(self, path: &Path, peer: Peer) -> Result<(), FeedError> {
        let listener = Server::bind(path, peer)?;
        self.server.serve(listener, peer).await;
        Ok(())
    }
}
