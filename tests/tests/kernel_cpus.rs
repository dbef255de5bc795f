//! Ring 3: two CPUs at once. Two threads run the programs on the packets of one conversation, or of two that want the same, at
//! the same moment, thousands of times. Needs root and two CPUs.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, anyhow, ensure};
use aya::Ebpf;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::way::{Plan, Way};
use weir_tests::bytes::{Bytes, leaving};
use weir_tests::frames::{ACK, Ip, L3, SYN, Transport};
use weir_tests::programs::{
    counted, dropped, in_own_namespace, load_hooks, make_devices, rows, run, write_all,
};
use weir_tests::world::{
    FAMILIES, Family, Host, NAT_PORT, NODE_PORT, SERVICE_PORT, SHARED, UPLINK, world,
};

/// How many conversations of each kind are begun twice at once.
const CONVERSATIONS: u16 = 1_500;
/// How many packets each CPU sends on a conversation that is known.
const PACKETS: u64 = 10_000;
/// How often each CPU sends a SYN.
const ASKED: u64 = 5;
/// What the first thread and the second one run on.
const CPUS: [usize; 2] = [0, 1];

/// Where two threads wait for each other, again and again: closer than a lock wakes them.
#[derive(Default)]
struct Start {
    arrived: AtomicUsize,
}

impl Start {
    fn wait(&self, round: usize) {
        self.arrived.fetch_add(1, Ordering::SeqCst);
        let mut tries = 0_u32;
        while self.arrived.load(Ordering::SeqCst) < 2 * (round + 1) {
            tries += 1;
            // The other one may want this CPU's time, where a machine is busy.
            if tries.is_multiple_of(500) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
}

/// What became of a packet.
type Became = (i32, Vec<u8>, u32);

/// Runs both packets of each round at once, one on each CPU, and returns what became of them.
fn at_once(ebpf: &Ebpf, hook: Hook, rounds: &[[Bytes; 2]]) -> Result<Vec<[Became; 2]>> {
    let start = Start::default();
    let side = |side: usize| -> Result<Vec<Became>> {
        let mut cpu = CpuSet::new();
        cpu.set(CPUS[side])?;
        sched_setaffinity(Pid::from_raw(0), &cpu)?;
        let mut all = Vec::new();
        for (round, packets) in rounds.iter().enumerate() {
            start.wait(round);
            all.push(run(ebpf, hook, &packets[side]));
        }
        all.into_iter().collect()
    };
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| side(0));
        let second = scope.spawn(|| side(1));
        (first.join(), second.join())
    });
    let panicked = |_| anyhow!("a thread panicked");
    let (first, second) = (first.map_err(panicked)??, second.map_err(panicked)??);
    Ok(first
        .into_iter()
        .zip(second)
        .map(<[Became; 2]>::from)
        .collect())
}

/// The programs with the tables of the world, and a hundred ports for what leaves.
fn kernel() -> Result<Ebpf> {
    make_devices()?;
    let mut memory = world();
    memory.config.first_port = NAT_PORT;
    memory.config.last_port = NAT_PORT + 99;
    let mut ebpf = load_hooks(memory.config)?;
    write_all(&mut ebpf, &memory)?;
    Ok(ebpf)
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Tcp,
    Udp,
}

const KINDS: [Kind; 2] = [Kind::Tcp, Kind::Udp];

fn frame(family: Family, kind: Kind, flags: u8, from: (Host, u16), to: (Host, u16)) -> Vec<u8> {
    let mut ip = Ip::between(from.0.ip(family), to.0.ip(family));
    ip.source_mac = from.0.mac();
    let (ports, payload) = ((from.1, to.1), vec![7; 40]);
    ip.frame(&match kind {
        Kind::Tcp => Transport::Tcp {
            ports,
            flags,
            payload: if flags == ACK { payload } else { Vec::new() },
        },
        Kind::Udp => Transport::Udp { ports, payload },
    })
}

fn twice(packet: Bytes) -> [Bytes; 2] {
    [packet.clone(), packet]
}

/// Of every kind in both families.
fn each_kind() -> impl Iterator<Item = (Family, Kind)> {
    FAMILIES
        .into_iter()
        .flat_map(|family| KINDS.map(|kind| (family, kind)))
}

/// Rows of plans, and of ways, of both tables.
fn held(ebpf: &mut Ebpf) -> Result<[usize; 2]> {
    let mut held = [0; 2];
    for name in ["TCP_PLANS", "OTHER_PLANS"] {
        held[0] += rows::<Plan, { size_of::<Plan>() }>(ebpf, name)?.len();
    }
    for name in ["TCP_WAYS", "OTHER_WAYS"] {
        held[1] += rows::<Way, { size_of::<Way>() }>(ebpf, name)?.len();
    }
    Ok(held)
}

