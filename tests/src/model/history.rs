//! Histories: what happens to a node, drawn as numbers that mean something whatever came before, so that a history from
//! which some are taken away is one, too.

use std::net::SocketAddr;

use super::cluster::{Answer, Cluster, Health};
use super::conversation::{BACK, SECOND, Stage, THERE};
use super::oracle::Why;
use super::walk::Node;
use super::wire::{Packet, Says, Segment, Talk, Tuple, quoted};
use crate::frames::{ACK, FIN, RST, SYN};
use crate::world::{BACKEND_PORT, Family, Host, PODS, SERVICE_PORT};
use weir_common::event::Hook;
use weir_common::way::Mark;

/// One thing that happens.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    pub what: u32,
    pub dice: [u32; 6],
}

/// What is the same for all of a history.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub family: Family,
    /// How many ports may stand for others.
    pub ports: u16,
    pub is_masquerading: bool,
    /// Do tables push rows out?
    pub pushes_out: bool,
}

/// Durations around every one that means something.
const STEPS: [u64; 10] = [0, 2, 3, 10, 31, 61, 119, 121, 3601, 11_000];

impl Node {
    /// Lets it happen.
    ///
    /// # Errors
    /// As [`Node::send`].
    pub fn happen(&mut self, event: &Event, setting: &Setting) -> Result<(), String> {
        let dice = event.dice;
        match event.what % 100 {
            0..=26 => self.ask(dice),
            27..=55 => self.reply(dice),
            56..=73 => self.speak(dice),
            74..=78 => self.repeat(dice),
            79..=82 => {
                let step = STEPS[dice[0] as usize % STEPS.len()].max(u64::from(dice[1] % 3) * 2);
                let now = self.cluster.now() + step * SECOND;
                self.cluster.memory.now.set(now);
                self.note(|| format!("{step} seconds later"));
                Ok(())
            }
            83..=85 => {
                if setting.pushes_out {
                    self.push_out(dice);
                }
                Ok(())
            }
            86 => {
                self.sweep();
                Ok(())
            }
            87..=88 => {
                self.change_policy(dice);
                Ok(())
            }
            89..=90 => {
                self.change_backend(dice);
                Ok(())
            }
            91 => {
                if dice[3].is_multiple_of(3) {
                    self.change_port(dice);
                } else {
                    self.change_run(dice);
                }
                Ok(())
            }
            92 => {
                self.change_uplink(dice);
                Ok(())
            }
            93..=96 => self.report(dice),
            97 => {
                if setting.pushes_out {
                    self.fill(dice);
                }
                Ok(())
            }
            98 if dice[3].is_multiple_of(3) => self.crowd(dice),
            _ => self.pretend(dice),
        }
    }

    /// Many ends ask the same peer.
    fn crowd(&mut self, dice: [u32; 6]) -> Result<(), String> {
        let pod = PODS[dice[0] as usize % 3].0;
        let to = self.at(Host::World, [53, 443][dice[1] as usize % 2]);
        for number in 0..14 + (dice[2] % 8) as u16 {
            let from = self.at(pod, 1100 + number);
            let packet = self.packet(Tuple::new(Talk::Udp, from, to), 0, 0);
            self.send(pod, &packet, None)?;
        }
        Ok(())
    }

    /// The tables take few rows more, or as many as ever again.
    fn fill(&mut self, dice: [u32; 6]) {
        let few = dice[0] as usize % 3;
        let memory = &mut self.cluster.memory;
        memory.most = match dice[1] % 4 {
            0 => Some(memory.plans.borrow().len() + few),
            1 => Some(memory.ways.borrow().len() + few),
            _ => None,
        };
        let most = memory.most;
        self.note(|| format!("the tables take {most:?} rows"));
    }

    fn at(&self, host: Host, port: u16) -> SocketAddr {
        SocketAddr::new(host.ip(self.family()), port)
    }

