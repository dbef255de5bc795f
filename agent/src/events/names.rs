//! Who has an address: what events and flows are named by. The line keeps it, one change at a time; whoever
//! needs a name reads it.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use weir_cli::views::FlowEnd;

use crate::model::{Object, ObjectName, PodNetwork, PodPhase, ServiceKind};

/// Names by address, and devices by interface index. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Names {
    shared: Arc<RwLock<Index>>,
}

#[derive(Debug, Default)]
struct Index {
    /// Everybody who says that an address is his; the first is named.
    addresses: HashMap<IpAddr, BTreeSet<Named>>,
    devices: HashMap<u32, String>,
}

/// Who has an address. Pods come before services, and those before nodes.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Named {
    Pod(ObjectName),
    Service(ObjectName),
    Node(Arc<str>),
}

impl Names {
    /// An object has changed, appeared or gone.
    pub fn changed(&self, before: Option<&Object>, after: Option<&Object>) {
        let (before, after) = (named(before), named(after));
        if before == after {
            return;
        }
        let mut index = self.write();
        if let Some((name, addresses)) = &before {
            for address in *addresses {
                if let Some(all) = index.addresses.get_mut(address) {
                    all.remove(name);
                    if all.is_empty() {
                        index.addresses.remove(address);
                    }
                }
            }
        }
        if let Some((name, addresses)) = after {
            for address in addresses {
                let all = index.addresses.entry(*address).or_default();
                all.insert(name.clone());
            }
        }
    }

    /// A device of a pod has this index.
    pub fn device_is(&self, ifindex: u32, name: String) {
        self.write().devices.insert(ifindex, name);
    }

    /// No device has this index any more.
    pub fn device_is_gone(&self, ifindex: u32) {
        self.write().devices.remove(&ifindex);
    }

    /// Who has the address, if anybody known does.
    pub fn of_address(&self, address: IpAddr) -> Option<String> {
        let index = self.read();
        Some(index.addresses.get(&address)?.first()?.to_string())
    }

    /// The name of the device with this index on this node.
    pub fn device(&self, ifindex: u32) -> String {
        let name = self.read().devices.get(&ifindex).cloned();
        name.unwrap_or_else(|| format!("ifindex {ifindex}"))
    }

    /// One end of a flow or a drop.
    pub fn end(&self, end: SocketAddr) -> FlowEnd {
        FlowEnd {
            address: end.ip(),
            port: end.port(),
            name: self.of_address(end.ip()),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.shared.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Index> {
        self.shared.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who the object is for events, and the addresses that it has.
fn named(object: Option<&Object>) -> Option<(Named, &[IpAddr])> {
    match object? {
        Object::Pod(pod) => {
            let has_some = pod.network == PodNetwork::Own && pod.phase != PodPhase::Finished;
            has_some.then(|| (Named::Pod(pod.id.clone()), pod.addresses.as_slice()))
        }
        Object::Service(service) => match &service.kind {
            ServiceKind::ClusterIp(ips) => Some((Named::Service(service.id.clone()), ips)),
            _ => None,
        },
        Object::Node(node) => Some((Named::Node(node.name.clone()), &node.addresses)),
        Object::EndpointSlice(_)
        | Object::Namespace(_)
        | Object::Policy(_)
        | Object::ClusterPolicy(_) => None,
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(name) => name.fmt(f),
            Self::Service(name) => write!(f, "service {name}"),
            Self::Node(name) => write!(f, "node {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Node;

    fn node(name: &str, address: [u8; 4]) -> Object {
        Object::Node(Arc::new(Node {
            name: name.into(),
            labels: Default::default(),
            addresses: vec![address.into()],
            internal: Vec::new(),
            pod_cidrs: Vec::new(),
            network: Default::default(),
        }))
    }

    #[test]
    fn an_address_is_named_by_who_has_it_now_and_a_second_claim_outlives_the_first() {
        let names = Names::default();
        let at = |last: u8| names.of_address([10, 0, 0, last].into());
        let (a, b) = (node("a", [10, 0, 0, 1]), node("b", [10, 0, 0, 1]));
        names.changed(None, Some(&a));
        names.changed(None, Some(&b));
        assert_eq!(at(1).as_deref(), Some("node a"));
        let moved = node("a", [10, 0, 0, 2]);
        names.changed(Some(&a), Some(&moved));
        assert_eq!(
            (at(1).as_deref(), at(2).as_deref()),
            (Some("node b"), Some("node a"))
        );
        names.changed(Some(&b), None);
        assert_eq!(at(1), None);
    }
}
