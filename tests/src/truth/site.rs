//! Where situations are played: two nodes on one wire, nine pods, a machine outside; the change of a situation, and a look at what
//! passes in it.
//!
//! A denial is not waited for. Every question is one packet until it is answered, and every packet that is dropped is counted, so what
//! is denied is known for certain as soon as as many were dropped by policy as should have been.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use weir_common::Protocol;

use super::objects::{NAMESPACES, OTHERS, PEOPLE, PODS, Scene, everybody, uid};
use super::party::{Arrived, Look, PORTS, Party, Question};
use super::situations::Situation;
use super::who::claims;
use crate::admin::{ask, dropped};
use crate::lan::{Pair, Place};
use crate::machine::Machine;
use crate::node::{Family, Pod};
use crate::oracle;
use crate::workloads::Workload;

/// Of the machine outside.
const OUTSIDE: [&str; 2] = ["10.210.0.200", "fd00:210::200"];
/// The file with everything that changes; one file is read whole or not at all.
const FILE: &str = "situation.yaml";
/// How long the agents may take until they say that they have applied it.
const APPLIED: Duration = Duration::from_secs(5);
/// How long a look may take: the kernel repeats what opens a connection after a second, and it would be counted twice.
const PATIENCE: Duration = Duration::from_millis(900);
const PROTOCOLS: [Protocol; 3] = [Protocol::TCP, Protocol::UDP, Protocol::SCTP];
/// Everybody asks from other ports after so many situations; until then open flows are judged again.
const RENEWAL: u16 = 3;

/// What became of a question that should have been denied: it was answered, or arrived and its answer did not.
const PASSED: &str = "passed";
const ARRIVED: &str = "arrived";

/// Where the pods are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Layout {
    /// All on the first node.
    OneNode,
    /// Every second one on the other.
    TwoNodes,
}

/// A question between two of [`everybody`].
#[derive(Clone, Copy, Debug)]
struct Probe {
    from: usize,
    to: usize,
    side: usize,
    protocol: Protocol,
    port: u16,
}

/// Everything goes on drop.
#[derive(Debug)]
pub struct Site {
    layout: Layout,
    parties: Vec<Party>,
    addresses: Vec<[IpAddr; 2]>,
    probes: Vec<Probe>,
    arrived: Arrived,
    number: u16,
    /// Situations that a second look was needed for.
    pub again: Vec<String>,
    /// Questions, and how many of them were to be denied.
    pub asked: usize,
    pub denied: u64,
    pods: Vec<Pod>,
    _outside: Machine,
    pair: Pair,
}

impl Site {
    /// # Errors
    /// As of [`Pair::start`].
    pub fn start(name: &str, layout: Layout) -> Result<Self> {
        let pair = Pair::start(name)?;
        let outside = Machine::new("outside")?;
        pair.lan.plug(
            &outside,
            &[&format!("{}/24", OUTSIDE[0]), &format!("{}/64", OUTSIDE[1])],
        )?;
        for place in &pair.places {
            for (range, via) in place.pod_cidrs.iter().zip(&place.addresses) {
                outside.netns().add_route(range, via.parse()?)?;
            }
        }
        let mut site = Self {
            layout,
            parties: Vec::new(),
            addresses: Vec::new(),
            probes: Vec::new(),
            arrived: Arrived::default(),
            number: 0,
            again: Vec::new(),
            asked: 0,
            denied: 0,
            pods: Vec::new(),
            _outside: outside,
            pair,
        };
        site.write(&Situation::nothing())?;
        for at in 0..PEOPLE {
            let pod = site.run_pod(at)?;
            let addresses = [pod.address(Family::V4)?, pod.address(Family::V6)?];
            site.join(&everybody()[at], pod.netns().path(), addresses)?;
            site.pods.push(pod);
        }
        let nodes = [0, 1].map(|at| site.pair.nodes[at].machine().netns().path());
        let places = site.pair.places.clone();
        for ((name, netns), place) in OTHERS.iter().zip(nodes).zip(places) {
            let [v4, v6] = place.addresses;
            site.join(name, netns, [v4.parse()?, v6.parse()?])?;
        }
        let netns = site._outside.netns().path();
        let [v4, v6] = OUTSIDE;
        site.join(OTHERS[2], netns, [v4.parse()?, v6.parse()?])?;
        site.probes = probes(site.addresses.len());
        Ok(site)
    }

    fn run_pod(&self, at: usize) -> Result<Pod> {
        let node = &self.pair.nodes[self.home(at)];
        let workload = Workload::named(NAMESPACES[at / PODS.len()].0, PODS[at % PODS.len()].0);
        let file = format!("pods/{}.{}.yaml", workload.namespace, workload.name);
        let mut pod = node.declare_pod_as(workload, uid(at))?;
        // The situation has its object.
        std::fs::remove_file(node.manifests().join(file))?;
        node.add_pod(&mut pod)?;
        Ok(pod)
    }