    /// Somebody opens a conversation, or speaks as if there were one.
    fn ask(&mut self, dice: [u32; 6]) -> Result<(), String> {
        let number = dice[1] as usize;
        let few = (dice[2] % 4) as u16;
        let service = number % self.cluster.services.len();
        let pod = PODS[dice[3] as usize % 3].0;
        let node = SocketAddr::new(
            self.cluster.uplinks[self.cluster.route].1,
            Cluster::node_port(service),
        );
        let port = [BACKEND_PORT, BACKEND_PORT, 53, 443][number / 16 % 4];
        let (host, from, to) = match dice[0] % 20 {
            0..=7 => {
                let of_cluster = Host::Service(service as u8 + 1);
                (pod, 1000 + few, self.at(of_cluster, SERVICE_PORT))
            }
            8 => (pod, 1000 + few, node),
            9 => {
                let to = self.at(Host::OtherNode, node.port());
                (pod, 1000 + few, to)
            }
            10..=11 => {
                let peers = [Host::A, Host::B, Host::C, Host::Far, Host::D];
                (pod, 1000 + few, self.at(peers[number % 5], port))
            }
            12..=14 => (pod, 1000 + few, self.at(Host::World, port)),
            15..=16 => (Host::World, 5000 + few, node),
            17 => (Host::Far, 5000 + few, node),
            18 => (Host::Far, 6000 + few, self.at(pod, port)),
            _ => match number % 3 {
                0 => (pod, 1000 + few, self.at(Host::Node, port)),
                1 => (Host::Node, 7000 + few, self.at(pod, port)),
                _ => (Host::Node, 7000 + few, self.at(Host::World, port)),
            },
        };
        let from = self.at(host, from);
        let flags = match dice[4] % 16 {
            0 => ACK,
            1 => FIN | ACK,
            2 => [RST, SYN | ACK, SYN | FIN, SYN | RST][number / 64 % 4],
            _ => SYN,
        };
        let is_service = self.cluster.services.len() > service && to.port() == SERVICE_PORT;
        let talk = match dice[5] % 8 {
            0..=3 => Talk::Tcp,
            4 if !is_service || (dice[5] / 8).is_multiple_of(8) => Talk::Echo,
            _ => Talk::Udp,
        };
        let to = if talk == Talk::Echo {
            SocketAddr::new(to.ip(), 0)
        } else {
            to
        };
        let packet = self.packet(Tuple::new(talk, from, to), flags, dice[4] >> 8);
        self.send(host, &packet, None)
    }

    /// A packet of an end that knows its numbers.
    fn packet(&self, tuple: Tuple, flags: u8, chance: u32) -> Packet {
        let says = match tuple.talk {
            Talk::Udp => Says::Datagram,
            Talk::Echo if tuple.from.port() == 0 => Says::Reply,
            Talk::Echo => Says::Request,
            Talk::Tcp => {
                let key = (tuple.talk, tuple.from, tuple.to);
                let socket = self.sockets.get(&key).copied().unwrap_or_default();
                Says::Tcp(Segment {
                    flags,
                    number: socket.next,
                    acknowledges: socket.heard,
                    payload: [0, 0, 10, 100][chance as usize % 4],
                })
            }
        };
        Packet { tuple, says }
    }

    /// Who has received something answers.
    fn reply(&mut self, dice: [u32; 6]) -> Result<(), String> {
        let Some(of) = pick(self.inbox.len(), dice[0]).map(|at| self.inbox[at].clone()) else {
            return Ok(());
        };
        let Some(host) = self.host(of.tuple.to.ip()) else {
            return Ok(());
        };
        if of.is_error() {
            return Ok(());
        }
        if dice[1].is_multiple_of(12) {
            let bytes = of.frame([0; 6])[crate::frames::L3..].to_vec();
            return self.complain(host, of.tuple.to.ip(), &bytes, dice[2]);
        }
        // Nobody answers a connection that it does not know but with RST (RFC 9293 section 3.5.2).
        if of.tuple.talk == Talk::Tcp && self.is_strange(&of) {
            let packet = self.packet(of.tuple.back(), RST | ACK, 0);
            return self.refuse(host, &packet);
        }
        let flags = match of.segment() {
            Some(segment) if segment.opens() => [
                SYN | ACK,
                SYN | ACK,
                SYN | ACK,
                SYN | ACK,
                RST | ACK,
                SYN,
                ACK,
                RST,
            ][dice[2] as usize % 8],
            _ => flags(dice[2]),
        };
        let packet = self.packet(of.tuple.back(), flags, dice[3]);
        self.send(host, &packet, None)
    }

    /// Who has sent something sends more.
    fn speak(&mut self, dice: [u32; 6]) -> Result<(), String> {
        let Some(at) = pick(self.sent.len(), dice[0]) else {
            return Ok(());
        };
        let (host, of) = self.sent[at].clone();
        if of.is_error() {
            return Ok(());
        }
        let flags = if dice[1].is_multiple_of(6) {
            SYN
        } else {
            flags(dice[2])
        };
        let packet = self.packet(of.tuple, flags, dice[3]);
        self.send(host, &packet, None)
    }

