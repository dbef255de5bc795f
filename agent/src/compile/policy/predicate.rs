//! What a rule asks of an address, in one canonical form, and what a namespace is to it.
//! Which addresses satisfy it is in `class`.

use std::sync::Arc;

use ipnet::IpNet;
use weir_common::{Addr, Protocol};

use super::encode::{Canonical, Encoder};
use super::group::GroupKey;
use crate::model::{
    self, ContainerPort, Labels, Namespace, Operator, PodPeers, Requirement, Selector,
};

/// The label that the API server gives every namespace: its name.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// Something that is true of an address or not. Two that say the same are equal.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) enum Predicate {
    /// It is a pod's, as a peer selector with its scope resolved asks.
    Pods { scope: Scope, pods: Selector },
    /// It is in a block, whosever it is.
    Block(Block),
    /// It is of a pod that has a port of this name, and the number is this one.
    Port(PortName, u16),
}

/// `ipBlock`, with no host bits, and with the fewest excepted prefixes that say the same.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Block {
    pub(super) cidr: IpNet,
    pub(super) except: Vec<IpNet>,
}

/// The name of a port of pods, which stands for another number on each.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct PortName {
    pub(super) protocol: Protocol,
    pub(super) name: Arc<str>,
}

/// The namespaces whose pods are asked at all. It stands outside of the user's selector and looks at
/// where a pod is, never at what its labels say (CVE-2023-39347, CVE-2023-41333).
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) enum Scope {
    /// The policy's own.
    Own(Arc<str>),
    /// Those with labels that match.
    Matching(Selector),
}

impl Predicate {
    /// The predicate of a peer in a policy of this namespace.
    pub(super) fn of(peers: &PodPeers, namespace: &Arc<str>) -> Self {
        Self::Pods {
            scope: match &peers.namespaces {
                None => Scope::Own(namespace.clone()),
                Some(selector) => Scope::Matching(canonical(selector)),
            },
            pods: canonical(&peers.pods),
        }
    }

    /// Does it ask for pods with such labels, wherever they are?
    pub(super) fn is_of(&self, labels: &Labels) -> bool {
        matches!(self, Self::Pods { pods, .. } if pods.matches(labels))
    }
}

impl Block {
    pub(super) fn of(cidr: IpNet, except: &[IpNet]) -> Self {
        Self {
            cidr: cidr.trunc(),
            except: IpNet::aggregate(&except.to_vec()),
        }
    }
}

impl PortName {
    /// What a pod with these ports means by it. A name that two containers use is the first one's, as it is for Services.
    pub(super) fn on(&self, ports: &[ContainerPort]) -> Option<u16> {
        let is_meant = |port: &&ContainerPort| {
            port.protocol == self.protocol && port.name.as_ref() == Some(&self.name)
        };
        ports.iter().find(is_meant).map(|port| port.port)
    }

    /// What is true of pods that mean a number by it.
    pub(super) fn fact(&self, pods: &GroupKey) -> Option<Predicate> {
        let is_meant =
            |it: &(&Arc<str>, Protocol, u16)| *it.0 == self.name && it.1 == self.protocol;
        let (_, _, number) = pods.ports().find(is_meant)?;
        Some(Predicate::Port(self.clone(), number))
    }
}

impl From<&model::Block> for Block {
    fn from(block: &model::Block) -> Self {
        Self::of(block.cidr, &block.except)
    }
}

/// What is known of a namespace.
#[derive(Clone, Debug)]
pub(super) struct NamespaceView {
    name: Arc<str>,
    labels: Knowledge,
}

/// Labels that are not known are not absent: nothing may follow from what they lack.
#[derive(Clone, Debug)]
enum Knowledge {
    Known(Labels),
    OnlyTheName,
}

