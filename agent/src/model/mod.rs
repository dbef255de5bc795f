//! Our own nouns, and the snapshot of all of them. Only `convert` knows what Kubernetes calls them.

mod cluster_policy;
pub mod convert;
mod interner;
mod name;
mod namespace;
mod node;
mod pod;
mod policy;
mod protocol;
mod selector;
mod service;
mod slice;
mod snapshot;

pub use cluster_policy::{ClusterPolicy, ClusterRule, RuleAction, Tier};
pub use interner::Interner;
pub use name::{Kind, ObjectId, ObjectName};
pub use namespace::{Namespace, NamespacePhase};
pub use node::{AGENT_AWAY, AGENT_READY, NETWORK_UNAVAILABLE, NetworkSaid, Node};
pub use pod::{ContainerPort, HostPort, Pod, PodNetwork, PodPhase};
pub use policy::{Block, PeerSelector, Peers, PodPeers, Policy, PortMatch, PortRange, Ports, Rule};
pub use selector::{Labels, Operator, Requirement, Selector};
pub use service::{
    External, NotReady, Proxying, Service, ServiceKind, ServicePort, Sources, TargetPort,
    TrafficPolicy,
};
pub use slice::{Conditions, Endpoint, EndpointSlice, Family, SlicePort};
pub use snapshot::{Change, Object, Snapshot};
