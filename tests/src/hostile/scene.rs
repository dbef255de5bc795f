//! Six pods, of which one is hostile, and the frames that they send each other.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::cell::Cell;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{Ear, Mouth, mark};
use crate::admin::dropped;
use crate::fragments::extend;
use crate::frames::{Echo, Ip, L3, Transport, checksum};
use crate::lan::Pair;
use crate::node::{Family, Pod};
use crate::traffic::{PATIENCE, eventually};
use crate::workloads::Workload;

/// `shut` takes only what `friend` sends, and `mute` may send nothing. All are on the first node, but `far`.
const POLICIES: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: shut, namespace: shop}
spec:
  podSelector: {matchLabels: {app: shut}}
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: mute, namespace: shop}
spec: {podSelector: {matchLabels: {app: mute}}, policyTypes: [Egress]}
";

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Who {
    Attacker,
    Friend,
    Near,
    Mute,
    Shut,
    Far,
}
pub use Who::{Attacker, Far, Friend, Mute, Near, Shut};

pub const EVERYBODY: [Who; 6] = [Attacker, Friend, Near, Mute, Shut, Far];

pub struct Site {
    pub pods: Vec<Pod>,
    pub mouths: Vec<Mouth>,
    pub ears: Vec<Ear>,
    pub pair: Pair,
    marks: Cell<u32>,
}

/// What frames are made of, in a family.
pub struct Scene<'a> {
    pub site: &'a Site,
    pub family: Family,
    pub speaker: Who,
    pub says: Vec<u8>,
}

impl Site {
    pub fn start(name: &str) -> Self {
        let pair = Pair::start(name).unwrap();
        pair.write_manifest("policies.yaml", POLICIES).unwrap();
        for node in &pair.nodes {
            // A node that believes what it is told: nothing but ours is in the way.
            for (key, value) in [
                ("net.ipv4.conf.all.rp_filter", "0"),
                ("net.ipv4.conf.all.accept_source_route", "1"),
                ("net.ipv4.conf.default.accept_source_route", "1"),
            ] {
                node.machine().netns().set_sysctl(key, value).unwrap();
            }
        }
        let names = ["attacker", "friend", "near", "mute", "shut", "far"];
        let run = |name: &&str| {
            let on = usize::from(*name == "far");
            pair.run_pod(on, Workload::named("shop", name)).unwrap()
        };
        let pods: Vec<Pod> = names.iter().map(run).collect();
        // The controls of forged errors are true ones, many in a second.
        for pod in &pods {
            for key in ["net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"] {
                pod.netns().set_sysctl(key, "0").unwrap();
            }
        }
        let of = |pod: &Pod| {
            (
                Mouth::open(pod.netns()).unwrap(),
                Ear::open(pod.netns()).unwrap(),
            )
        };
        let (mouths, ears) = pods.iter().map(of).unzip();
        let site = Self {
            pods,
            mouths,
            ears,
            pair,
            marks: Cell::new(0),
        };
        // The policies hold.
        for family in [Family::V4, Family::V6] {
            let is_let_through = || {
                let scene = site.scene(family, Friend);
                scene.send(&scene.udp(Friend, Shut));
                site.is_heard(Shut, &scene.says)
            };
            eventually("a friend is let through", PATIENCE, is_let_through, |it| {
                *it
            })
            .unwrap();
            let is_denied = || {
                let before = site.dropped("ingress_denied");
                let scene = site.scene(family, Attacker);
                scene.send(&scene.udp(Attacker, Shut));
                site.dropped("ingress_denied") > before
            };
            eventually("the others are not", PATIENCE, is_denied, |it| *it).unwrap();
        }
        site
    }

    /// From now on the nodes look at whole packets, as those with rules about connections do: their kernels put fragments together,
    /// and take what is too long apart again.
    pub fn track_connections(&self) {
        for node in &self.pair.nodes {
            let chain = "{ type filter hook prerouting priority 0; }";
            let rules = format!(
                "add table inet tracks; add chain inet tracks first {chain}; \
                 add rule inet tracks first ct state invalid counter"
            );
            let mut nft = node.machine().netns().command("nft");
            assert!(nft.arg(rules).status().unwrap().success());
        }
    }

    pub fn scene(&self, family: Family, speaker: Who) -> Scene<'_> {
        self.marks.set(self.marks.get() + 1);
        Scene {
            site: self,
            family,
            speaker,
            says: mark(self.marks.get()),
        }
    }

    pub fn is_heard(&self, by: Who, says: &[u8]) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.ears[by as usize].has_heard(says) {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn dropped(&self, reason: &str) -> u64 {
        dropped(&self.pair.nodes[0]).unwrap()[reason]
    }
}