    /// The same packet comes again: it was lost further on, or another CPU has it, too.
    fn repeat(&mut self, dice: [u32; 6]) -> Result<(), String> {
        let Some(at) = pick(self.sent.len(), dice[0]) else {
            return Ok(());
        };
        let (host, of) = self.sent[at].clone();
        for _ in 0..=dice[1] % 2 {
            self.send(host, &of, None)?;
        }
        Ok(())
    }

    /// An ICMP error about a packet, to who sent it.
    fn complain(
        &mut self,
        host: Host,
        from: std::net::IpAddr,
        bytes: &[u8],
        chance: u32,
    ) -> Result<(), String> {
        let Some(inner) = quoted(bytes) else {
            return Ok(());
        };
        let header = if inner.from.is_ipv4() { 20 } else { 40 };
        let length = [header + 8, header + 12, bytes.len()][chance as usize % 3];
        // Now and then to somebody who has not sent it.
        let to = if (chance / 3).is_multiple_of(8) {
            PODS[chance as usize / 24 % 3].0.ip(self.family())
        } else {
            inner.from.ip()
        };
        let (from, to) = (SocketAddr::new(from, 0), SocketAddr::new(to, 0));
        let packet = Packet {
            tuple: Tuple::new(Talk::Echo, from, to),
            says: Says::Error(bytes.iter().copied().take(length).collect()),
        };
        self.send(host, &packet, None)
    }

    /// A router on the way, or the node itself, says that a packet cannot go on.
    fn report(&mut self, dice: [u32; 6]) -> Result<(), String> {
        let family = self.family();
        let (queue, router) = if dice[0].is_multiple_of(3) {
            (&self.passed, Host::Node)
        } else {
            (
                &self.left,
                [Host::Farther, Host::World][dice[0] as usize / 3 % 2],
            )
        };
        let Some(bytes) = pick(queue.len(), dice[1]).map(|at| queue[at].clone()) else {
            return Ok(());
        };
        // Nobody reports about a report.
        if quoted(&bytes).is_none_or(|inner| inner.from.port() == 0 && inner.to.port() == 0) {
            return Ok(());
        }
        self.complain(router, router.ip(family), &bytes, dice[2])
    }

    /// A row of a table that pushes rows out. No TCP connection is ever pushed out.
    fn push_out(&mut self, dice: [u32; 6]) {
        let Some(index) = pick(self.oracle.conversations.len(), dice[0]) else {
            return;
        };
        let it = &self.oracle.conversations[index];
        if it.is_tcp() && it.stage == Stage::Known {
            return;
        }
        let directions: &[usize] = [&[THERE][..], &[BACK], &[THERE, BACK]][dice[1] as usize % 3];
        let asked = it.asked;
        self.lose(index, directions, Why::PushedOut);
        self.note(|| format!("rows {directions:?} of {asked:?} are pushed out"));
    }

    /// The agent sweeps.
    fn sweep(&mut self) {
        let now = self.cluster.now();
        for index in (0..self.oracle.conversations.len()).rev() {
            if self.oracle.conversations[index].is_stale(now) {
                self.lose(index, &[THERE, BACK], Why::Swept);
            }
        }
        self.note(|| "the agent has swept".to_owned());
    }

    fn change_policy(&mut self, dice: [u32; 6]) {
        let (pod, direction) = (dice[0] as usize % 3, dice[1] as usize % 2);
        let peer = dice[2] as usize % 5;
        match dice[3] % 8 {
            0 => self.cluster.bump(),
            1 => self.cluster.is_isolated[pod][direction] ^= true,
            _ => {
                let answers = [Answer::Allow, Answer::Deny, Answer::ByPort, Answer::Allow];
                let mut answer = answers[dice[4] as usize % 4];
                if dice[4].is_multiple_of(32) {
                    answer = Answer::NoRow;
                }
                self.cluster.answers[pod][direction][peer] = answer;
            }
        }
        self.cluster.write_policy();
        let isolated = self.cluster.is_isolated[pod][direction];
        let answer = self.cluster.answers[pod][direction][peer];
        self.note(|| format!("policy of pod {pod}, {direction}: {isolated}, {peer} {answer:?}"));
    }

    fn change_backend(&mut self, dice: [u32; 6]) {
        let index = dice[0] as usize % self.cluster.backends.len();
        let backend = &mut self.cluster.backends[index];
        (backend.health, backend.incarnation) = match (backend.health, dice[1] % 3) {
            (Health::Usable, 0 | 1) => (Health::Draining, backend.incarnation),
            (Health::Draining, 0 | 1) => (Health::Usable, backend.incarnation),
            (Health::Gone, _) => (Health::Usable, backend.incarnation + 1),
            _ => (Health::Gone, backend.incarnation),
        };
        let is = *backend;
        self.cluster.write_backend(index);
        self.note(|| format!("{is:?}"));
    }

