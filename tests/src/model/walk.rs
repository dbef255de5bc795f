//! A packet's way through the node, program by program, each asked of the datapath and told to the model; and what is
//! true from end to end, whatever happens in between: a client sees the address that it spoke to, and nobody outside
//! sees a pod's.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};

use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::way::Mark;
use weir_datapath::{Scratch, Verdict};

use super::cluster::Cluster;
use super::conversation::{BACK, Stage, THERE};
use super::oracle::{Arrival, Counts, Oracle, Seen, Why};
use super::wire::{Packet, Says, Talk, Tuple, quoted};
use crate::bytes::Bytes;
use crate::frames::{ACK, L3, RST, checksums_are_right};
use crate::stories::decide;
use crate::world::{Family, Host};

/// What a TCP end knows of its numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Socket {
    pub next: u32,
    pub heard: u32,
}

/// A node with all that happens around it.
#[derive(Debug)]
pub struct Node {
    pub cluster: Cluster,
    pub oracle: Oracle,
    /// What has arrived lately, as its receiver saw it.
    pub inbox: VecDeque<Packet>,
    /// What was sent lately, and by whom.
    pub sent: VecDeque<(Host, Packet)>,
    /// IP packets that pods were let send or that have come in, and that have left the node.
    pub passed: VecDeque<Vec<u8>>,
    pub left: VecDeque<Vec<u8>>,
    pub sockets: HashMap<(Talk, SocketAddr, SocketAddr), Socket>,
    spoken: HashSet<Tuple>,
    /// Who has reached a pod by its own address.
    direct: HashSet<(IpAddr, IpAddr)>,
    /// Packets that met a program.
    pub packets: u64,
    /// What a receiver could not make sense of, by what had happened before.
    pub strange: BTreeMap<Why, u64>,
    /// By the reason's label.
    pub dropped: BTreeMap<&'static str, u64>,
    /// What has happened, for people.
    pub trace: Vec<String>,
    pub is_tracing: bool,
    /// Compare every row after every packet.
    pub is_strict: bool,
}

/// Ports of those who ask; servers have others.
pub fn is_clients(port: u16) -> bool {
    matches!(port, 1000..=1999 | 5000..=7999)
}

fn keep<T>(queue: &mut VecDeque<T>, latest: T, most: usize) {
    if queue.len() == most {
        queue.pop_front();
    }
    queue.push_back(latest);
}

/// A program, and what it is told about a packet.
#[derive(Clone, Copy, Debug)]
struct Before {
    hook: Hook,
    ifindex: u32,
    received_by: u32,
    mark: Mark,
    mac: [u8; 6],
    is_right_mac: bool,
}

impl Node {
    pub fn new(cluster: Cluster) -> Self {
        Self {
            cluster,
            oracle: Oracle::default(),
            inbox: VecDeque::new(),
            sent: VecDeque::new(),
            passed: VecDeque::new(),
            left: VecDeque::new(),
            sockets: HashMap::new(),
            spoken: HashSet::new(),
            direct: HashSet::new(),
            packets: 0,
            strange: BTreeMap::new(),
            dropped: BTreeMap::new(),
            trace: Vec::new(),
            is_tracing: false,
            is_strict: false,
        }
    }

    pub fn family(&self) -> Family {
        self.cluster.family
    }

    pub fn uplink(&self) -> u32 {
        self.cluster.uplinks[self.cluster.route].0
    }

    pub fn note(&mut self, what: impl FnOnce() -> String) {
        if self.is_tracing {
            let line = what();
            self.trace.push(line);
        }
    }

    /// Who has an address.
    pub fn host(&self, ip: IpAddr) -> Option<Host> {
        if self.cluster.is_own(ip) {
            return Some(Host::Node);
        }
        let hosts = [
            Host::A,
            Host::B,
            Host::C,
            Host::Far,
            Host::Farther,
            Host::World,
            Host::OtherNode,
        ];
        let family = self.family();
        hosts.into_iter().find(|host| host.ip(family) == ip)
    }

    /// Somebody sends a packet.
    ///
    /// # Errors
    /// The datapath and the model do not agree about it, or somebody sees what must not be seen.
    pub fn send(
        &mut self,
        host: Host,
        packet: &Packet,
        mac: Option<[u8; 6]>,
    ) -> Result<(), String> {
        keep(&mut self.sent, (host, packet.clone()), 16);
        self.send_aside(host, packet, mac)
    }