    /// The pod goes, and comes again.
    fn replace(&mut self, name: &str) -> Result<()> {
        let at = everybody().iter().position(|it| it == name);
        let at = at.filter(|at| *at < PEOPLE).context("it is no pod")?;
        let node = &self.pair.nodes[self.home(at)];
        let env = self.pods[at].cni_env();
        let env: Vec<_> = env.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let released = node.cni("DEL", &env, &node.cni_config("1.1.0"))?;
        ensure!(released.status.success(), "{released:?}");
        let pod = self.run_pod(at)?;
        let addresses = [pod.address(Family::V4)?, pod.address(Family::V6)?];
        ensure!(
            addresses != self.addresses[at],
            "{name} has other addresses"
        );
        self.parties[at] = Party::start(name, pod.netns().path(), addresses, &self.arrived)?;
        self.addresses[at] = addresses;
        self.pods[at] = pod;
        Ok(())
    }

    fn join(
        &mut self,
        name: &str,
        netns: std::path::PathBuf,
        addresses: [IpAddr; 2],
    ) -> Result<()> {
        let party = Party::start(name, netns, addresses, &self.arrived)?;
        self.parties.push(party);
        self.addresses.push(addresses);
        Ok(())
    }

    /// The node of a pod.
    fn home(&self, at: usize) -> usize {
        match self.layout {
            Layout::OneNode => 0,
            Layout::TwoNodes => at % 2,
        }
    }

    /// Changes to this situation, and looks whether exactly what may pass in it passes. Returns what did not, or what should not
    /// have, a line each.
    ///
    /// # Errors
    /// The situation is not understood or contradicts what a person said of it, or an agent does not answer.
    pub fn play(&mut self, situation: &Situation) -> Result<Vec<String>> {
        self.write(situation)?;
        if let Some(name) = situation.comes_again {
            self.replace(name)?;
            self.write(situation)?;
        }
        let expected = self.expected(situation)?;
        if self.number.is_multiple_of(RENEWAL) {
            self.parties.iter().try_for_each(Party::renew)?;
        }
        let mut wrong = self.look(&expected)?;
        // What passed that should not have is a leak, however busy the machine was.
        let leaks = |it: &String| it.ends_with(PASSED) || it.ends_with(ARRIVED);
        if !wrong.is_empty() && !wrong.iter().any(leaks) {
            // What a machine that is busy lost or repeated is not lost again.
            self.again.push(format!(
                "{}: {}: {}",
                situation.name,
                wrong.len(),
                wrong[..wrong.len().min(4)].join(", ")
            ));
            wrong = self.look(&expected)?;
        }
        Ok(wrong)
    }

