//! Gives weir-dns its zone: what the snapshot says, compiled and handed to the feed. The protocol and
//! the socket are `weir_dns::feed`.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use weir_dns::feed::{FeedError, Peer, Server, ZoneChange};
use weir_dns::zone::ServiceName;

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

    /// The services that weir-dns is told of.
    pub fn services(&self) -> Vec<ServiceName> {
        self.server.services()
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

#[cfg(test)]
mod tests {
    use super::*;
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