    /// Somebody sends a packet that is no conversation of its own.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn refuse(&mut self, host: Host, packet: &Packet) -> Result<(), String> {
        let was_spoken = self.spoken.contains(&packet.tuple);
        let done = self.send_aside(host, packet, None);
        if !was_spoken {
            self.spoken.remove(&packet.tuple);
        }
        done
    }

    fn send_aside(
        &mut self,
        host: Host,
        packet: &Packet,
        mac: Option<[u8; 6]>,
    ) -> Result<(), String> {
        if !packet.is_error() {
            self.spoken.insert(packet.tuple);
            if let Some(segment) = packet.segment() {
                let key = (Talk::Tcp, packet.tuple.from, packet.tuple.to);
                let socket = self.sockets.entry(key).or_default();
                socket.next = segment.end();
            }
        }
        self.note(|| format!("{host:?} sends {packet:?}"));
        if let Some(device) = host.ifindex() {
            let before = Before {
                hook: Hook::FROM_POD,
                ifindex: device,
                received_by: device,
                mark: Mark::NONE,
                mac: mac.unwrap_or(host.mac()),
                is_right_mac: mac.is_none_or(|mac| mac == host.mac()),
            };
            let Some((verdict, packet, mark)) = self.meet(before, packet)? else {
                return Ok(());
            };
            if matches!(verdict, Verdict::Redirect(_)) {
                return self.arrive(&packet);
            }
            let bytes = packet.frame([0; 6])[L3..].to_vec();
            keep(&mut self.passed, bytes, 16);
            return self.route(&packet, device, mark);
        }
        if host == Host::Node {
            return self.route(packet, 0, Mark::NONE);
        }
        let uplink = self.uplink();
        let before = Before {
            hook: Hook::FROM_NET,
            ifindex: uplink,
            received_by: uplink,
            mark: Mark::NONE,
            mac: [2; 6],
            is_right_mac: true,
        };
        match self.meet(before, packet)? {
            Some((_, packet, mark)) => {
                let bytes = packet.frame([0; 6])[L3..].to_vec();
                keep(&mut self.passed, bytes, 16);
                self.route(&packet, uplink, mark)
            }
            None => Ok(()),
        }
    }

    /// The node's stack sends a packet where it belongs.
    fn route(&mut self, packet: &Packet, received_by: u32, mark: Mark) -> Result<(), String> {
        let to = packet.tuple.to.ip();
        if let Some((_, device)) = self.cluster.pod(to) {
            let Some(device) = device else {
                return Ok(());
            };
            return self.to_pod(packet, device, received_by, mark);
        }
        if self.cluster.is_own(to) {
            return self.arrive(packet);
        }
        let before = Before {
            hook: Hook::TO_NET,
            ifindex: self.uplink(),
            received_by,
            mark,
            mac: [2; 6],
            is_right_mac: true,
        };
        let Some((_, packet, _)) = self.meet(before, packet)? else {
            return Ok(());
        };
        let from = packet.tuple.from.ip();
        let hides = self.cluster.is_masquerading() && !self.cluster.is_in_cluster(to);
        let is_known = self.direct.contains(&(to, from));
        if hides && !is_known && self.cluster.pod(from).is_some() {
            return Err(format!("outside sees the address of a pod: {packet:?}"));
        }
        let bytes = packet.frame([0; 6])[L3..].to_vec();
        keep(&mut self.left, bytes, 16);
        self.arrive(&packet)
    }

    /// A packet at a pod's device.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn to_pod(
        &mut self,
        packet: &Packet,
        device: u32,
        received_by: u32,
        mark: Mark,
    ) -> Result<(), String> {
        let before = Before {
            hook: Hook::TO_POD,
            ifindex: device,
            received_by,
            mark,
            mac: [2; 6],
            is_right_mac: true,
        };
        let Some((_, packet, _)) = self.meet(before, packet)? else {
            return Ok(());
        };
        if mark == Mark::NONE {
            let tuple = packet.tuple;
            self.spoken.insert(tuple);
            self.direct.insert((tuple.from.ip(), tuple.to.ip()));
        }
        self.arrive(&packet)
    }

    /// A packet that bears a mark already meets a program, and goes no further.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn pass_by(
        &mut self,
        hook: Hook,
        ifindex: u32,
        mark: Mark,
        packet: &Packet,
    ) -> Result<(), String> {
        let before = Before {
            hook,
            ifindex,
            received_by: 0,
            mark,
            mac: [2; 6],
            is_right_mac: true,
        };
        self.meet(before, packet).map(|_| ())
    }

    /// A packet meets a program. `None` if it is dropped.
    fn meet(
        &mut self,
        before: Before,
        packet: &Packet,
    ) -> Result<Option<(Verdict, Packet, Mark)>, String> {
        self.packets += 1;
        let frame = packet.frame(before.mac);
        let length = (frame.len() - L3) as u64;
        let mut bytes = Bytes {
            mark: before.mark.bits() | 0xffff_0001,
            received_by: before.received_by,
            ..Bytes::new(before.ifindex, frame.clone())
        };
        let memory = &self.cluster.memory;
        let judged = memory.counted(Counter::Judged);
        let mut scratch = Scratch::default();
        let verdict = decide(before.hook, &mut bytes, memory, &mut scratch);
        let judged = memory.counted(Counter::Judged) - judged;
        let label = before.hook.label();
        self.note(|| format!("  {label} {}: {verdict:?}", before.ifindex));
        let is_dropped = matches!(verdict, Verdict::Drop(_));
        let is_refused = matches!(verdict, Verdict::Refuse(_));
        if is_dropped && bytes.frame != frame {
            return Err(format!("{label}: it is dropped, and was touched"));
        }
        if !is_dropped && !checksums_are_right(&bytes.frame) {
            return Err(format!("{label}: a checksum is wrong"));
        }
        if bytes.mark & !Mark::MASK != 0xffff_0001 & !Mark::MASK {
            return Err(format!("{label}: others' bits of the mark were touched"));
        }
        let after = Packet::read(&bytes.frame).ok_or("it cannot be read any more")?;
        let mark = Mark::of(bytes.mark);
        if is_refused {
            refuses(packet, &frame, &after).map_err(|error| format!("{label}: {error}"))?;
        }
        let arrival = Arrival {
            hook: before.hook,
            ifindex: before.ifindex,
            received_by: before.received_by,
            mark: before.mark,
            packet,
            is_right_mac: before.is_right_mac,
            length,
        };
        let seen = Seen {
            verdict,
            mark,
            packet: &after,
        };
        let what = |error| format!("{label}, {packet:?}: {error}");
        self.oracle
            .watch(&self.cluster, &arrival, &seen)
            .map_err(what)?;
        if let Some(should) = self.oracle.judged
            && should != (judged > 0)
        {
            return Err(what(format!("policy was asked {judged} times")));
        }
        self.compare().map_err(what)?;
        if let Verdict::Drop(reason) | Verdict::Refuse(reason) = verdict {
            *self.dropped.entry(reason.label()).or_default() += 1;
            return Ok(None);
        }
        Ok(Some((verdict, after, mark)))
    }

    /// Compares what both know.
    fn compare(&self) -> Result<(), String> {
        let memory = &self.cluster.memory;
        let counts = Counts {
            opened: memory.counted(Counter::FlowsOpened),
            answered: memory.counted(Counter::FlowsAnswered),
            ports: memory.counted(Counter::NatPortsTaken),
            delivered: memory.counted(Counter::LocalDeliveries),
            translated: memory.counted(Counter::PacketsTranslated),
            masqueraded: memory.counted(Counter::PacketsMasqueraded),
            lost: memory.counted(Counter::WaysLost),
        };
        if counts != self.oracle.counts {
            return Err(format!("{counts:?} instead of {:?}", self.oracle.counts));
        }
        let is_all = self.is_strict || self.packets.is_multiple_of(16);
        for it in &self.oracle.conversations {
            if is_all || self.oracle.touched == Some((it.hooks[THERE], it.asked)) {
                let is_others = [THERE, BACK].map(|direction| {
                    let (hook, key) = (it.hooks[direction], it.arrives(direction));
                    !it.rows[direction] && self.oracle.known(hook, &key).is_some()
                });
                it.compare(memory, is_others)
                    .map_err(|error| format!("{error} ({it:?})"))?;
            }
        }
        let asked = self.oracle.conversations.iter();
        let plans = asked.filter(|it| it.stage == Stage::Asked).count();
        let ways = self.oracle.ways();
        let are = (memory.plans.borrow().len(), memory.ways.borrow().len());
        if are != (plans, ways) {
            return Err(format!("{are:?} rows instead of {:?}", (plans, ways)));
        }
        Ok(())
    }

    /// A packet has come to its receiver, who must be able to make sense of it.
    fn arrive(&mut self, packet: &Packet) -> Result<(), String> {
        let Packet { tuple, says } = packet;
        let Some(host) = self.host(tuple.to.ip()) else {
            return Ok(());
        };
        self.note(|| format!("  {host:?} receives {packet:?}"));
        // What a server gets is whatever policy lets through; a client knows whom it has asked.
        let client = match says {
            Says::Error(about) => quoted(about)
                // What nobody knows is for the node to make sense of.
                .filter(|inner| host != Host::Node && !self.spoken.contains(inner))
                // Named exception OneRow: nor what is said about an answer to it.
                .filter(|inner| {
                    let mut all = self.oracle.conversations.iter();
                    !all.any(|it| it.stage == Stage::Asked && it.goes_on(BACK) == *inner)
                })
                .map(|inner| (self.client(inner), [tuple.to.ip(), inner.to.ip()])),
            _ => Some((tuple.to, [tuple.from.ip(); 2])).filter(|_| self.is_strange(packet)),
        };
        if let Some((client, pods)) = client {
            // A pod that is its own backend answers to the address that it asked, at its own port; and who is at that address
            // may refuse it.
            let itself = pods.map(|pod| SocketAddr::new(pod, client.port()));
            let mut whose = [client].into_iter().chain(itself);
            let Some(why) = whose.find_map(|client| self.oracle.gone.get(&client)) else {
                return Err(format!("{client} cannot make sense of {packet:?}"));
            };
            *self.strange.entry(*why).or_default() += 1;
        }
        if let Some(segment) = packet.segment() {
            let key = (Talk::Tcp, tuple.to, tuple.from);
            let socket = self.sockets.entry(key).or_default();
            socket.heard = segment.end();
        }
        keep(&mut self.inbox, packet.clone(), 24);
        Ok(())
    }

    /// Does a client get it from somebody whom it has never asked?
    pub fn is_strange(&self, packet: &Packet) -> bool {
        let Tuple { from, to, .. } = packet.tuple;
        let asks = is_clients(to.port()) && !is_clients(from.port());
        asks && packet.says != Says::Request && !self.spoken.contains(&packet.tuple.back())
    }

    /// The client of a conversation of which a server or the client has sent a packet.
    fn client(&self, sent: Tuple) -> SocketAddr {
        if is_clients(sent.from.port()) {
            return sent.from;
        }
        // Whom a port of the node stands for.
        let mut all = self.oracle.conversations.iter();
        let behind = all.find(|it| it.is_masqueraded && it.goes == sent.back());
        behind.map_or(sent.to, |it| it.asked.from)
    }

    /// A row is pushed out, or what belongs together is swept.
    pub fn lose(&mut self, index: usize, directions: &[usize], why: Why) {
        let memory = &self.cluster.memory;
        let Some(it) = self.oracle.conversations.get_mut(index) else {
            return;
        };
        let key = |direction: usize| it.arrives(direction).row(it.hooks[direction]);
        if it.stage == Stage::Asked {
            memory.plans.borrow_mut().remove(&key(BACK));
            self.oracle.remove(index, why);
            return;
        }
        for direction in directions {
            if it.rows[*direction] {
                memory.ways.borrow_mut().remove(&key(*direction));
            }
        }
        for direction in directions {
            it.rows[*direction] = false;
        }
        let (client, is_gone) = (it.asked.from, it.rows == [false; 2]);
        if !is_gone {
            self.oracle.miss(client, why);
        } else {
            self.oracle.remove(index, why);
        }
    }
}

/// Is it the answer of a closed port to a packet: a RST (RFC 9293 section 3.10.7.1), or an error that quotes it (RFC 792,
/// RFC 4443 section 3.1)?
fn refuses(packet: &Packet, frame: &[u8], answer: &Packet) -> Result<(), String> {
    let Tuple { from, to, .. } = packet.tuple;
    let is_right = match (packet.segment(), &answer.says) {
        (Some(of), Says::Tcp(reset)) => {
            let (flags, number, acknowledges) = if of.flags & ACK != 0 {
                (RST, of.acknowledges, 0)
            } else {
                (RST | ACK, 0, of.end())
            };
            answer.tuple == packet.tuple.back()
                && (reset.flags, reset.number, reset.acknowledges) == (flags, number, acknowledges)
        }
        (None, Says::Error(about)) => {
            let ends = (answer.tuple.from.ip(), answer.tuple.to.ip());
            ends == (to.ip(), from.ip()) && frame[L3..].starts_with(about) && about.len() >= 28
        }
        _ => false,
    };
    if is_right {
        return Ok(());
    }
    Err(format!("{packet:?} is refused with {answer:?}"))
}