    fn scene<'a>(&'a self, situation: &'a Situation, homes: &'a [&'a Place]) -> Scene<'a> {
        Scene {
            addresses: &self.addresses,
            homes,
            host_pod: &self.pair.places[1],
            policies: &situation.policies,
            labels: &situation.labels,
        }
    }

    fn homes(&self) -> Vec<&Place> {
        let homes = (0..PEOPLE).map(|at| &self.pair.places[self.home(at)]);
        homes.collect()
    }

    /// Writes the situation, and waits until both agents have applied it.
    fn write(&mut self, situation: &Situation) -> Result<()> {
        self.number += 1;
        // Last in the order in which the agent hears of objects; the one before is the last that it hears is gone.
        let mark = |number: u16| format!("zz/mark-{number}");
        let homes = self.homes();
        for (node, place) in self.pair.nodes.iter().zip(&self.pair.places) {
            let text = self.scene(situation, &homes).text(Some(place))?;
            let text = format!(
                "{text}\n---\n{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, \
                 metadata: {{namespace: zz, name: mark-{}}}, spec: {{podSelector: {{}}}}}}\n",
                self.number
            );
            node.write_manifest(FILE, &text)?;
        }
        let deadline = Instant::now() + APPLIED;
        for node in &self.pair.nodes {
            loop {
                let answer = ask(node, "policy")?;
                let has = |mark: &str| {
                    let rows = answer.as_array();
                    rows.is_some_and(|rows| rows.iter().any(|row| row["policy"] == mark))
                };
                if has(&mark(self.number)) && !has(&mark(self.number - 1)) {
                    break;
                }
                ensure!(Instant::now() < deadline, "not applied: {answer}");
                std::thread::sleep(Duration::from_millis(3));
            }
            // It may have answered between hearing it and applying it, but not twice.
            ask(node, "policy")?;
        }
        Ok(())
    }

    /// By probe, may it pass?
    fn expected(&self, situation: &Situation) -> Result<Vec<bool>> {
        let homes = self.homes();
        let (cluster, parties) = self.scene(situation, &homes).cluster()?;
        // Those between the same two follow each other.
        let ends = |it: &Probe| (it.from, it.to, it.side);
        let mut expected = Vec::with_capacity(self.probes.len());
        for same in self.probes.chunk_by(|one, other| ends(one) == ends(other)) {
            let (from, to, side) = ends(&same[0]);
            let (from, to) = (&parties[from][side], &parties[to][side]);
            let sent = oracle::sent(&cluster, from, to);
            let received = oracle::received(&cluster, from, to);
            let may = |it: &Probe| {
                sent.includes(it.protocol, it.port) && received.includes(it.protocol, it.port)
            };
            expected.extend(same.iter().map(may));
        }
        self.hold_against(situation, &expected)?;
        Ok(expected)
    }

    /// The oracle against what a person says.
    fn hold_against(&self, situation: &Situation, expected: &[bool]) -> Result<()> {
        let names = everybody();
        for claim in claims(situation.says).with_context(|| situation.name)? {
            for side in 0..2 {
                if claim.family.is_some_and(|it| (it == 6) != (side == 1)) {
                    continue;
                }
                let mut found: Vec<&str> = Vec::new();
                for (probe, may) in self.probes.iter().zip(expected) {
                    let (own, other) = match claim.asks {
                        true => (probe.from, probe.to),
                        false => (probe.to, probe.from),
                    };
                    let is_it = own == 0
                        && probe.side == side
                        && (probe.protocol, probe.port) == (claim.protocol, claim.port);
                    if is_it && *may {
                        found.push(&names[other]);
                    }
                }
                found.sort_unstable();
                ensure!(
                    found == claim.who,
                    "{}: {claim:?}, and the oracle says {found:?}",
                    situation.name
                );
            }
        }
        Ok(())
    }

    fn look(&mut self, expected: &[bool]) -> Result<Vec<String>> {
        self.number += 1;
        let before = self.dropped()?;
        let look = Arc::new(Look::new(self.number));
        let start = Instant::now();
        for (from, party) in self.parties.iter().enumerate() {
            let places = self.probes.iter().enumerate();
            let questions = places.filter(|(_, probe)| probe.from == from);
            let questions = questions.map(|(place, probe)| Question {
                place: place as u16,
                protocol: probe.protocol,
                target: SocketAddr::new(self.addresses[probe.to][probe.side], probe.port),
            });
            party.ask(&look, questions.collect())?;
        }
        let may = expected.iter().filter(|may| **may).count();
        let must_not = (expected.len() - may) as u64;
        let denied = loop {
            let passed = look.hits().len();
            let is_late = start.elapsed() > PATIENCE;
            if passed >= may || is_late {
                let denied = self.dropped()? - before;
                if denied >= must_not || is_late {
                    break denied;
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.parties.iter().try_for_each(Party::leave)?;
        self.asked += expected.len();
        self.denied += must_not;
        let hits = look.hits();
        let arrived = self.arrived.lock();
        let arrived = std::mem::take(&mut *arrived.unwrap_or_else(PoisonError::into_inner));
        let names = everybody();
        let mut wrong = Vec::new();
        for (place, (probe, may)) in self.probes.iter().zip(expected).enumerate() {
            let has = hits.contains(&(place as u16));
            let was = match (has, may) {
                (true, false) => PASSED,
                (false, true) => "lost",
                (false, false) if arrived.contains(&look.tag(place as u16)) => ARRIVED,
                _ => continue,
            };
            let (from, to) = (&names[probe.from], &names[probe.to]);
            let protocol = match probe.protocol {
                Protocol::TCP => "TCP",
                Protocol::UDP => "UDP",
                _ => "SCTP",
            };
            let family = [4, 6][probe.side];
            wrong.push(format!(
                "{from} to {to} {protocol} {} v{family} {was}",
                probe.port
            ));
        }
        if wrong.is_empty() && denied != must_not {
            wrong.push(format!(
                "{denied} dropped by policy of {must_not} to be denied"
            ));
        }
        Ok(wrong)
    }

    /// How many packets policy has dropped on both nodes.
    fn dropped(&self) -> Result<u64> {
        let mut sum = 0;
        for node in &self.pair.nodes {
            let all = dropped(node)?;
            let of = |reason| all.get(reason).copied().unwrap_or_default();
            sum += of("egress_denied") + of("ingress_denied");
        }
        Ok(sum)
    }
}

/// Everything that policy could have a say in: one end is a pod.
fn probes(people: usize) -> Vec<Probe> {
    let mut probes = Vec::new();
    for from in 0..people {
        for to in 0..people {
            if from >= PEOPLE && to >= PEOPLE {
                continue;
            }
            for side in 0..2 {
                for protocol in PROTOCOLS {
                    // Nobody's SCTP is translated (docs/operations.md, `not_translatable`).
                    if protocol == Protocol::SCTP && from < PEOPLE && to + 1 == people {
                        continue;
                    }
                    probes.extend(PORTS.map(|port| Probe {
                        from,
                        to,
                        side,
                        protocol,
                        port,
                    }));
                }
            }
        }
    }
    probes
}
