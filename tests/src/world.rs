//! A small cluster as the datapath's tables hold it, the same in both families: three pods on this node,
//! one whose device is missing, two elsewhere, the node itself, a stranger, and services of every kind.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::rc::Rc;

use weir_common::device::{Device, LocalPod};
use weir_common::nat::Uplink;
use weir_common::policy::{
    Action, Class, PortKey, PortRow, RuleId, RulesId, VerdictKey, VerdictRow,
};
use weir_common::service::{
    Affinity, Backend, Frontend, FrontendFlags, FrontendKey, Generation, NodeAddress, NodeFlags,
    Scope, Segment,
};
use weir_common::{Addr, Mac, Port, Prefix, Protocol};
use weir_datapath::service::client_at;

use crate::tables::Memory;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    V4,
    V6,
}

pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Who has an address.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Host {
    /// A pod of this node; isolated both ways.
    A,
    /// A pod of this node; no policy.
    B,
    /// A pod of this node; isolated both ways, and closed to most.
    C,
    /// A pod of this node that is being set up: its address is known, its device is not.
    D,
    /// Pods of other nodes.
    Far,
    Farther,
    /// This node, and another.
    Node,
    OtherNode,
    /// Outside of the cluster.
    World,
    /// A service, by number.
    Service(u8),
}

/// Backed by B.
pub const NEAR: Host = Host::Service(1);
/// Backed by a pod of another node.
pub const REMOTE: Host = Host::Service(2);
/// Without a backend.
pub const EMPTY: Host = Host::Service(3);
/// Its first backend is gone, its second is not.
pub const CHANGING: Host = Host::Service(4);
/// Backed by A and C.
pub const SHARED: Host = Host::Service(5);
/// Backed by A alone.
pub const OWN: Host = Host::Service(6);

/// With session affinity: B at one port, a pod of another node at the next.
pub const STICKY: Host = Host::Service(7);

/// Ports that nodes have: everywhere, for [`NEAR`]; at this node only, for [`REMOTE`]; and of one pod, at
/// one address.
pub const NODE_PORT: u16 = 30_180;
pub const OWN_NODE_PORT: u16 = 30_181;
pub const HOST_PORT: u16 = 9_000;

/// Where services are, and where their backends listen.
pub const SERVICE_PORT: u16 = 80;
pub const BACKEND_PORT: u16 = 8080;

/// The pods with a device, and its interface index.
pub const PODS: [(Host, u32); 3] = [(Host::A, 1001), (Host::B, 1002), (Host::C, 1003)];

/// The node's uplink, and the one port of the node's address that may stand for others: with a choice,
/// host and kernel would draw different numbers.
pub const UPLINK: u32 = 2000;
pub const NAT_PORT: u16 = 20_000;

/// The port of a service at the node's own address, for those outside.
pub const fn node_port(service: Host) -> u16 {
    match service {
        Host::Service(number) => 30_080 + number as u16,
        _ => 0,
    }
}

impl Host {
    pub fn ip(self, family: Family) -> IpAddr {
        let (a, b) = match self {
            Self::A => (0, 1),
            Self::B => (0, 2),
            Self::C => (0, 3),
            Self::D => (0, 4),
            Self::Far => (1, 1),
            Self::Farther => (1, 2),
            Self::Node => (0, 254),
            Self::OtherNode => (1, 254),
            Self::World => (200, 1),
            Self::Service(number) => (96, number),
        };
        match family {
            Family::V4 => Ipv4Addr::new(10, a, 0, b).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, u16::from(a), 0, 0, 0, 0, 0, u16::from(b)).into(),
        }
    }

    pub fn addr(self, family: Family) -> Addr {
        self.ip(family).into()
    }

    /// Interface index of a pod with a device.
    pub fn ifindex(self) -> Option<u32> {
        let found = PODS.iter().find(|(pod, _)| *pod == self);
        found.map(|(_, ifindex)| *ifindex)
    }

    /// The Ethernet address of a pod.
    pub fn mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 0, self.ifindex().unwrap_or(0) as u8]
    }
}

/// Rules of A and of C.
pub const A_IN: RulesId = RulesId(1);
pub const A_OUT: RulesId = RulesId(2);
pub const C_IN: RulesId = RulesId(3);
pub const C_OUT: RulesId = RulesId(4);

/// The class of the pods that have one of their own.
pub const CLASS: fn(Host) -> Class = |host| match host {
    Host::A => Class(16),
    Host::B => Class(17),
    Host::C => Class(18),
    Host::Far => Class(19),
    Host::Node => Class::OWN_NODE,
    _ => Class::WORLD,
};

