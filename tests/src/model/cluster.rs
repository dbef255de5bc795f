//! What the cluster asks for, in the words of Kubernetes, and what the agent writes of it into the tables of the
//! datapath. The model asks the words; the datapath reads the tables.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use weir_common::device::Device;
use weir_common::nat::Uplink;
use weir_common::node::Features;
use weir_common::policy::{Action, Class, RuleId, RulesId, VerdictKey, VerdictRow};
use weir_common::service::{
    Backend as BackendRow, Frontend, FrontendFlags, FrontendKey, Generation, NodeAddress,
    NodeFlags, Scope, Segment,
};
use weir_common::{Addr, DropReason, Port, Protocol};

use super::wire::Talk;
use crate::tables::Memory;
use crate::world::{BACKEND_PORT, Family, Host, PODS, SERVICE_PORT, UPLINK, world};

/// Another uplink of the node, with an address of its own.
pub const OTHER_UPLINK: u32 = 2001;

/// How a backend is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Health {
    Usable,
    Draining,
    Gone,
}

/// An endpoint of services.
#[derive(Clone, Copy, Debug)]
pub struct Backend {
    pub host: Host,
    pub at: SocketAddr,
    pub health: Health,
    /// Which endpoint at this address it is: one that was gone comes back as another one.
    pub incarnation: u32,
}

/// A service, by its number in [`Host::Service`].
#[derive(Clone, Debug)]
pub struct Service {
    /// Backends in the order of their addresses, by index in [`Cluster::backends`].
    pub run: Vec<usize>,
    /// All that it has had.
    pub members: Vec<usize>,
    /// `sessionAffinity: ClientIP`, in seconds; 0 for none.
    pub affinity: u32,
    /// Its node port is asked at the node itself (`externalTrafficPolicy: Local`).
    pub is_own_node_only: bool,
    /// Its port is served: a Service can lose one, and keep its address.
    pub is_there: bool,
    /// Where the agent keeps its run.
    start: u32,
}

/// From where a service is asked.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum From {
    Pod,
    Outside,
}

/// What a policy says about a peer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// There is no row. A peer then hears what the world does; the world's own is one that the agent has not written yet.
    NoRow,
    Deny,
    Allow,
    /// TCP to 8080 and to 1000 to 1007; UDP but to 53.
    ByPort,
}

/// Whoever is none of the peers that have a class of their own.
const WORLD: usize = 4;

/// Directions of policy.
pub const IN: usize = 0;
pub const OUT: usize = 1;

/// Whom policies tell apart.
const PEERS: [Host; 5] = [Host::A, Host::B, Host::C, Host::Far, Host::World];
const PORT_SET: u32 = 7;

/// The cluster as one node sees it.
#[derive(Debug)]
pub struct Cluster {
    pub family: Family,
    pub memory: Memory,
    pub backends: Vec<Backend>,
    pub services: Vec<Service>,
    /// By index of the pod in [`PODS`] and direction.
    pub is_isolated: [[bool; 2]; 3],
    /// By pod, direction and peer.
    pub answers: [[[Answer; 5]; 2]; 3],
    /// The node's addresses at its two uplinks, and the one by which packets leave now.
    pub uplinks: [(u32, IpAddr); 2],
    pub route: usize,
}