#[test]
fn a_first_packet_on_two_cpus_opens_one_conversation() -> Result<()> {
    in_own_namespace(|| {
        let mut ebpf = kernel()?;
        let b = Host::B.ifindex().unwrap_or(0);
        let mut opened = 0;
        for (family, kind) in each_kind() {
            // Of a pod with a service of two backends, and of somebody outside with a node port.
            let to_service = |port| {
                let frame = frame(family, kind, SYN, (Host::B, port), (SHARED, SERVICE_PORT));
                twice(Bytes::new(b, frame))
            };
            let to_node_port = |port| {
                let to = (Host::Node, NODE_PORT);
                let frame = frame(family, kind, SYN, (Host::World, port), to);
                twice(Bytes::new(UPLINK, frame))
            };
            let ports = 2_000..2_000 + CONVERSATIONS;
            let of_pod: Vec<_> = ports.clone().map(to_service).collect();
            let from_outside: Vec<_> = ports.map(to_node_port).collect();
            for (hook, rounds) in [(Hook::FROM_POD, of_pod), (Hook::FROM_NET, from_outside)] {
                let mut backends = std::collections::BTreeSet::new();
                for (round, both) in at_once(&ebpf, hook, &rounds)?.iter().enumerate() {
                    let [first, second] = both;
                    ensure!(first == second, "{family:?} {kind:?} {round}: {both:02x?}");
                    ensure!(first.0 != 2, "{family:?} {kind:?} {round} is dropped");
                    ensure!(first.1 != rounds[round][0].frame, "it is translated");
                    backends.insert(destination(family, &first.1).to_vec());
                }
                if kind == Kind::Tcp {
                    // Nobody answers, and the pod asks again.
                    for _ in 1..ASKED {
                        at_once(&ebpf, hook, &rounds)?;
                    }
                }
                let many = if hook == Hook::FROM_POD { 2 } else { 1 };
                ensure!(backends.len() == many, "{backends:?}");
                opened += u64::from(CONVERSATIONS);
            }
        }
        let counts = [Counter::FlowsOpened, Counter::NatPortsTaken];
        let counts: Result<Vec<_>> = counts
            .map(|it| counted(&mut ebpf, it))
            .into_iter()
            .collect();
        ensure!(counts? == [opened, 0], "{opened} were opened");
        ensure!(held(&mut ebpf)? == [opened as usize, 0]);
        for (name, asked) in [("TCP_PLANS", ASKED), ("OTHER_PLANS", 1)] {
            for (key, plan) in rows::<Plan, { size_of::<Plan>() }>(&mut ebpf, name)? {
                let counted = plan.way.packets.load(Ordering::Relaxed);
                ensure!(counted == 2 * asked, "{key:?}: {counted} of {}", 2 * asked);
            }
        }
        let dropped = dropped(&mut ebpf)?;
        ensure!(dropped.is_empty(), "{dropped:?}");
        Ok(())
    })
}

fn destination(family: Family, frame: &[u8]) -> &[u8] {
    match family {
        Family::V4 => &frame[L3 + 16..L3 + 20],
        Family::V6 => &frame[L3 + 24..L3 + 40],
    }
}