impl Scene<'_> {
    pub fn address(&self, of: Who) -> IpAddr {
        self.site.pods[of as usize].address(self.family).unwrap()
    }

    pub fn node(&self, on: usize) -> IpAddr {
        self.site.pair.places[on].address(self.family).unwrap()
    }

    /// Whichever of the two is of the family.
    pub fn of(&self, v4: &str, v6: &str) -> IpAddr {
        let text = if self.is_v4() { v4 } else { v6 };
        text.parse().unwrap()
    }

    pub fn is_v4(&self) -> bool {
        self.family == Family::V4
    }

    pub fn ip(&self, source: IpAddr, destination: IpAddr) -> Ip {
        let mouth = &self.site.mouths[self.speaker as usize];
        Ip {
            source_mac: mouth.own,
            destination_mac: mouth.gateway,
            ..Ip::between(source, destination)
        }
    }

    pub fn between(&self, from: Who, to: Who) -> Ip {
        self.ip(self.address(from), self.address(to))
    }

    pub fn datagram(&self) -> Transport {
        Transport::Udp {
            ports: (4000, 80),
            payload: self.says.clone(),
        }
    }

    /// A datagram with the mark.
    pub fn udp(&self, from: Who, to: Who) -> Vec<u8> {
        self.between(from, to).frame(&self.datagram())
    }

    pub fn udp_from(&self, source: IpAddr, to: Who) -> Vec<u8> {
        self.ip(source, self.address(to)).frame(&self.datagram())
    }

    pub fn udp_to(&self, destination: IpAddr) -> Vec<u8> {
        self.ip(self.address(self.speaker), destination)
            .frame(&self.datagram())
    }

    /// Of another protocol, with the mark at its end.
    pub fn other(&self, to: IpAddr, protocol: u8, head: &[u8]) -> Vec<u8> {
        let payload = [head, &self.says].concat();
        self.ip(self.address(self.speaker), to)
            .frame(&Transport::Other { protocol, payload })
    }

    pub fn tcp(&self, to: Who, ports: (u16, u16), flags: u8) -> Vec<u8> {
        self.between(self.speaker, to).frame(&Transport::Tcp {
            ports,
            flags,
            payload: self.says.clone(),
        })
    }

    /// A datagram to a pod, behind extension headers.
    pub fn behind(&self, to: Who, headers: &[(u8, &[u8])]) -> Vec<u8> {
        extend(&self.udp(self.speaker, to), headers)
    }

    /// A datagram to an address with these IPv4 options, a multiple of four bytes.
    pub fn with_options(&self, to: IpAddr, options: &[u8]) -> Vec<u8> {
        let mut ip = self.ip(self.address(self.speaker), to);
        ip.options = options.len();
        let mut frame = ip.frame(&self.datagram());
        let end = L3 + 20 + options.len();
        frame[L3 + 20..end].copy_from_slice(options);
        frame[L3 + 10..L3 + 12].fill(0);
        let sum = checksum(&[&frame[L3..end]]);
        frame[L3 + 10..L3 + 12].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    /// With something between the Ethernet addresses and the type.
    pub fn tagged(&self, to: Who, tags: &[u8]) -> Vec<u8> {
        let frame = self.udp(self.speaker, to);
        [&frame[..12], tags, &frame[12..]].concat()
    }

    /// What would be let through if somebody unpacked it.
    pub fn inner(&self) -> Vec<u8> {
        self.udp(Friend, Shut)
    }

    pub fn in_udp(&self, to: IpAddr, port: u16, head: &[u8]) -> Vec<u8> {
        self.ip(self.address(Attacker), to).frame(&Transport::Udp {
            ports: (4000, port),
            payload: [head, &self.inner()].concat(),
        })
    }

    /// An error of this type and code about a packet that `near` has sent to `friend`.
    pub fn error(&self, kind: u8, code: u8, rest: [u8; 4]) -> Vec<u8> {
        let quoted = self.between(Near, Friend).packet(&self.datagram());
        let ip = self.between(self.speaker, Near);
        let body = [&[kind, code, 0, 0], &rest[..], &quoted].concat();
        icmp(&ip, body)
    }

    /// An error of this type and code to an address, about a packet that `near` has sent to `friend`.
    pub fn error_to(&self, to: IpAddr, kind: u8, code: u8) -> Vec<u8> {
        let quoted = self.between(Near, Friend).packet(&self.datagram());
        let body = [&[kind, code, 0, 0, 0, 0, 0, 0], &quoted[..]].concat();
        icmp(&self.ip(self.address(self.speaker), to), body)
    }

    pub fn send(&self, frame: &[u8]) {
        self.site.mouths[self.speaker as usize].send(frame).unwrap();
    }
}

/// A message of ICMP or ICMPv6, with its checksum.
pub fn icmp(ip: &Ip, mut body: Vec<u8>) -> Vec<u8> {
    let protocol = if ip.source.is_ipv4() { 1 } else { 58 };
    let mut pseudo = Vec::new();
    if let (IpAddr::V6(source), IpAddr::V6(destination)) = (ip.source, ip.destination) {
        pseudo.extend(source.octets());
        pseudo.extend(destination.octets());
        pseudo.extend((body.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
    }
    let sum = checksum(&[&pseudo, &body]);
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    ip.frame(&Transport::Other {
        protocol,
        payload: body,
    })
}

/// With the mark in what it carries.
pub fn echo(it: &Scene<'_>, from: Who, way: Echo) -> Vec<u8> {
    let ip = it.between(from, Shut);
    let echo = ip.frame(&Transport::Echo { way, identifier: 7 });
    ip.with_more(echo, &it.says)
}
