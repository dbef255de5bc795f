//! What is wrong, as values: made where a fault is found, folded once. Who stops what because of it is not
//! decided anywhere else.
//!
//! A fault stays where it is. Only a fault of the node itself ([`NodeFault`]) has an effect on the node; one of
//! an object, of a pod or of another node has no way to say that it stops anybody.

mod board;
pub mod services;

use std::fmt;
use std::sync::Arc;

use crate::model::ObjectName;

pub use board::{Board, Held, NodeState, Reporter};

/// Something that is wrong.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Condition {
    pub about: About,
    /// In words, for whoever has to do something about it.
    pub text: String,
}

/// What is wrong, and with whom. At most one condition holds about each.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum About {
    /// This node; with the part of it that is meant, where it has several (a hook, a kind of objects).
    Node(NodeFault, String),
    /// An object of the cluster, as `Kind namespace/name`.
    Object(Arc<str>, ObjectFault),
    /// A pod of this node.
    Pod(ObjectName, PodFault),
    /// Another node, by its name.
    Peer(Arc<str>, PeerFault),
}

/// What a node does because of a fault of its own.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Effect {
    /// It is said, and nothing else.
    Nothing,
    /// The node is not ready; its pods run, and new ones start.
    Unready,
    /// The node is not ready, and no pod is started on it.
    StopsPods,
}

/// Declares the faults of one kind: their labels, what they mean and what can be done.
macro_rules! faults {
    ($(#[$doc:meta])* $name:ident { $($(#[$meaning:meta])* $fault:ident: $remedy:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
        pub enum $name {
            $($(#[$meaning])* $fault,)+
        }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$fault,)+];

            /// The label in metrics and `weir status`: never another one for the same fault.
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$fault => stringify!($fault),)+
                }
            }

            /// What can be done about it, in a sentence. docs/operations.md says more.
            pub const fn remedy(self) -> &'static str {
                match self {
                    $(Self::$fault => $remedy,)+
                }
            }
        }
    };
}

faults! {
    /// A fault of this node.
    NodeFault {
        /// Not every object of a kind has been said since the agent started.
        NotSynced: "see that the API server can be reached from this node and that the agent may list the kind",
        /// An earlier agent's programs still serve: ours may not take their place yet.
        NotTakenOver: "wait; if it stays, the text says what is awaited",
        /// The node has no range that its pods could get addresses from.
        NoPodRange: "give the Node spec.podCIDRs (--allocate-node-cidrs), or the agent --pod-cidr",
        /// A program is not on its hook and cannot be put back.
        HookLost: "see who else attaches programs there; the agent tries again every five seconds",
        /// A program is not on an uplink and cannot be put there: what comes in and goes out there is not translated.
        UplinkHookLost: "see who has a queue or filters on that device (`tc qdisc show`, `tc filter show`)",
        /// The netfilter rule that closes pods without a program is missing or changed.
        SecondLock: "see who changes netfilter rules; the agent puts it back every five seconds",
        /// The latest policy is not in the kernel: its tables have no room, or refuse it.
        PolicyNotWritten: "reduce the number of policies or pods; `weir status` shows which table is full",
        /// Addresses of nodes are not in the kernel.
        NodesNotWritten: "see the log; the agent tries again every few seconds",
        /// A table cannot be read any more.
        TableUnreadable: "see what was done to the pin folder; restart the agent",
        /// Objects are those that an earlier run saved: the API server has not been heard since the start.
        Stale: "see that the API server can be reached from this node",
        /// The source of objects cannot be heard at the moment; what it said last holds.
        Disconnected: "see that the API server can be reached from this node",
        /// An address at which weir-dns answers is not on the node.
        DnsAddress: "see who takes addresses off the loopback device; the agent puts it back",
        /// weir-dns cannot get the zone from this agent.
        ZoneNotServed: "see that the folder of --zone-socket can be written",
        /// The Service of cluster DNS does not exist: nobody's lookups lead to weir-dns.
        DnsServiceMissing: "create it, or name the one that exists with --dns-service",
        /// What the kernel reports is not read any more.
        EventsLost: "restart the agent; drops are still counted",
        /// Routes of the node cannot be read or written.
        RoutesUnknown: "see the log; the agent tries again",
        /// Connections of the node itself may be given ports that stand for pods, and these cannot be kept from them.
        PortsNotReserved: "let the agent write net.ipv4.ip_local_reserved_ports, or narrow net.ipv4.ip_local_port_range",
    }
}

faults! {
    /// A fault of an object of the cluster.
    ObjectFault {
        /// It cannot be understood; the last good state of it holds.
        Quarantined: "mend the object as the text says",
        /// It is understood and could not be written; what the kernel held of it before still holds.
        NotWritten: "see which table is full in `weir status`",
        /// An address and port that it asks for belong to another object, which had them first.
        AddressTaken: "give one of the two another address or port",
        /// It restricts its clients to ranges that are not enforced yet: its outside addresses are closed.
        SourceRanges: "remove loadBalancerSourceRanges, and restrict clients before they reach the node",
        /// It asks for external addresses that are not allowed here.
        ExternalIpNotAllowed: "allow the range with --external-ip-range, or remove the address",
        /// A part of it is not supported, and allows nothing.
        AllowsNothing: "see `weir policy`; write the rule in a way that is supported",
    }
}