/// The transport's source port in a frame without options.
fn source_port(family: Family, frame: &[u8]) -> u16 {
    let at = L3 + if family == Family::V4 { 20 } else { 40 };
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

#[test]
fn two_cpus_never_give_one_port_to_two() -> Result<()> {
    in_own_namespace(|| {
        let mut ebpf = kernel()?;
        let (mut taken, mut refused) = (0, 0);
        for (family, kind) in each_kind() {
            // Towards each peer two pods with many ports between them come at once; then one does twice.
            let leaves = |host, port, peer| {
                let to = (Host::World, peer);
                leaving(UPLINK, frame(family, kind, SYN, (host, port), to))
            };
            let two = (0..CONVERSATIONS).map(|number| {
                let (peer, port) = (number / 50, 3_000 + number % 50);
                [Host::B, Host::C].map(|host| leaves(host, port, 500 + peer))
            });
            let two: Vec<_> = two.collect();
            let one = (0..CONVERSATIONS).map(|number| {
                let (peer, port) = (number / 50, 3_000 + number % 50);
                twice(leaves(Host::B, port, 5_000 + peer))
            });
            let one: Vec<_> = one.collect();
            let mut given = std::collections::BTreeSet::new();
            for (round, both) in at_once(&ebpf, Hook::TO_NET, &two)?.iter().enumerate() {
                for (answer, frame, _) in both {
                    // Towards one peer there are no more than a hundred, and a pod may not have all.
                    if *answer == 2 {
                        refused += 1;
                        continue;
                    }
                    let port = source_port(family, frame);
                    ensure!((NAT_PORT..NAT_PORT + 100).contains(&port), "{port}");
                    ensure!(given.insert((round / 50, port)), "{port} was given twice");
                    taken += 1;
                }
            }
            for (round, both) in at_once(&ebpf, Hook::TO_NET, &one)?.iter().enumerate() {
                let [first, second] = both;
                ensure!(first == second, "{family:?} {kind:?} {round}: {both:02x?}");
                if first.0 == 2 {
                    refused += 2;
                    continue;
                }
                let port = source_port(family, &first.1);
                ensure!(
                    given.insert((1_000 + round / 50, port)),
                    "{port} was given twice"
                );
                taken += 1;
            }
        }
        println!("{taken} ports taken, {refused} packets found none");
        ensure!(taken > u64::from(CONVERSATIONS) * 8, "{taken}");
        for counter in [Counter::FlowsOpened, Counter::NatPortsTaken] {
            let counted = counted(&mut ebpf, counter)?;
            ensure!(counted == taken, "{counter:?}: {counted}, not {taken}");
        }
        ensure!(held(&mut ebpf)? == [taken as usize, 0]);
        let dropped = dropped(&mut ebpf)?;
        let found_none = |it: &(weir_common::DropReason, u64)| {
            *it == (weir_common::DropReason::NoNatPort, refused)
        };
        ensure!(dropped.iter().all(found_none), "{dropped:?}");
        Ok(())
    })
}

#[test]
fn what_two_cpus_count_is_all_there() -> Result<()> {
    in_own_namespace(|| {
        let mut ebpf = kernel()?;
        let b = Host::B.ifindex().unwrap_or(0);
        for (family, kind) in each_kind() {
            let (client, to) = ((Host::B, 4_000), (SHARED, SERVICE_PORT));
            let asks = Bytes::new(b, frame(family, kind, SYN, client, to));
            let (_, became, _) = run(&ebpf, Hook::FROM_POD, &asks)?;
            let chosen = destination(family, &became);
            let backend = [Host::A, Host::C]
                .into_iter()
                .find(|host| match host.ip(family) {
                    std::net::IpAddr::V4(ip) => chosen == ip.octets(),
                    std::net::IpAddr::V6(ip) => chosen == ip.octets(),
                });
            let Some(backend) = backend else {
                anyhow::bail!("{chosen:?} is no backend");
            };
            let device = backend.ifindex().unwrap_or(0);
            let from = (backend, weir_tests::world::BACKEND_PORT);
            let answers = Bytes::new(device, frame(family, kind, SYN | ACK, from, client));
            run(&ebpf, Hook::FROM_POD, &answers)?;
            let talks = Bytes::new(b, frame(family, kind, ACK, client, to));
            run(&ebpf, Hook::FROM_POD, &talks)?;
            let name = if kind == Kind::Tcp {
                "TCP_WAYS"
            } else {
                "OTHER_WAYS"
            };
            let ways = |ebpf: &mut Ebpf| -> Result<Vec<[u64; 2]>> {
                let mut ways = rows::<Way, { size_of::<Way>() }>(ebpf, name)?;
                ways.retain(|(key, _)| key.source == Host::B.addr(family));
                let count =
                    |way: &Way| [&way.packets, &way.bytes].map(|it| it.load(Ordering::Relaxed));
                Ok(ways.iter().map(|(_, way)| count(way)).collect())
            };
            let before = ways(&mut ebpf)?;
            let length = (talks.frame.len() - L3) as u64;
            let rounds = vec![twice(talks); PACKETS as usize];
            at_once(&ebpf, Hook::FROM_POD, &rounds)?;
            let after = ways(&mut ebpf)?;
            let ([before], [after]) = (&before[..], &after[..]) else {
                anyhow::bail!("{family:?} {kind:?}: {before:?} and {after:?} are not one way");
            };
            let counted = [after[0] - before[0], after[1] - before[1]];
            let sent = [2 * PACKETS, 2 * PACKETS * length];
            ensure!(
                counted == sent,
                "{family:?} {kind:?}: {counted:?} of {sent:?}"
            );
        }
        let dropped = dropped(&mut ebpf)?;
        ensure!(dropped.is_empty(), "{dropped:?}");
        Ok(())
    })
}