impl Cluster {
    /// With that many ports that may stand for others.
    pub fn new(family: Family, ports: u16, is_masquerading: bool) -> Self {
        let mut memory = world();
        memory.frontends.clear();
        memory.backends.clear();
        memory.live.clear();
        memory.verdicts.clear();
        memory.affinity.borrow_mut().clear();
        memory.config.last_port = memory.config.first_port + ports - 1;
        if !is_masquerading {
            memory.config.features &= !Features::MASQUERADE;
        }
        memory.now.set(1_000_000_000_000);
        let mut hosts = [
            Host::A,
            Host::B,
            Host::C,
            Host::Far,
            Host::Farther,
            Host::World,
            Host::Node,
        ];
        hosts.sort_by_key(|host| host.ip(family));
        let backends = hosts.map(|host| Backend {
            host,
            at: SocketAddr::new(host.ip(family), BACKEND_PORT),
            health: Health::Usable,
            incarnation: 1,
        });
        let run = |of: &[Host]| {
            let all = 0..backends.len();
            all.filter(|index| of.contains(&backends[*index].host))
                .collect()
        };
        let runs: [&[Host]; 10] = [
            &[Host::B],
            &[Host::Far],
            &[],
            &[Host::Farther, Host::Far, Host::B],
            &[Host::A, Host::C],
            &[Host::A],
            &[Host::B, Host::Far, Host::A],
            &[Host::A, Host::B, Host::C, Host::Far, Host::Farther],
            &[Host::World],
            &[Host::Node],
        ];
        let services = runs.into_iter().zip(0..).map(|(of, number)| Service {
            run: run(of),
            members: run(of),
            affinity: if number == 6 { 60 } else { 0 },
            is_own_node_only: matches!(number, 3 | 6),
            is_there: true,
            start: 10 * (number + 1),
        });
        let node = Host::Node.ip(family);
        let mut cluster = Self {
            family,
            memory,
            services: services.collect(),
            backends: backends.to_vec(),
            is_isolated: [[true; 2], [false; 2], [true; 2]],
            answers: [[[Answer::Allow; 5]; 2]; 3],
            uplinks: [(UPLINK, node), (OTHER_UPLINK, other_address(node, 252))],
            route: 0,
        };
        let of = |numbers: [u8; 5]| {
            numbers.map(|number| {
                [Answer::Deny, Answer::Allow, Answer::ByPort, Answer::NoRow][number as usize]
            })
        };
        cluster.answers[0] = [of([1, 1, 2, 1, 0]), of([1, 1, 2, 1, 2])];
        cluster.answers[2] = [of([2, 1, 1, 2, 0]), of([2, 0, 1, 2, 3])];
        cluster.write_uplinks();
        cluster.write_policy();
        for backend in 0..cluster.backends.len() {
            cluster.write_backend(backend);
        }
        for service in 0..cluster.services.len() {
            cluster.write_service(service);
            let addr = Host::Service(service as u8 + 1).addr(family);
            let whole = FrontendKey::of_cluster_ip(addr);
            let row = Frontend::default();
            cluster.memory.frontends.insert(whole, row);
        }
        cluster
    }

    pub fn now(&self) -> u64 {
        self.memory.now.get()
    }

    pub fn epoch(&self) -> u32 {
        self.memory.epoch
    }

    pub fn is_masquerading(&self) -> bool {
        self.memory.config.features & Features::MASQUERADE != 0
    }

    /// The port of a service at nodes' addresses.
    pub fn node_port(service: usize) -> u16 {
        30_081 + service as u16
    }

    /// The service that is asked for at an address. From outside only this node's ports are: what is for another
    /// node is on its way there, and a cluster address is nobody's outside.
    pub fn service(&self, from: From, talk: Talk, at: SocketAddr) -> Option<usize> {
        if talk == Talk::Echo {
            return None;
        }
        let there = (0..self.services.len()).filter(|index| self.services[*index].is_there);
        there.into_iter().find(|index| {
            let of_cluster = Host::Service(*index as u8 + 1).ip(self.family);
            let is_own = self.is_own(at.ip());
            let is_other = at.ip() == Host::OtherNode.ip(self.family);
            let is_served =
                is_own || is_other && from == From::Pod && !self.services[*index].is_own_node_only;
            (from == From::Pod && at == SocketAddr::new(of_cluster, SERVICE_PORT))
                || (is_served && at.port() == Self::node_port(*index))
        })
    }

    /// Is it a service's address?
    pub fn is_service(&self, ip: IpAddr) -> bool {
        let all = 1..=self.services.len();
        all.into_iter()
            .any(|number| Host::Service(number as u8).ip(self.family) == ip)
    }

    /// Is it an address of this node?
    pub fn is_own(&self, ip: IpAddr) -> bool {
        self.uplinks.iter().any(|(_, own)| *own == ip) || ip == Host::Node.ip(self.family)
    }

    /// The node's address at an uplink.
    pub fn address(&self, uplink: u32) -> Option<IpAddr> {
        let found = self.uplinks.iter().find(|(ifindex, _)| *ifindex == uplink);
        found.map(|(_, ip)| *ip)
    }

    /// The pod of this node at an address, with the interface index of its device.
    pub fn pod(&self, ip: IpAddr) -> Option<(Host, Option<u32>)> {
        let pods = [Host::A, Host::B, Host::C, Host::D];
        let found = pods.into_iter().find(|pod| pod.ip(self.family) == ip);
        found.map(|pod| (pod, pod.ifindex()))
    }