impl NamespaceView {
    /// The namespace of this name; `None` when there is no such object (yet).
    pub(super) fn new(name: &Arc<str>, namespace: Option<&Namespace>) -> Self {
        let labels = match namespace {
            None => Knowledge::OnlyTheName,
            Some(namespace) => {
                let mut labels = namespace.labels.clone();
                labels.insert(NAMESPACE_NAME.into(), name.clone());
                Knowledge::Known(labels)
            }
        };
        Self {
            name: name.clone(),
            labels,
        }
    }

    /// Are its pods asked at all by the selector of a peer?
    pub(super) fn is_asked(&self, predicate: &Predicate) -> bool {
        match predicate {
            Predicate::Pods {
                scope: Scope::Own(name),
                ..
            } => *name == self.name,
            Predicate::Pods {
                scope: Scope::Matching(selector),
                ..
            } => self.matches(selector),
            Predicate::Block(_) | Predicate::Port(..) => false,
        }
    }

    /// Is a pod of it with these labels meant by one who does not say "the policy's own namespace"?
    pub(super) fn is_meant(&self, peers: &PodPeers, labels: &Labels) -> bool {
        let namespaces = peers.namespaces.as_ref();
        namespaces.is_some_and(|it| self.matches(it)) && peers.pods.matches(labels)
    }

    /// The requirements that do not hold of it. One that nothing is known about does not hold.
    pub(super) fn lacks(&self, selector: &Selector) -> Vec<Requirement> {
        let is_missing = |requirement: &&Requirement| {
            let alone = Selector {
                requirements: vec![(*requirement).clone()],
            };
            !self.matches(&alone)
        };
        selector
            .requirements
            .iter()
            .filter(is_missing)
            .cloned()
            .collect()
    }

    /// Its labels; `None` when there is no such object (yet).
    pub(super) fn labels(&self) -> Option<&Labels> {
        match &self.labels {
            Knowledge::Known(labels) => Some(labels),
            Knowledge::OnlyTheName => None,
        }
    }

    fn matches(&self, selector: &Selector) -> bool {
        match &self.labels {
            Knowledge::Known(labels) => selector.matches(labels),
            Knowledge::OnlyTheName => {
                let name = Labels::from([(NAMESPACE_NAME.into(), self.name.clone())]);
                let asks_the_name = |r: &Requirement| &*r.key == NAMESPACE_NAME;
                selector.requirements.iter().all(asks_the_name) && selector.matches(&name)
            }
        }
    }
}

/// The same requirements in one order, each once.
fn canonical(selector: &Selector) -> Selector {
    let mut requirements: Vec<_> = selector
        .requirements
        .iter()
        .map(|requirement| Requirement {
            key: requirement.key.clone(),
            operator: match &requirement.operator {
                Operator::In(values) => Operator::In(sorted(values.clone())),
                Operator::NotIn(values) => Operator::NotIn(sorted(values.clone())),
                other => other.clone(),
            },
        })
        .collect();
    requirements = sorted(requirements);
    Selector { requirements }
}

fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort();
    items.dedup();
    items
}

impl Canonical for Predicate {
    fn encode(&self, to: &mut Encoder) {
        match self {
            Self::Pods {
                scope: Scope::Own(name),
                pods,
            } => {
                to.tag(0);
                to.text(name);
                pods.encode(to);
            }
            Self::Pods {
                scope: Scope::Matching(selector),
                pods,
            } => {
                to.tag(1);
                selector.encode(to);
                pods.encode(to);
            }
            Self::Block(Block { cidr, except }) => {
                to.tag(2);
                cidr.encode(to);
                to.list(except.iter());
            }
            Self::Port(name, number) => {
                to.tag(3);
                name.encode(to);
                to.integer((*number).into());
            }
        }
    }
}

impl Canonical for IpNet {
    fn encode(&self, to: &mut Encoder) {
        to.bytes(&Addr::from(self.network()).0);
        to.tag(self.prefix_len());
    }
}

impl Canonical for PortName {
    fn encode(&self, to: &mut Encoder) {
        self.protocol.encode(to);
        to.text(&self.name);
    }
}