faults! {
    /// A fault of a pod of this node.
    PodFault {
        /// Its device is gone: somebody inside has deleted it, or its namespace ended without a DEL.
        DeviceGone: "restart the pod",
        /// Its rows could not be written: it stays closed.
        NotWritten: "see which table is full in `weir status`",
        /// A program is not on its device and cannot be put back: the device is closed, or gone.
        HookLost: "restart the pod, and see who changes its device",
        /// A setting of its device is another and cannot be put back: the pod may configure the node.
        DeviceSettings: "see who writes net.ipv6.conf.* on the node, and whether the agent may",
        /// Its host ports lead nowhere.
        HostPort: "give it another host port",
        /// Its address is outside of the node's ranges: other nodes have no route to it.
        OutsideRange: "replace the pod",
    }
}

faults! {
    /// A fault of another node, seen from here.
    PeerFault {
        /// Its pods have no route from here.
        Unreachable: "see the text; nodes must share a link",
    }
}

impl NodeFault {
    /// What the node does because of it.
    pub const fn effect(self) -> Effect {
        match self {
            Self::NotSynced
            | Self::NotTakenOver
            | Self::NoPodRange
            | Self::HookLost
            | Self::SecondLock => Effect::StopsPods,
            Self::PolicyNotWritten
            | Self::NodesNotWritten
            | Self::TableUnreadable
            | Self::Stale
            | Self::DnsAddress
            | Self::ZoneNotServed
            | Self::EventsLost
            | Self::RoutesUnknown
            | Self::UplinkHookLost => Effect::Unready,
            Self::Disconnected | Self::DnsServiceMissing | Self::PortsNotReserved => {
                Effect::Nothing
            }
        }
    }
}

impl NodeFault {
    /// Is it no news for the log: what every start begins with, or what the source of objects has logged itself?
    pub const fn is_no_news(self) -> bool {
        matches!(
            self,
            Self::NotSynced
                | Self::NotTakenOver
                | Self::NoPodRange
                | Self::Stale
                | Self::Disconnected
        )
    }
}

impl Condition {
    /// Of this node as a whole.
    pub fn node(fault: NodeFault, text: impl Into<String>) -> Self {
        Self::part(fault, "", text)
    }

    /// Of a part of this node.
    pub fn part(fault: NodeFault, part: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            about: About::Node(fault, part.into()),
            text: text.into(),
        }
    }

    /// Of an object, `Kind namespace/name`.
    pub fn object(
        object: impl Into<Arc<str>>,
        fault: ObjectFault,
        text: impl Into<String>,
    ) -> Self {
        Self {
            about: About::Object(object.into(), fault),
            text: text.into(),
        }
    }

    /// Of a pod of this node.
    pub fn pod(pod: ObjectName, fault: PodFault, text: impl Into<String>) -> Self {
        Self {
            about: About::Pod(pod, fault),
            text: text.into(),
        }
    }

    /// Of another node.
    pub fn peer(node: impl Into<Arc<str>>, fault: PeerFault, text: impl Into<String>) -> Self {
        Self {
            about: About::Peer(node.into(), fault),
            text: text.into(),
        }
    }
}

impl About {
    /// What the node does because of it.
    pub const fn effect(&self) -> Effect {
        match self {
            Self::Node(fault, _) => fault.effect(),
            Self::Object(..) | Self::Pod(..) | Self::Peer(..) => Effect::Nothing,
        }
    }

    /// Is it this node's?
    pub const fn is_node(&self) -> bool {
        matches!(self, Self::Node(..))
    }

    /// `node`, `object`, `pod` or `peer`: a label of metrics.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Node(..) => "node",
            Self::Object(..) => "object",
            Self::Pod(..) => "pod",
            Self::Peer(..) => "peer",
        }
    }

    /// The fault's label.
    pub const fn fault(&self) -> &'static str {
        match self {
            Self::Node(fault, _) => fault.label(),
            Self::Object(_, fault) => fault.label(),
            Self::Pod(_, fault) => fault.label(),
            Self::Peer(_, fault) => fault.label(),
        }
    }

    /// What can be done about it.
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Node(fault, _) => fault.remedy(),
            Self::Object(_, fault) => fault.remedy(),
            Self::Pod(_, fault) => fault.remedy(),
            Self::Peer(_, fault) => fault.remedy(),
        }
    }
}

/// With whom something is wrong.
impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(_, part) if part.is_empty() => f.write_str("this node"),
            Self::Node(_, part) => f.write_str(part),
            Self::Object(object, _) => f.write_str(object),
            Self::Pod(pod, _) => write!(f, "Pod {pod}"),
            Self::Peer(node, _) => write!(f, "Node {node}"),
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.about {
            About::Node(_, part) if self.text.starts_with(part.as_str()) => f.write_str(&self.text),
            about => write!(f, "{about}: {}", self.text),
        }
    }
}
