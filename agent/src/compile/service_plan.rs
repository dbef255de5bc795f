//! What should be in the kernel of whatever asks for frontends, before anything has a number. How it is
//! derived is not here.

use std::fmt;
use std::net::IpAddr;

use siphasher::sip::SipHasher13;
use weir_common::service::FrontendKey;
use weir_common::{Addr, Port, Protocol};

use super::claims::Address;
use crate::model::ObjectName;

/// How many of its numbers an owner is known by in rows of before.
const FIRST_NUMBERS: usize = 8;

/// What asks for frontends.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Owner {
    Service(ObjectName),
    /// The host ports of a pod of this node.
    HostPorts(ObjectName),
}

/// All frontends of one owner.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServicePlan {
    pub id: Owner,
    /// When its object was created, in seconds since 1970, if somebody says so.
    pub created: Option<u64>,
    /// Sorted by key, keys unique.
    pub frontends: Vec<FrontendPlan>,
    /// Endpoints that slices name and that no frontend leads to: new connections go elsewhere, established ones go on
    /// if somebody has some. Once for the Service and not for each frontend, since a backend has one number in all of
    /// them, and without those that are in a run: so it is empty where every endpoint is ready, and with
    /// `internalTrafficPolicy: Local` it costs some 20 bytes for each endpoint of another node. Sorted and unique.
    pub draining: Vec<(Protocol, BackendAddr)>,
    /// What of its object is left out, in order.
    pub reports: Vec<Report>,
}

/// A part of what an object asks for that it does not get here. The rest of it holds.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Report {
    /// Addresses of load balancers are closed: who may use them is restricted, which is not enforced yet.
    SourceRanges { addresses: Vec<IpAddr> },
    /// An external IP outside of every range that is allowed.
    ExternalIp { address: IpAddr },
    /// Another one has the address.
    AddressTaken { address: Address, holder: Owner },
}

/// One address that clients send to, and who may answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FrontendPlan {
    pub key: FrontendKey,
    pub way: Way,
    /// The port of the Service that this is a way to; for a host port itself.
    pub port: Port,
    /// Sorted and unique. Empty means that nothing can serve, which is refused, not passed on.
    pub backends: Vec<BackendAddr>,
    /// Session affinity by client address in seconds, 0 for none.
    pub affinity: u32,
    /// Bits of [`weir_common::service::FrontendFlags`].
    pub flags: u32,
}

/// By what right an address is asked for. Of two who ask for the same one the earlier way here has it, whoever was
/// first: nobody takes a cluster IP away, or keeps it, by naming it as an external one (CVE-2020-8554).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Way {
    ClusterIp,
    LoadBalancer,
    NodePort,
    ExternalIp,
    HostPort,
}

/// Where a backend listens. Its protocol is the frontend's.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BackendAddr {
    pub addr: Addr,
    pub port: Port,
}

impl ServicePlan {
    /// The frontend of this key.
    pub fn frontend(&self, key: &FrontendKey) -> Option<&FrontendPlan> {
        let place = self.frontends.binary_search_by_key(key, |f| f.key).ok()?;
        self.frontends.get(place)
    }

    /// Does anybody name this endpoint, whether it is to have new connections or not?
    pub fn names(&self, protocol: Protocol, addr: &BackendAddr) -> bool {
        let leads =
            |f: &FrontendPlan| f.key.protocol == protocol && f.backends.binary_search(addr).is_ok();
        self.draining.binary_search(&(protocol, *addr)).is_ok() || self.frontends.iter().any(leads)
    }

    /// These drain, but for those that a frontend leads to.
    pub fn drain(&mut self, endpoints: impl IntoIterator<Item = (Protocol, BackendAddr)>) {
        let endpoints = endpoints.into_iter();
        let others: Vec<_> = endpoints.filter(|(p, b)| !self.names(*p, b)).collect();
        self.draining.extend(others);
        self.draining.sort_unstable();
        self.draining.dedup();
    }
}

impl FrontendPlan {
    /// The endpoints that it leads to.
    pub fn endpoints(&self) -> impl Iterator<Item = (Protocol, BackendAddr)> {
        let backends = self.backends.iter();
        backends.map(|backend| (self.key.protocol, *backend))
    }
}

impl Owner {
    /// Its numbers, the first one first. They come from its name, so that clients with affinity are known whatever
    /// else has changed; never 0.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + use<> {
        let first = SipHasher13::new().hash(self.to_string().as_bytes()) as u32;
        (0..u32::MAX)
            .map(move |step| first.wrapping_add(step))
            .filter(|number| *number != 0)
    }

    /// Those that it has unless very many others have them.
    pub fn first_numbers(&self) -> impl Iterator<Item = u32> + use<> {
        self.numbers().take(FIRST_NUMBERS)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SourceRanges { addresses } => {
                let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
                write!(
                    f,
                    "{} closed to everybody: loadBalancerSourceRanges are not enforced yet",
                    addresses.join(", ")
                )
            }
            Self::ExternalIp { address } => {
                write!(f, "external IP {address} is in no range that is allowed")
            }
            Self::AddressTaken { address, holder } => write!(f, "{address} belongs to {holder}"),
        }
    }
}

/// `namespace/name`, or `hostport namespace/name`.
impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "{name}"),
            Self::HostPorts(pod) => write!(f, "hostport {pod}"),
        }
    }
}
