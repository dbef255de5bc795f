//! What happens in a history, and what everybody but the troublemakers has at its end.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use tokio::sync::{oneshot, watch};
use weir_cli::explained::Explained;
use weir_cli::question::Question;
use weir_common::Addr;
use weir_common::policy::{Class, VerdictKey};

use super::machine::Memory;
use crate::conditions::{Board, NodeState};
use crate::config::{PodCidrs, Settings};
use crate::events::Names;
use crate::line::{Input, Line, Parts, Published};
use crate::model::{Change, Kind, Object};
use crate::pods::{Attachment, Lease, LeaseState, Mac, Macs, PodRef};
use crate::tell::Roster;
use crate::watch::documents::{Parsed, parse};
use crate::watch::status::{Health, WatchStatus};
use crate::zone_feed::ZoneFeed;

/// Something that happens. The names of troublemakers begin with `bad`.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// This object is said.
    Said(&'static str),
    Gone(&'static str),
    /// The plugin has made a device for this pod.
    Add(&'static str),
    Del(&'static str),
    Restart,
    Tick,
    Audit,
    Quarantined,
    /// A pod deletes its own device.
    Lost(&'static str),
    /// The kernel refuses the device of `bad`, and every frontend of the thief's own address.
    Refused,
}

/// What there is at the end of a history.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) others: Others,
    /// ADDs that were answered well.
    pub(super) opened: usize,
    /// Conditions that hold.
    pub(super) conditions: usize,
}

/// What everybody has who is no troublemaker.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Others {
    node: NodeState,
    /// Backends by address and port.
    services: BTreeMap<SocketAddr, Vec<SocketAddr>>,
    /// The answers to ADDs and DELs, in their order; none for those that wait.
    answers: Vec<(&'static str, Option<Result<(), String>>)>,
    /// Rows of devices, by interface index: addresses and rules.
    devices: BTreeMap<u32, (Addr, u32, u32)>,
    /// What the tables say of packets between them: receiver, sender, action.
    verdicts: Vec<(u32, Addr, Option<u8>)>,
}

/// The cluster IP of the Service that asks for others' addresses.
const THIEF: [u8; 4] = [10, 96, 0, 77];
const GOOD: [&str; 2] = ["good-a", "good-b"];
const OBJECTS: [&str; 14] = [
    "service good-a",
    "service good-b",
    "slice good-a",
    "slice good-b",
    "pod good-a",
    "pod good-b",
    "pod good-far",
    "policy good",
    "service bad-external",
    "service bad-ports",
    "pod bad",
    "pod bad-host-port",
    "pod bad-far",
    "node bad",
];

impl Step {
    pub(super) fn random(random: &mut Rng) -> Self {
        let mut pick = |all: &[&'static str]| all[random.usize(..all.len())];
        let (object, pod) = (pick(&OBJECTS), pick(&["good-a", "good-b", "bad"]));
        match random.u8(..24) {
            0..=7 => Self::Said(object),
            8..=9 => Self::Gone(object),
            10..=13 => Self::Add(pod),
            14..=15 => Self::Del(pod),
            16 => Self::Restart,
            17..=18 => Self::Tick,
            19 => Self::Audit,
            20 => Self::Quarantined,
            21..=22 => Self::Lost("bad"),
            _ => Self::Refused,
        }
    }

    /// Is it a troublemaker's?
    pub(super) fn is_trouble(&self) -> bool {
        match self {
            Self::Said(what) | Self::Gone(what) | Self::Add(what) | Self::Del(what) => {
                what.contains("bad")
            }
            Self::Restart | Self::Tick | Self::Audit => false,
            Self::Quarantined | Self::Lost(_) | Self::Refused => true,
        }
    }
}

pub(super) struct World {
    memory: Memory,
    line: Line<Memory>,
    board: Arc<Board>,
    objects: Arc<Objects>,
    /// What the source would say after a restart.
    said: BTreeMap<&'static str, Object>,
    leases: BTreeMap<&'static str, Arc<Lease>>,
    answers: Vec<(&'static str, oneshot::Receiver<Result<(), String>>)>,
    health: watch::Sender<Health>,
    now: Instant,
}

impl World {
    pub(super) fn new(objects: Arc<Objects>) -> Self {
        let memory = Memory::new();
        let health = Kind::ALL.map(|kind| (kind, WatchStatus::Synced));
        let health = watch::Sender::new(health.into());
        let (line, board) = start(&memory, &health);
        let mut world = Self {
            memory,
            line,
            board,
            objects,
            said: BTreeMap::new(),
            leases: BTreeMap::new(),
            answers: Vec::new(),
            health,
            now: Instant::now(),
        };
        for name in ["node n1", "node n2", "namespace shop"] {
            world.said.insert(name, world.objects[name].clone());
        }
        world.begin();
        world
    }

    pub(super) fn step(&mut self, step: &Step) {
        match *step {
            Step::Said(name) => {
                let object = self.objects[name].clone();
                self.said.insert(name, object.clone());
                self.line.inputs.take(Change::Applied(object));
            }
            Step::Gone(name) => {
                if let Some(object) = self.said.remove(name) {
                    self.line.inputs.take(Change::Deleted(object.id()));
                }
            }
            Step::Add(pod) => self.add(pod),
            Step::Del(pod) => {
                if let Some(lease) = self.leases.remove(pod) {
                    let (closed, answer) = oneshot::channel();
                    self.line.take(Input::Released { lease, closed });
                    self.answers.push((pod, answer));
                }
            }
            Step::Restart => {
                (self.line, self.board) = start(&self.memory, &self.health);
                self.begin();
            }
            Step::Tick => {}
            Step::Audit => {
                let is_there = |lease: &&Arc<Lease>| !self.memory.faults.is_gone(index(lease));
                let there = self.leases.values().filter(is_there);
                let devices = there.map(|lease| (lease.device(), index(lease)));
                let devices = devices.collect();
                let leases = self
                    .leases
                    .values()
                    .map(|it| (it.attachment.clone(), it.clone()));
                let leases = Arc::new(leases.collect());
                let (orphans, _) = oneshot::channel();
                self.line.take(Input::Devices {
                    leases,
                    devices,
                    orphans,
                });
            }
            Step::Quarantined => self.line.inputs.take(Change::Quarantined {
                object: "NetworkPolicy shop/bad".into(),
                reason: "it makes no sense".into(),
            }),
            Step::Lost(pod) => self.memory.faults.lose(index_of(pod)),
            Step::Refused => {
                self.memory.faults.refuse(index_of("bad"));
                self.memory.faults.refuse(Addr::from(IpAddr::from(THIEF)));
            }
        }
        self.go_on();
    }

    /// The settings of a pod's device cannot be put back, or can be again.
    pub(super) fn settings_stick(&self, pod: &str, do_they: bool) {
        match do_they {
            true => self.memory.faults.stick(index_of(pod)),
            false => self.memory.faults.unstick(index_of(pod)),
        }
    }

    /// Who has a fault of this label.
    pub(super) fn troubled(&self, fault: &str) -> Vec<String> {
        let all = self.board.all().into_iter();
        let of = all.filter(|it| it.condition.about.fault() == fault);
        of.map(|it| it.condition.about.to_string()).collect()
    }

    /// The kernel takes no class for this pod's address.
    pub(super) fn refuse_class_of(&self, pod: &str) {
        let address = Addr::from(address_of(pod));
        self.memory.faults.refuse(address);
    }

    pub(super) fn explain(&self, from: &str, to: &str) -> Explained {
        let question = Question::read(from, to).unwrap();
        self.line.matter(&question).unwrap().explain(from, to)
    }

    /// Waits until nothing more follows from what was said.
    pub(super) fn finish(mut self) -> Outcome {
        for _ in 0..6 {
            self.go_on();
        }
        let mut opened = 0;
        let mut answers = Vec::new();
        for (pod, answer) in &mut self.answers {
            let answer = answer.try_recv().ok();
            opened += usize::from(matches!(answer, Some(Ok(()))));
            if *pod != "bad" {
                answers.push((*pod, answer));
            }
        }
        let conditions = self.board.all().len();
        Outcome {
            others: Others {
                node: (*self.board.node()).clone(),
                services: self.services(),
                answers,
                devices: self.devices(),
                verdicts: self.verdicts(),
            },
            opened,
            conditions,
        }
    }

    fn add(&mut self, pod: &'static str) {
        if self.leases.contains_key(pod) {
            return;
        }
        let lease = lease(pod);
        self.leases.insert(pod, lease.clone());
        let (opened, answer) = oneshot::channel();
        self.line.take(Input::Leased { lease, opened });
        self.answers.push((pod, answer));
    }

    /// What an agent hears at its start.
    fn begin(&mut self) {
        let leases = self.leases.values().cloned().collect();
        self.line.take(Input::Resumed(leases));
        self.line.take(Input::Outlets(Vec::new()));
        for object in self.said.values() {
            self.line.inputs.take(Change::Applied(object.clone()));
        }
        for kind in Kind::ALL {
            self.line.inputs.take(Change::Synced(kind));
        }
        self.go_on();
    }

    fn go_on(&mut self) {
        self.line.pass(self.now);
        self.now += Duration::from_secs(1);
        // Seconds go by faster here, so that tables are audited too.
        self.line.ticks += 4;
        self.line.tick(self.now);
        self.line.pass(self.now);
    }

    fn services(&self) -> BTreeMap<SocketAddr, Vec<SocketAddr>> {
        let backends = self.memory.backends.rows();
        let address =
            |addr: Addr, port: weir_common::Port| SocketAddr::new(addr.into(), port.into());
        let rows = self.memory.frontends.rows().into_iter();
        // Without its own Service an address is anybody's.
        let said = |name: &&str| self.said.contains_key(format!("service {name}").as_str());
        let good: Vec<_> = GOOD.into_iter().filter(said).map(virtual_of).collect();
        let rows =
            rows.filter(|(key, _)| good.contains(&key.addr.into()) && !key.scope.is_external());
        rows.filter(|(key, _)| u16::from(key.port) == 80)
            .map(|(key, row)| {
                let run = row.segment.start..row.segment.start + row.segment.len;
                let run = run.filter_map(|at| backends.get(&at));
                (
                    address(key.addr, key.port),
                    run.map(|it| address(it.addr, it.port)).collect(),
                )
            })
            .collect()
    }

    fn devices(&self) -> BTreeMap<u32, (Addr, u32, u32)> {
        let rows = self.memory.devices.rows().into_iter();
        let rows = rows.filter(|(index, _)| *index != index_of("bad"));
        rows.map(|(index, row)| (index, (row.ipv4, row.ingress.0, row.egress.0)))
            .collect()
    }

    fn verdicts(&self) -> Vec<(u32, Addr, Option<u8>)> {
        let classes = self.memory.classes.rows();
        let verdicts = self.memory.verdicts.rows();
        let rows = self.memory.devices.rows();
        // A pod that the cluster has forgotten has no policy, and is closed while it still runs.
        let is_said = |pod: &&str| self.said.contains_key(format!("pod {pod}").as_str());
        let said: Vec<u32> = GOOD.into_iter().filter(is_said).map(index_of).collect();
        let good = rows.iter().filter(|(index, _)| said.contains(index));
        let mut found = Vec::new();
        for (index, row) in good {
            for sender in ["good-a", "good-b", "good-far"] {
                let sender = Addr::from(address_of(sender));
                let class = classes.get(&sender).copied().unwrap_or(Class::WORLD);
                let rules = row.ingress;
                let verdict = verdicts.get(&VerdictKey { rules, class });
                found.push((*index, sender, verdict.map(|row| row.action.0)));
            }
        }
        found
    }
}

fn start(memory: &Memory, health: &watch::Sender<Health>) -> (Line<Memory>, Arc<Board>) {
    let board = Arc::new(Board::default());
    let line = Line::resume(Parts {
        settings: Arc::new(settings()),
        machine: memory.clone(),
        health: health.subscribe(),
        node_addresses: vec!["192.0.2.1".parse().unwrap()],
        ranges: vec!["10.0.1.0/24".parse().unwrap()],
        zone: ZoneFeed::new("cluster.local"),
        names: Names::default(),
        roster: Roster::default(),
        board: board.clone(),
        published: Arc::new(Published::default()),
    });
    (line.unwrap(), board)
}

fn settings() -> Settings {
    Settings {
        pod_cidrs: PodCidrs::Given(vec!["10.0.1.0/24".parse().unwrap()]),
        external_ip_ranges: vec!["10.96.0.0/16".parse().unwrap()],
        ..Settings::for_tests("n1")
    }
}

/// The last number of everything that has this name.
fn number(name: &str) -> u8 {
    let names = ["good-a", "good-b", "bad", "good-far"];
    10 + names.iter().position(|it| *it == name).unwrap() as u8
}

fn address_of(pod: &str) -> IpAddr {
    let node = if pod == "good-far" { 2 } else { 1 };
    [10, 0, node, number(pod)].into()
}

fn virtual_of(service: &str) -> IpAddr {
    [10, 96, 0, number(service)].into()
}

fn index_of(pod: &str) -> u32 {
    100 + u32::from(number(pod))
}

fn index(lease: &Lease) -> u32 {
    lease.devices().unwrap().host_ifindex
}

fn lease(pod: &'static str) -> Arc<Lease> {
    Arc::new(Lease {
        attachment: Attachment::new(format!("container-of-{pod}"), "eth0").unwrap(),
        network: "weir".into(),
        netns: number(pod).into(),
        pod: Some(PodRef {
            namespace: "shop".into(),
            name: pod.into(),
            uid: Some(format!("uid-{pod}")),
        }),
        addresses: vec![address_of(pod)],
        macs: Macs {
            host: Mac([2; 6]),
            pod: Mac([4; 6]),
        },
        state: LeaseState::Attached {
            host_ifindex: index_of(pod),
        },
        boot_id: String::new(),
        leased_at: 0,
    })
}

/// Every object that a history can say, by a name of its own.
pub(super) type Objects = BTreeMap<&'static str, Object>;

pub(super) fn objects() -> Objects {
    let mut objects = BTreeMap::new();
    let mut add = |name: &'static str, text: String| {
        let documents = parse("history", &text);
        let object = documents.into_iter().find_map(|parsed| match parsed {
            Parsed::Ours(document) => document.outcome.unwrap().object,
            Parsed::Foreign(_) => None,
        });
        objects.insert(name, object.unwrap());
    };
    let meta = |name: &str, labels: &str| {
        format!(
            "metadata: {{name: {name}, namespace: shop, uid: uid-{name}, labels: {{{labels}}}}}"
        )
    };
    for (n, name) in [(1, "node n1"), (2, "node n2")] {
        add(
            name,
            format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: n{n}}}\nspec: {{podCIDRs: [10.0.{n}.0/24]}}\n\
             status: {{addresses: [{{type: InternalIP, address: 192.0.2.{n}}}]}}"
            ),
        );
    }
    // It claims the ranges of both others, and their addresses.
    add("node bad", "apiVersion: v1\nkind: Node\nmetadata: {name: bad}\nspec: {podCIDRs: [10.0.3.0/24]}\nstatus: {addresses: \
        [{type: InternalIP, address: 198.51.100.1}]}".into());
    add(
        "namespace shop",
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}".into(),
    );
    for (service, slice) in [
        ("service good-a", "slice good-a"),
        ("service good-b", "slice good-b"),
    ] {
        let name = &service[8..];
        let (ip, pod) = (virtual_of(name), address_of(name));
        add(
            service,
            format!(
                "apiVersion: v1\nkind: Service\n{}\nspec: {{clusterIP: {ip}, clusterIPs: [{ip}], ports: [{{port: 80}}]}}",
                meta(name, "")
            ),
        );
        add(
            slice,
            format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n{}\naddressType: IPv4\nports: [{{port: 80}}]\n\
             endpoints: [{{addresses: [{pod}]}}]",
                meta(
                    &format!("{name}-1"),
                    &format!("kubernetes.io/service-name: {name}")
                )
            ),
        );
    }
    let [a, b] = GOOD.map(virtual_of);
    add(
        "service bad-external",
        format!(
            "apiVersion: v1\nkind: Service\n{}\nspec: {{clusterIP: 10.96.0.77, clusterIPs: [10.96.0.77], externalIPs: [{a}, {b}], ports: \
         [{{port: 80}}]}}",
            meta("a-thief", "")
        ),
    );
    add(
        "service bad-ports",
        format!(
            "apiVersion: v1\nkind: Service\n{}\nspec: {{clusterIP: {a}, clusterIPs: [{a}], type: NodePort, ports: [{{port: 81, nodePort: \
         30080}}]}}",
            meta("bad-ports", "")
        ),
    );
    let pod = |name: &str, node: &str, ips: &str, more: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\n{}\nspec: {{nodeName: {node}, containers: [{{name: c, image: x{more}}}]}}\nstatus: {{phase: \
             Running, podIPs: [{ips}]}}",
            meta(name, "app: web")
        )
    };
    add("pod good-a", pod("good-a", "n1", "", ""));
    add("pod good-b", pod("good-b", "n1", "", ""));
    add("pod good-far", pod("good-far", "n2", "{ip: 10.0.2.13}", ""));
    add("pod bad", pod("bad", "n1", "", ""));
    let stolen = "{ip: 10.0.1.10}, {ip: 10.0.1.11}, {ip: 10.0.2.13}";
    add("pod bad-far", pod("zz-bad-far", "bad", stolen, ""));
    add(
        "pod bad-host-port",
        pod(
            "bad-host-port",
            "n1",
            "",
            ", ports: [{containerPort: 80, hostPort: 30080}]",
        ),
    );
    add(
        "policy good",
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n{}\nspec: {{podSelector: {{}}, policyTypes: [Ingress], ingress: [{{from: \
         [{{podSelector: {{matchLabels: {{app: web}}}}}}]}}]}}",
            meta("good", "")
        ),
    );
    objects
}