/// The tables.
pub fn world() -> Memory {
    let mut memory = Memory::default();
    for (host, ifindex) in PODS {
        let (ingress, egress) = match host {
            Host::A => (A_IN, A_OUT),
            Host::C => (C_IN, C_OUT),
            _ => (RulesId::OPEN, RulesId::OPEN),
        };
        let device = Device {
            ipv4: host.addr(Family::V4),
            ipv6: host.addr(Family::V6),
            mac: Mac(host.mac()),
            ingress,
            egress,
            ..Device::default()
        };
        memory.devices.insert(ifindex, Rc::new(device));
    }
    for family in FAMILIES {
        for (host, ifindex) in PODS.into_iter().chain([(Host::D, 1004)]) {
            let pod = LocalPod { ifindex, flags: 0 };
            memory.pods.insert(host.addr(family), pod);
        }
        for host in [Host::A, Host::B, Host::C, Host::Node] {
            memory.classes.insert(host.addr(family), CLASS(host));
        }
    }
    blocks(&mut memory);
    uplinks(&mut memory);
    policy(&mut memory);
    services(&mut memory);
    memory.epoch = 1;
    memory
}

/// Whoever has no class of their own has that of the longest block around them: of the pods of the other node one is in a block
/// alone, and the wider ones are not for it.
fn blocks(memory: &mut Memory) {
    for (family, wide, narrow) in [
        (Family::V4, Prefix::V4_EXTRA + 16, Prefix::V4_EXTRA + 24),
        (Family::V6, 32, 64),
    ] {
        for (prefix_len, class) in [
            (wide, CLASS(Host::B)),
            (narrow, Class::WORLD),
            (Prefix::WHOLE, CLASS(Host::Far)),
        ] {
            let inside = u128::MAX.checked_shr(prefix_len).unwrap_or(0);
            let number = u128::from_be_bytes(Host::Far.addr(family).0) & !inside;
            let addr = Addr(number.to_be_bytes());
            memory.cidrs.insert(Prefix { prefix_len, addr }, class);
        }
    }
}

fn uplinks(memory: &mut Memory) {
    let uplink = Uplink {
        ipv4: Host::Node.addr(Family::V4),
        ipv6: Host::Node.addr(Family::V6),
    };
    memory.uplinks.insert(UPLINK, Rc::new(uplink));
    // Pods of this node and of the other, by the first bits of their addresses.
    for (family, prefix_len) in [(Family::V4, 120), (Family::V6, 64)] {
        let own = NodeAddress {
            flags: NodeFlags::OWN,
        };
        memory.nodes.insert(Host::Node.addr(family), own);
        for host in [Host::A, Host::Far] {
            let mut addr = host.addr(family);
            addr.0[15] = 0;
            memory.cluster.push(Prefix { prefix_len, addr });
        }
    }
    memory.config.first_port = NAT_PORT;
    memory.config.last_port = NAT_PORT;
}

fn policy(memory: &mut Memory) {
    let all = [Host::A, Host::B, Host::C, Host::Far, Host::World];
    for (rules, rows) in [
        (A_IN, [1, 1, 2, 1, 0]),
        (A_OUT, [1, 1, 2, 1, 2]),
        (C_IN, [2, 1, 1, 2, 0]),
        (C_OUT, [2, 0, 1, 2, 0]),
    ] {
        for (host, action) in all.into_iter().zip(rows) {
            // C knows nothing of strangers: no row, which is closed too.
            if (rules, host) == (C_OUT, Host::World) {
                continue;
            }
            let class = CLASS(host);
            let row = VerdictRow {
                action: Action(action),
                ports: 7,
                rule: RuleId(rules.0 * 100 + class.0),
                audit: match host {
                    Host::Far => RuleId(rules.0 * 100),
                    _ => RuleId::NONE,
                },
                ..VerdictRow::default()
            };
            memory.verdicts.insert(VerdictKey { rules, class }, row);
        }
    }
    let mut port = |key, action, rule| {
        let row = PortRow {
            action,
            rule: RuleId(rule),
            audit: RuleId(if rule == 1002 { 1000 } else { 0 }),
            ..PortRow::default()
        };
        memory.ports.insert(key, row);
    };
    let tcp = |port: u16| PortKey::exact(7, Protocol::TCP, Port::from(port));
    port(tcp(BACKEND_PORT), Action::ALLOW, 1001);
    port(PortKey::any(7, Protocol::UDP), Action::ALLOW, 1002);
    let denied = PortKey::exact(7, Protocol::UDP, Port::from(53));
    port(denied, Action::DENY, 1003);
    let range = PortKey {
        prefix_len: PortKey::ONE_PORT - 3,
        ..tcp(1000)
    };
    port(range, Action::ALLOW, 1004);
}