    /// Do pods show their own addresses there?
    pub fn is_in_cluster(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => matches!(ip.octets(), [10, 0 | 1, 0, _]),
            IpAddr::V6(ip) => matches!(ip.segments(), [0xfd00, 0 | 1, 0, 0, ..]),
        }
    }

    /// May one open a conversation with the other, where it goes in the end? With what allows it at either end.
    ///
    /// # Errors
    /// Why not.
    pub fn allows(&self, talk: Talk, from: IpAddr, to: SocketAddr) -> Result<[u32; 2], DropReason> {
        let place = |ip| match self.pod(ip) {
            Some((_, None)) => Err(DropReason::NoLease),
            Some((pod, _)) => Ok(PODS.iter().position(|(host, _)| *host == pod)),
            None => Ok(None),
        };
        let (sender, receiver) = (place(from)?, place(to.ip())?);
        if from == to.ip() {
            return Ok([0; 2]);
        }
        let out = self.ask(sender, OUT, to.ip(), talk, to.port())?;
        Ok([out, self.ask(receiver, IN, from, talk, to.port())?])
    }

    fn ask(
        &self,
        pod: Option<usize>,
        direction: usize,
        peer: IpAddr,
        talk: Talk,
        port: u16,
    ) -> Result<u32, DropReason> {
        let Some(pod) = pod.filter(|pod| self.is_isolated[*pod][direction]) else {
            return Ok(0);
        };
        // What the node itself sends is never asked about: who says so, and came by a device, is a stranger.
        if direction == OUT && self.is_own(peer) {
            return Ok(0);
        }
        let index = PEERS.iter().position(|host| host.ip(self.family) == peer);
        let mut index = index.unwrap_or(WORLD);
        if self.answers[pod][direction][index] == Answer::NoRow {
            index = WORLD;
        }
        let rule = rule(pod, direction, index);
        let denied = [DropReason::IngressDenied, DropReason::EgressDenied][direction];
        match self.answers[pod][direction][index] {
            Answer::NoRow => Err(DropReason::NoVerdict),
            Answer::Deny => Err(denied),
            Answer::Allow => Ok(rule),
            Answer::ByPort => match (talk, port) {
                (Talk::Tcp, 8080) => Ok(1001),
                (Talk::Tcp, 1000..=1007) => Ok(1004),
                (Talk::Udp, 53) => Err(denied),
                (Talk::Udp, _) => Ok(1002),
                _ => Err(denied),
            },
        }
    }

    // What the agent writes.

    /// Says that policy has changed.
    pub fn bump(&mut self) {
        self.memory.epoch += 1;
    }

    pub fn write_policy(&mut self) {
        for (pod, (host, ifindex)) in PODS.into_iter().enumerate() {
            let rules = |direction: usize| {
                if self.is_isolated[pod][direction] {
                    rules(pod, direction)
                } else {
                    RulesId::OPEN
                }
            };
            let Some(device) = self.memory.devices.get(&ifindex) else {
                continue;
            };
            let device = Device {
                ingress: rules(IN),
                egress: rules(OUT),
                ..**device
            };
            self.memory.devices.insert(ifindex, Rc::new(device));
            let class = |host| crate::world::CLASS(host);
            self.memory
                .classes
                .insert(host.addr(self.family), class(host));
            for direction in [IN, OUT] {
                for (index, peer) in PEERS.into_iter().enumerate() {
                    self.write_answer(pod, direction, index, class(peer));
                }
            }
        }
        self.bump();
    }

    fn write_answer(&mut self, pod: usize, direction: usize, index: usize, class: Class) {
        let key = VerdictKey {
            rules: rules(pod, direction),
            class,
        };
        let action = match self.answers[pod][direction][index] {
            Answer::NoRow => {
                self.memory.verdicts.remove(&key);
                return;
            }
            Answer::Deny => Action::DENY,
            Answer::Allow => Action::ALLOW,
            Answer::ByPort => Action::BY_PORT,
        };
        let row = VerdictRow {
            action,
            ports: PORT_SET,
            rule: RuleId(rule(pod, direction, index)),
            ..VerdictRow::default()
        };
        self.memory.verdicts.insert(key, row);
    }

    /// An id and what the tables say of it, in fours.
    pub fn write_backend(&mut self, index: usize) {
        let backend = self.backends[index];
        let number = backend.incarnation * 4
            + match backend.health {
                Health::Usable => 0,
                Health::Draining => 1,
                Health::Gone => 2,
            };
        self.memory
            .live
            .insert(index as u32 + 1, Generation(number));
    }

    pub fn write_service(&mut self, index: usize) {
        let service = &self.services[index];
        for (at, backend) in (service.start..).zip(&service.run) {
            let to = self.backends[*backend].at;
            let row = BackendRow {
                addr: Addr::from(to.ip()),
                port: to.port().into(),
                flags: 0,
                id: *backend as u32 + 1,
            };
            self.memory.backends.insert(at, row);
        }
        let frontend = Frontend {
            service: index as u32 + 1,
            segment: Segment {
                start: service.start,
                len: service.run.len() as u32,
            },
            affinity: service.affinity,
            port: Port::from(SERVICE_PORT),
            ..Frontend::default()
        };
        let flags = if service.is_own_node_only {
            FrontendFlags::OWN_NODE_ONLY
        } else {
            0
        };
        let is_there = service.is_there;
        let frontends = &mut self.memory.frontends;
        let mut write = |key: FrontendKey, row| {
            if is_there {
                frontends.insert(key, row);
            } else {
                frontends.remove(&key);
            }
        };
        for protocol in [Protocol::TCP, Protocol::UDP] {
            let of_cluster = FrontendKey {
                addr: Host::Service(index as u8 + 1).addr(self.family),
                port: Port::from(SERVICE_PORT),
                protocol,
                scope: Scope::INTERNAL,
                pad: [0; 4],
            };
            write(of_cluster, frontend);
            for scope in [Scope::INTERNAL, Scope::EXTERNAL] {
                let port = Port::from(Self::node_port(index));
                let of_nodes = FrontendKey {
                    port,
                    scope,
                    ..of_cluster
                };
                let frontend = Frontend { flags, ..frontend };
                write(of_nodes.of_nodes(), frontend);
            }
        }
    }

    pub fn write_uplinks(&mut self) {
        for (ifindex, ip) in self.uplinks {
            let addr = Addr::from(ip);
            let mut uplink = Uplink::default();
            match self.family {
                Family::V4 => uplink.ipv4 = addr,
                Family::V6 => uplink.ipv6 = addr,
            }
            self.memory.uplinks.insert(ifindex, Rc::new(uplink));
            let flags = NodeFlags::OWN;
            self.memory.nodes.insert(addr, NodeAddress { flags });
            self.memory.classes.insert(addr, Class::OWN_NODE);
        }
        self.bump();
    }

    /// The node gets another address at the uplink in use. The class of an address changes, and with it the epoch.
    pub fn renumber(&mut self) {
        let first = Host::Node.ip(self.family);
        let was = self.uplinks[self.route].1;
        let next = match last(was) {
            254 => other_address(first, 253),
            253 => first,
            252 => other_address(first, 251),
            _ => other_address(first, 252),
        };
        self.address_uplink(self.route, next);
    }

    /// Both uplinks get one address, as where a link has a spare.
    pub fn share_address(&mut self) {
        self.address_uplink(1 - self.route, self.uplinks[self.route].1);
    }

    fn address_uplink(&mut self, index: usize, ip: IpAddr) {
        let was = self.uplinks[index].1;
        if was != Host::Node.ip(self.family) {
            self.memory.nodes.remove(&Addr::from(was));
            self.memory.classes.remove(&Addr::from(was));
        }
        self.uplinks[index].1 = ip;
        self.write_uplinks();
    }
}

fn rules(pod: usize, direction: usize) -> RulesId {
    RulesId(1 + 2 * pod as u32 + direction as u32)
}

fn rule(pod: usize, direction: usize, peer: usize) -> u32 {
    rules(pod, direction).0 * 100 + peer as u32
}

fn last(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    }
}

/// The address beside another one.
fn other_address(ip: IpAddr, number: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            [a, b, c, number].into()
        }
        IpAddr::V6(ip) => {
            let mut octets = ip.octets();
            octets[14] = 0;
            octets[15] = number;
            octets.into()
        }
    }
}
