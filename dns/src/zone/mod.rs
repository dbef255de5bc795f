//! The zone: every name of the cluster as plain data, changed one service at a time and read without
//! a lock. A clone costs nothing and shares what did not change. What a question is answered with is
//! in `answer`.

mod answer;
mod name;
mod service;

use std::net::IpAddr;
use std::sync::Arc;

use rpds::HashTrieMapSync as HashMap;

pub use answer::Answer;
pub use name::{Domain, DomainError, address_label, is_reverse, label_address, reverse_address};
pub use service::{
    EndpointSet, PortProtocol, ServiceKind, ServiceName, ZoneEndpoint, ZonePort, ZoneService,
};

/// Kubernetes DNS-Based Service Discovery 1.1.0 for one cluster domain.
#[derive(Clone, Debug)]
pub struct Zone {
    domain: Domain,
    /// Seconds.
    ttl: u32,
    serial: u32,
    namespaces: HashMap<Arc<str>, Namespace>,
    owners: HashMap<IpAddr, Owners>,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Namespace {
    existence: Existence,
    services: HashMap<Arc<str>, Arc<ZoneService>>,
}

/// Why a namespace is in the zone.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Existence {
    /// Only because a service is in it.
    #[default]
    Implied,
    /// The cluster has it.
    Announced,
}

/// Who has an address. Nearly always one service, so that case takes no allocation of its own.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Owners {
    One(Arc<ServiceName>),
    /// Sorted, at least two.
    Many(Arc<[Arc<ServiceName>]>),
}

impl Zone {
    /// An empty zone. `ttl` in seconds, for every record but the version. `serial` is where the
    /// serial of the SOA starts; it grows with each change.
    pub fn new(domain: Domain, ttl: u32, serial: u32) -> Self {
        Self {
            domain,
            ttl,
            serial,
            namespaces: HashMap::new_sync(),
            owners: HashMap::new_sync(),
        }
    }

    /// The cluster domain.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// How many services have a name.
    pub fn len(&self) -> usize {
        self.namespaces.values().map(|n| n.services.size()).sum()
    }

    /// Is there no service at all?
    pub fn is_empty(&self) -> bool {
        self.namespaces.values().all(|n| n.services.is_empty())
    }

    /// Do both hold the same names, whatever happened before?
    pub fn same_names(&self, other: &Self) -> bool {
        self.domain == other.domain
            && self.namespaces == other.namespaces
            && self.owners == other.owners
    }

    /// Puts a service in, in place of the one of that name.
    pub fn upsert(&mut self, service: Arc<ZoneService>) {
        let name = service.name.clone();
        self.serial = self.serial.wrapping_add(1);
        let mut namespace = self.namespace(&name.namespace);
        let old = namespace.services.get(&name.name).cloned();
        namespace
            .services
            .insert_mut(name.name.clone(), service.clone());
        self.namespaces
            .insert_mut(name.namespace.clone(), namespace);
        if let Some(old) = &old {
            if old.kind == service.kind {
                return;
            }
            self.disown(old);
        }
        for address in service.addresses() {
            let owners = match self.owners.get(&address) {
                None => Owners::One(name.clone()),
                Some(owners) => owners.with(&name),
            };
            self.owners.insert_mut(address, owners);
        }
    }

    /// Takes a service out.
    pub fn remove(&mut self, name: &ServiceName) {
        self.serial = self.serial.wrapping_add(1);
        let Some(namespace) = self.namespaces.get_mut(&name.namespace) else {
            return;
        };
        let Some(old) = namespace.services.get(&name.name).cloned() else {
            return;
        };
        namespace.services.remove_mut(&name.name);
        if namespace.is_void() {
            self.namespaces.remove_mut(&name.namespace);
        }
        self.disown(&old);
    }

    /// The cluster has this namespace.
    pub fn announce(&mut self, namespace: &Arc<str>) {
        self.serial = self.serial.wrapping_add(1);
        let mut entry = self.namespace(namespace);
        entry.existence = Existence::Announced;
        self.namespaces.insert_mut(namespace.clone(), entry);
    }

    /// The cluster does not have this namespace any more. Its services stay until they are removed.
    pub fn retire(&mut self, namespace: &str) {
        self.serial = self.serial.wrapping_add(1);
        let Some(entry) = self.namespaces.get_mut(namespace) else {
            return;
        };
        entry.existence = Existence::Implied;
        if entry.is_void() {
            self.namespaces.remove_mut(namespace);
        }
    }

    fn namespace(&self, name: &str) -> Namespace {
        self.namespaces.get(name).cloned().unwrap_or_default()
    }

    fn service(&self, namespace: &str, name: &str) -> Option<&Arc<ZoneService>> {
        self.namespaces.get(namespace)?.services.get(name)
    }

    fn disown(&mut self, service: &ZoneService) {
        for address in service.addresses() {
            let rest = match self.owners.get(&address) {
                None => continue,
                Some(owners) => owners.without(&service.name),
            };
            match rest {
                None => {
                    self.owners.remove_mut(&address);
                }
                Some(owners) => self.owners.insert_mut(address, owners),
            }
        }
    }
}

impl Namespace {
    fn is_void(&self) -> bool {
        self.existence == Existence::Implied && self.services.is_empty()
    }
}

impl Owners {
    fn as_slice(&self) -> &[Arc<ServiceName>] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Many(names) => names,
        }
    }

    fn with(&self, name: &Arc<ServiceName>) -> Self {
        let names = self.as_slice();
        match names.binary_search(name) {
            Ok(_) => self.clone(),
            Err(place) => {
                let mut names = names.to_vec();
                names.insert(place, name.clone());
                Self::Many(names.into())
            }
        }
    }

    fn without(&self, name: &ServiceName) -> Option<Self> {
        let rest: Vec<_> = self
            .as_slice()
            .iter()
            .filter(|owner| ***owner != *name)
            .cloned()
            .collect();
        match rest.as_slice() {
            [] => None,
            [only] => Some(Self::One(only.clone())),
            _ => Some(Self::Many(rest.into())),
        }
    }
}