fn services(memory: &mut Memory) {
    // Number of the backend, who it is, its generation: one is gone, all others are usable.
    let backends = [
        (1, Host::B, Generation(4)),
        (2, Host::Far, Generation(8)),
        (3, Host::Farther, Generation(4).gone()),
        (4, Host::A, Generation(4)),
        (5, Host::C, Generation(12)),
    ];
    for (id, _, generation) in backends {
        memory.live.insert(id, generation);
    }
    let runs: [(Host, &[u32]); 6] = [
        (NEAR, &[1]),
        (REMOTE, &[2]),
        (EMPTY, &[]),
        (CHANGING, &[3, 2]),
        (SHARED, &[4, 5]),
        (OWN, &[4]),
    ];
    let mut start = 10;
    for family in FAMILIES {
        for (host, run) in runs {
            let whole = FrontendKey::of_cluster_ip(host.addr(family));
            let nothing = Frontend {
                service: 1,
                ..Frontend::default()
            };
            memory.frontends.insert(whole, nothing);
            let segment = Segment {
                start,
                len: run.len() as u32,
            };
            for id in run {
                let backend = backends.iter().find(|backend| backend.0 == *id);
                let Some((_, host, _)) = backend else {
                    continue;
                };
                let row = Backend {
                    addr: host.addr(family),
                    port: Port::from(BACKEND_PORT),
                    flags: 0,
                    // The families share no number: a backend is an address.
                    id: id + if family == Family::V6 { 10 } else { 0 },
                };
                memory.backends.insert(start, row);
                start += 1;
            }
            for protocol in [Protocol::TCP, Protocol::UDP] {
                let outside = FrontendKey {
                    addr: Host::Node.addr(family),
                    port: Port::from(node_port(host)),
                    protocol,
                    scope: Scope::EXTERNAL,
                    pad: [0; 4],
                };
                let frontend = Frontend {
                    service: 1000 + start,
                    segment,
                    ..Frontend::default()
                };
                // The one with a choice would be drawn differently by host and kernel.
                if host != SHARED {
                    memory.frontends.insert(outside.of_nodes(), frontend);
                }
                let key = FrontendKey {
                    addr: host.addr(family),
                    port: Port::from(SERVICE_PORT),
                    protocol,
                    scope: Scope::INTERNAL,
                    pad: [0; 4],
                };
                let frontend = Frontend {
                    service: start + u32::from(protocol.0),
                    segment,
                    ..Frontend::default()
                };
                memory.frontends.insert(key, frontend);
            }
        }
    }
    for (id, _, generation) in backends {
        memory.live.insert(id + 10, generation);
    }
    for family in FAMILIES {
        node_ports(memory, family);
        sticky(memory, family);
    }
}

fn node_ports(memory: &mut Memory, family: Family) {
    let own = NodeAddress {
        flags: NodeFlags::OWN,
    };
    memory.nodes.insert(Host::Node.addr(family), own);
    let other = Host::OtherNode.addr(family);
    memory.nodes.insert(other, NodeAddress::default());
    for protocol in [Protocol::TCP, Protocol::UDP] {
        for scope in [Scope::INTERNAL, Scope::EXTERNAL] {
            let of = |host: Host| FrontendKey {
                addr: host.addr(family),
                port: Port::from(SERVICE_PORT),
                protocol,
                scope: Scope::INTERNAL,
                pad: [0; 4],
            };
            let own_only = FrontendFlags::OWN_NODE_ONLY;
            let ways = [
                (NEAR, Host::Node, NODE_PORT, 0, true),
                (REMOTE, Host::Node, OWN_NODE_PORT, own_only, true),
                (REMOTE, Host::Node, HOST_PORT, own_only, false),
                // A host port at an address that is not the node's.
                (NEAR, Host::World, HOST_PORT, own_only, false),
            ];
            for (service, at, port, flags, is_of_nodes) in ways {
                let Some(frontend) = memory.frontends.get(&of(service)).copied() else {
                    continue;
                };
                let key = FrontendKey {
                    addr: at.addr(family),
                    port: Port::from(port),
                    scope,
                    ..of(service)
                };
                let key = if is_of_nodes { key.of_nodes() } else { key };
                memory.frontends.insert(key, Frontend { flags, ..frontend });
            }
        }
    }
}

/// Every pod has had a backend, so that nobody draws one: the host and the kernel would differ.
fn sticky(memory: &mut Memory, family: Family) {
    let (start, first) = match family {
        Family::V4 => (100, 6),
        Family::V6 => (110, 16),
    };
    let backends = [(Host::B, first), (Host::Far, first + 1)];
    for (index, (host, id)) in (start..).zip(backends) {
        let row = Backend {
            addr: host.addr(family),
            port: Port::from(BACKEND_PORT),
            flags: 0,
            id,
        };
        memory.backends.insert(index, row);
        memory.live.insert(id, Generation(8));
    }
    for protocol in [Protocol::TCP, Protocol::UDP] {
        let frontend = Frontend {
            service: start,
            segment: Segment { start, len: 2 },
            affinity: 60,
            port: Port::from(SERVICE_PORT),
            ..Frontend::default()
        };
        let key = FrontendKey {
            addr: STICKY.addr(family),
            port: Port::from(SERVICE_PORT),
            protocol,
            scope: Scope::INTERNAL,
            pad: [0; 4],
        };
        memory.frontends.insert(key, frontend);
        for (client, (backend, id)) in
            [Host::A, Host::B, Host::C]
                .into_iter()
                .zip([backends[0], backends[1], backends[1]])
        {
            let key = client_at(&frontend, client.addr(family), protocol);
            let row = Affinity {
                // Fresh by every clock.
                used: u64::MAX,
                backend: id,
                generation: Generation(8),
                addr: backend.addr(family),
                port: Port::from(BACKEND_PORT),
                ..Affinity::default()
            };
            memory.affinity.borrow_mut().insert(key, row);
        }
    }
}