    fn change_run(&mut self, dice: [u32; 6]) {
        let index = dice[0] as usize % self.cluster.services.len();
        let backends = &self.cluster.backends;
        let service = &mut self.cluster.services[index];
        let stays = |(bit, of): (usize, &usize)| {
            let is_usable = backends[*of].health == Health::Usable;
            (is_usable || dice[2].is_multiple_of(2)) && dice[1] >> (2 * bit) & 3 != 0
        };
        let members = service.members.iter().enumerate();
        service.run = members.filter(|it| stays(*it)).map(|(_, of)| *of).collect();
        let run = service.run.clone();
        self.cluster.write_service(index);
        self.note(|| format!("service {} has {run:?}", index + 1));
    }

    /// A service loses its port, or has it again.
    fn change_port(&mut self, dice: [u32; 6]) {
        let services = self.cluster.services.len();
        let gone = (0..services).find(|index| !self.cluster.services[*index].is_there);
        let index = gone.unwrap_or(dice[0] as usize % services);
        self.cluster.services[index].is_there ^= true;
        self.cluster.write_service(index);
        self.note(|| format!("service {}: {}", index + 1, gone.is_some()));
    }

    fn change_uplink(&mut self, dice: [u32; 6]) {
        match dice[0] % 4 {
            0 | 1 => self.cluster.route ^= 1,
            2 => self.cluster.share_address(),
            _ => self.cluster.renumber(),
        }
        let (route, uplinks) = (self.cluster.route, self.cluster.uplinks);
        self.note(|| format!("uplink {route} of {uplinks:?}"));
    }

    /// Somebody claims to be somebody else.
    fn pretend(&mut self, dice: [u32; 6]) -> Result<(), String> {
        let pod = PODS[dice[1] as usize % 3].0;
        let others = [
            Host::A,
            Host::B,
            Host::C,
            Host::Node,
            Host::Far,
            Host::Farther,
        ];
        let as_whom = others[dice[2] as usize % 6];
        let talk = [Talk::Tcp, Talk::Udp][dice[3] as usize % 2];
        let to = self.at(pod, BACKEND_PORT);
        let from = self.at(as_whom, 8000 + (dice[4] % 4) as u16);
        let tuple = Tuple::new(talk, from, to);
        match dice[0] % 8 {
            0 => {
                let sender = PODS[dice[5] as usize % 3].0;
                let packet = self.packet(tuple, SYN, 0);
                self.send(sender, &packet, None)
            }
            1 => {
                let mine = self.at(pod, 8000);
                let to = self.at(Host::World, 443);
                let packet = self.packet(Tuple::new(talk, mine, to), SYN, 0);
                self.send(pod, &packet, Some(as_whom.mac()))
            }
            2 => {
                // At a pod's device, for another pod.
                let other = PODS[dice[5] as usize % 3];
                let packet = self.packet(tuple, SYN, 0);
                let uplink = self.uplink();
                self.to_pod(&packet, other.1, uplink, Mark::NONE)
            }
            3 => {
                // Another program of ours has passed it at this very device.
                let packet = self.packet(tuple, SYN, 0);
                let device = pod.ifindex().unwrap_or(0);
                self.pass_by(Hook::FROM_POD, device, Mark::PASSED, &packet)
            }
            4 => {
                // The node answers what was marked, and its kernel marks the answer (`net.ipv4.fwmark_reflect`).
                let (uplink, own) = self.cluster.uplinks[self.cluster.route];
                let tuple = Tuple::new(talk, SocketAddr::new(own, 8000), self.at(as_whom, 443));
                let packet = self.packet(tuple, SYN, 0);
                self.pass_by(Hook::TO_NET, uplink, Mark::LEAVING, &packet)
            }
            _ => {
                let packet = self.packet(tuple, [SYN, ACK][dice[5] as usize % 2], 0);
                let uplink = self.uplink();
                let device = pod.ifindex().unwrap_or(0);
                self.to_pod(&packet, device, uplink, Mark::NONE)
            }
        }
    }
}

fn flags(chance: u32) -> u8 {
    let all = [
        ACK,
        ACK,
        ACK,
        ACK,
        ACK,
        ACK,
        FIN | ACK,
        FIN | ACK,
        FIN | ACK,
        RST | ACK,
        RST,
        SYN | ACK,
    ];
    all[chance as usize % all.len()]
}

fn pick(of: usize, chance: u32) -> Option<usize> {
    (of > 0).then(|| chance as usize % of)
}
