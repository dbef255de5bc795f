//! Ring 3: the programs in the running kernel, against the same decisions on the host. Needs root. Runs
//! in a network namespace of its own.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::Ebpf;
use aya::maps::{HashMap, MapData, PerCpuArray, PerCpuValues};
use aya::programs::{CgroupAttachMode, Program};
use weir_agent::kernel::object::OBJECT;
use weir_common::DropReason;
use weir_common::Protocol;
use weir_common::counter::Counter;
use weir_common::event::{EventLimit, Hook};
use weir_common::fragment::{Fragment, FragmentKey};
use weir_common::service::{Affinity, AffinityKey};
use weir_common::table::TABLES;
use weir_common::way::{Plan, Way, WayKey};
use weir_datapath::{Scratch, Verdict};
use weir_tests::bytes::Bytes;
use weir_tests::edges::{Edge, edges};
use weir_tests::mix::{Arrival, Mix};
use weir_tests::programs::{self, in_own_namespace};
use weir_tests::stories::{Story, decide, stories};
use weir_tests::tables::{Memory, copy, copy_plan};
use weir_tests::world::{FAMILIES, SHARED, world};
use zerocopy::transmute;

#[test]
fn the_object_has_the_tables_that_both_sides_agree_on() -> Result<()> {
    let object = aya_obj::Object::parse(OBJECT).map_err(|error| anyhow!("{error}"))?;
    let mut ours: Vec<&str> = object
        .maps
        .keys()
        .map(String::as_str)
        // Memory of programs that is not kept, and sections of the object.
        .filter(|name| !name.starts_with('.') && *name != "SCRATCH")
        .collect();
    let mut named: Vec<&str> = TABLES.iter().map(|table| table.name).collect();
    ours.sort_unstable();
    named.sort_unstable();
    assert_eq!(ours, named);
    Ok(())
}

#[test]
fn socket_programs_attach_to_a_cgroup() -> Result<()> {
    let mut ebpf = programs::load()?;
    let folder = std::path::PathBuf::from(format!(
        "/sys/fs/cgroup/unified/weir-kernel-{}",
        std::process::id()
    ));
    std::fs::create_dir(&folder).context("make a cgroup")?;
    let mut attach = || -> Result<usize> {
        let cgroup = std::fs::File::open(&folder)?;
        let mut attached = 0;
        for (name, program) in ebpf.programs_mut() {
            let Program::CgroupSockAddr(program) = program else {
                continue;
            };
            program.load()?;
            program
                .attach(cgroup.as_fd(), CgroupAttachMode::Single)
                .with_context(|| format!("attach {name}"))?;
            attached += 1;
        }
        Ok(attached)
    };
    let attached = attach();
    drop(ebpf);
    std::fs::remove_dir(&folder)?;
    assert_eq!(attached?, 8);
    Ok(())
}

#[test]
fn host_and_kernel_agree_on_random_packets() -> Result<()> {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse().ok())
    };
    let seed = number("WEIR_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |now| now.as_nanos() as u64)
    });
    let each = number("WEIR_PACKETS").unwrap_or(100_000) as usize;
    println!("WEIR_SEED={seed} WEIR_PACKETS={each}");
    // What leaves through an uplink was sent by a pod.
    let pods = [Hook::FROM_POD, Hook::TO_POD];
    let uplinks = [Hook::TO_NET, Hook::FROM_NET];
    in_own_namespace(move || agree(seed, each, &pods, &[]))
        .and_then(|()| in_own_namespace(move || agree(seed, each / 2, &uplinks, &pods[..1])))
        .and_then(|()| in_own_namespace(move || agree(!seed, each / 2, &uplinks, &pods[..1])))
        .with_context(|| format!("WEIR_SEED={seed}"))
}

#[test]
fn host_and_kernel_agree_on_every_edge() -> Result<()> {
    in_own_namespace(|| {
        let mut kernel = Kernel::new()?;
        programs::write_all(&mut kernel.ebpf, &world())?;
        let mut run = 0;
        for edge in edges() {
            let Edge {
                name,
                arrival,
                verdict,
            } = edge;
            if kernel_refuses(&arrival.packet.frame) {
                continue;
            }
            run += 1;
            let (memory, mut scratch, mut after) =
                (world(), Scratch::default(), arrival.packet.clone());
            let host = decide(arrival.hook, &mut after, &memory, &mut scratch);
            ensure!(host == verdict, "{name}: host {host:?}, wanted {verdict:?}");
            let (answer, frame, mark) = kernel.run(arrival.hook, &arrival.packet)?;
            ensure!(
                answer == action(arrival.hook, verdict),
                "{name}: kernel {answer}, wanted {verdict:?}"
            );
            ensure!(
                frame == after.frame && mark == after.mark,
                "{name}: host {after:02x?}\nkernel {frame:02x?} mark {mark:#x}"
            );
            kernel.forget_flows()?;
        }
        println!("{run} edges agree");
        ensure!(run > 120, "only {run} edges were run");
        Ok(())
    })
}

#[test]
fn host_and_kernel_agree_on_every_story() -> Result<()> {
    in_own_namespace(|| {
        let mut kernel = Kernel::new()?;
        programs::write_all(&mut kernel.ebpf, &world())?;
        let mut run = 0;
        for Story { name, steps } in stories() {
            let memory = world();
            for (number, step) in steps.into_iter().enumerate() {
                let (mut scratch, mut after) = (Scratch::default(), step.packet.clone());
                let host = decide(step.hook, &mut after, &memory, &mut scratch);
                let at = format!("{name}, step {number}");
                ensure!(
                    host == step.verdict,
                    "{at}: host {host:?}, wanted {:?}",
                    step.verdict
                );
                let (answer, frame, mark) = kernel.run(step.hook, &step.packet)?;
                ensure!(
                    answer == action(step.hook, host) && frame == after.frame && mark == after.mark,
                    "{at}: host {after:02x?}\nkernel {answer} {frame:02x?} mark {mark:#x}"
                );
                run += 1;
            }
            kernel.same_conversations(&memory)?;
            kernel.forget_flows()?;
        }
        println!("{run} steps agree");
        ensure!(run > 60, "only {run} steps were run");
        Ok(())
    })
}

#[test]
fn refusals_above_their_rate_are_silent_and_counted() -> Result<()> {
    in_own_namespace(|| {
        let mut cpu = nix::sched::CpuSet::new();
        cpu.set(0)?;
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpu)?;
        let mut kernel = Kernel::new()?;
        programs::write_all(&mut kernel.ebpf, &world())?;
        kernel.allow_refusals(2)?;
        let name = "a datagram to a service without backends (V4)";
        let edge = edges().into_iter().find(|edge| edge.name == name);
        let Arrival { hook, packet } = edge.context(name)?.arrival;
        for (answer, is_answered) in [(7, true), (7, true), (2, false), (2, false)] {
            let (said, frame, _) = kernel.run(hook, &packet)?;
            ensure!(said == answer && (frame != packet.frame) == is_answered);
        }
        let tally = Tally {
            drops: BTreeMap::from([(DropReason::NoBackend as u8, 4)]),
            ..Tally::default()
        };
        kernel.same_drops(&BTreeMap::from([((hook.0, 0), tally)]))?;
        let map: PerCpuArray<_, u64> = programs::map(&mut kernel.ebpf, "COUNTERS")?.try_into()?;
        let refusals: u64 = map.get(&(Counter::Refusals as u32), 0)?.iter().sum();
        ensure!(refusals == 2, "{refusals}");
        Ok(())
    })
}

/// What the program of a hook returns for a verdict: on pods' devices "pass" is the last word, on uplinks others may
/// still have one.
fn action(hook: Hook, verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass if matches!(hook, Hook::FROM_POD | Hook::TO_POD) => 0,
        Verdict::Pass => -1,
        Verdict::Redirect(_) | Verdict::Refuse(_) => 7,
        Verdict::Drop(_) => 2,
    }
}

/// What the programs of one hook answered.
#[derive(Default)]
struct Tally {
    run: usize,
    pass: usize,
    redirect: usize,
    drops: BTreeMap<u8, u64>,
    refused: usize,
}

/// How long ago the last packet of a row may be, in seconds, after time was made to pass. Host and kernel read the clock one after
/// the other, and a tick may come between: so no limit (2, 3, 30, 60, 120 s) is nearer than the second that [`AGED_AFTER`] packets
/// take at most.
const AGES: [u64; 5] = [0, 10, 40, 90, 200];
const AGED_AFTER: usize = 4_000;

/// Runs so many packets of each family through the programs of `hooks`, among some through those of
/// `beside`.
fn agree(seed: u64, each: usize, hooks: &[Hook], beside: &[Hook]) -> Result<()> {
    let mut kernel = Kernel::new()?;
    let mut memory = world();
    // The only service with a choice: the two sides would draw different numbers.
    let shared = FAMILIES.map(|family| SHARED.addr(family));
    memory
        .frontends
        .retain(|key, _| !shared.contains(&key.addr));
    programs::write_all(&mut kernel.ebpf, &memory)?;
    let mut mix = Mix::new(seed);
    let mut scratch = Scratch::default();
    let mut tallies: BTreeMap<(u8, usize), Tally> = BTreeMap::new();
    let start = Instant::now();
    let (mut step, mut taken, mut places) = (0, 0, BTreeMap::new());
    let is_done = |tallies: &BTreeMap<(u8, usize), Tally>| {
        hooks.iter().all(|hook| {
            (0..FAMILIES.len()).all(|family| {
                tallies
                    .get(&(hook.0, family))
                    .is_some_and(|tally| tally.run >= each)
            })
        })
    };
    while !is_done(&tallies) {
        step += 1;
        if step % 500 == 0 {
            change(&mut memory, &mut mix);
            programs::write_changing(&mut kernel.ebpf, &memory)?;
        }
        if step % AGED_AFTER == 0 {
            kernel.age(&memory, &mut mix).context("before an age")?;
            places = connections(&memory);
        }
        // Nobody waits: most places that go to others so soon after an age do because of it.
        if step % AGED_AFTER == AGED_AFTER / 4 {
            let now = connections(&memory);
            let is_taken = |(at, opener)| now.get(at).is_some_and(|it| it != opener);
            taken += places.iter().filter(|it| is_taken(*it)).count();
        }
        let hook = if !beside.is_empty() && mix.below(4) == 0 {
            beside[mix.below(beside.len())]
        } else {
            hooks[mix.below(hooks.len())]
        };
        let family = mix.below(2);
        let Arrival { hook, packet } = mix.arrival(hook, FAMILIES[family]);
        let tally = tallies.entry((hook.0, family)).or_default();
        if kernel_refuses(&packet.frame) {
            tally.refused += 1;
            continue;
        }
        tally.run += 1;
        scratch.trace = Default::default();
        memory.now.set(programs::clock());
        let mut after = packet.clone();
        let verdict = decide(hook, &mut after, &memory, &mut scratch);
        match verdict {
            Verdict::Pass => tally.pass += 1,
            Verdict::Redirect(_) => tally.redirect += 1,
            Verdict::Drop(reason) | Verdict::Refuse(reason) => {
                *tally.drops.entry(reason as u8).or_default() += 1
            }
        }
        let (answer, frame, mark) = kernel.run(hook, &packet)?;
        ensure!(
            answer == action(hook, verdict) && frame == after.frame && mark == after.mark,
            "step {step}, {}: {packet:02x?}\nhost {verdict:?} {after:02x?}\nkernel {answer} \
             {frame:02x?} mark {mark:#x}",
            hook.label(),
        );
        mix.became(hook, verdict, scratch.trace.tuple, &after);
    }
    let elapsed = start.elapsed();
    kernel.same_drops(&tallies)?;
    kernel.same_counters(&memory)?;
    let (ways, plans) = kernel.same_conversations(&memory)?;
    kernel.same_affinity(&memory)?;
    kernel.same_fragments(&memory)?;
    for ((hook, family), tally) in &tallies {
        println!(
            "{} {:?}: {} packets, {} passed, {} redirected, {} the kernel would not run, dropped:",
            Hook(*hook).label(),
            FAMILIES[*family],
            tally.run,
            tally.pass,
            tally.redirect,
            tally.refused
        );
        for (reason, count) in &tally.drops {
            let label = DropReason::from_number(*reason).map_or("?", DropReason::label);
            println!("  {count:7} {label}");
        }
    }
    println!("{ways} ways and {plans} plans agree, {taken} places were taken; {elapsed:?}");
    ensure!(beside.is_empty() || taken > each / 500, "only {taken}");
    Ok(())
}

/// Who has which place of answers.
fn connections(memory: &Memory) -> BTreeMap<WayKey, WayKey> {
    let plans = memory.plans.borrow();
    let of_tcp = plans
        .iter()
        .filter(|(key, _)| key.protocol == Protocol::TCP);
    of_tcp.map(|(key, plan)| (*key, plan.key)).collect()
}

/// Changes what the agent would change: policy with its epoch, the life of a backend.
fn change(memory: &mut Memory, mix: &mut Mix) {
    match mix.below(3) {
        0 => {
            let mut keys: Vec<_> = memory.verdicts.keys().copied().collect();
            keys.sort_unstable();
            let key = keys[mix.below(keys.len())];
            if let Some(row) = memory.verdicts.get_mut(&key) {
                row.action.0 = mix.below(3) as u8;
            }
            memory.epoch += 1;
        }
        1 => memory.epoch += 1,
        _ => {
            let mut ids: Vec<_> = memory.live.keys().copied().collect();
            ids.sort_unstable();
            let id = ids[mix.below(ids.len())];
            // Backend 3 stays gone and those with affinity stay, so that nothing is chosen at random.
            if !matches!(id % 10, 3 | 6 | 7) {
                let generation = memory.live.entry(id).or_default();
                // Mostly another backend under the same number; now and then one that drains, or none.
                *generation = match mix.below(6) {
                    0 | 1 if !generation.is_gone() => generation.drained(),
                    2 if generation.is_draining() => generation.usable(),
                    3 if !generation.is_gone() => generation.gone(),
                    _ => generation.next(),
                };
            }
        }
    }
}

/// `BPF_PROG_TEST_RUN` takes no IP frame shorter than its header.
fn kernel_refuses(frame: &[u8]) -> bool {
    let shortest = match frame.get(12..14) {
        Some([0x08, 0x00]) => 34,
        Some([0x86, 0xdd]) => 54,
        _ => 14,
    };
    frame.len() < shortest
}

/// The programs with their maps.
struct Kernel {
    ebpf: Ebpf,
}

impl Kernel {
    fn new() -> Result<Self> {
        programs::make_devices()?;
        let ebpf = programs::load_hooks(world().config)?;
        let mut kernel = Self { ebpf };
        kernel.allow_refusals(u32::MAX)?;
        Ok(kernel)
    }

    fn run(&self, hook: Hook, packet: &Bytes) -> Result<(i32, Vec<u8>, u32)> {
        programs::run(&self.ebpf, hook, packet)
    }

    /// So many packets may be refused with an answer on each CPU, and never more: no time is after that of the last filling.
    fn allow_refusals(&mut self, tokens: u32) -> Result<()> {
        let bucket = EventLimit {
            filled: u64::MAX,
            tokens,
            limited: 0,
        };
        let bucket: [u64; 2] = transmute!(bucket);
        let mut map: PerCpuArray<_, [u64; 2]> =
            programs::map(&mut self.ebpf, "EVENT_LIMITS")?.try_into()?;
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        map.set(0, PerCpuValues::try_from(vec![bucket; cpus])?, 0)?;
        Ok(())
    }

    /// Lets time pass: sets back when the last packets of all conversations came, on both sides, whose rows are the same.
    fn age(&mut self, memory: &Memory, mix: &mut Mix) -> Result<()> {
        self.same_conversations(memory)?;
        let now = programs::clock();
        let mut set_back = |way: &Way| {
            if way.seen.load(Relaxed) != 0 {
                let ago = Duration::from_secs(AGES[mix.below(AGES.len())]);
                let seen = now.saturating_sub(ago.as_nanos() as u64);
                way.seen.store(seen, Relaxed);
            }
        };
        let (ways, plans) = (memory.ways.borrow(), memory.plans.borrow());
        let names = ["TCP_WAYS", "OTHER_WAYS"];
        programs::rewrite(&mut self.ebpf, names, &ways, |way| {
            set_back(way);
            let row: [u8; size_of::<Way>()] = transmute!(copy(way));
            row
        })?;
        let names = ["TCP_PLANS", "OTHER_PLANS"];
        programs::rewrite(&mut self.ebpf, names, &plans, |plan| {
            set_back(&plan.way);
            set_back(&plan.back);
            let row: [u8; size_of::<Plan>()] = transmute!(copy_plan(plan));
            row
        })?;
        Ok(())
    }

    fn forget_flows(&mut self) -> Result<()> {
        self.clear::<40, { size_of::<Way>() }>(&["TCP_WAYS", "OTHER_WAYS"])?;
        self.clear::<40, { size_of::<Plan>() }>(&["TCP_PLANS", "OTHER_PLANS"])?;
        self.clear::<48, 16>(&["FRAGMENTS"])
    }

    fn clear<const K: usize, const N: usize>(&mut self, names: &[&str]) -> Result<()> {
        for name in names {
            let mut map: HashMap<_, [u8; K], [u8; N]> =
                programs::map(&mut self.ebpf, name)?.try_into()?;
            let keys: Vec<_> = map.keys().collect::<Result<_, _>>()?;
            for key in keys {
                map.remove(&key)?;
            }
        }
        Ok(())
    }

    fn same_drops(&mut self, tallies: &BTreeMap<(u8, usize), Tally>) -> Result<()> {
        let map: PerCpuArray<_, [u64; 2]> = programs::map(&mut self.ebpf, "DROPS")?.try_into()?;
        for reason in DropReason::ALL {
            let kernel: u64 = map
                .get(&u32::from(*reason as u8), 0)?
                .iter()
                .map(|d| d[0])
                .sum();
            let host: u64 = tallies
                .values()
                .filter_map(|tally| tally.drops.get(&(*reason as u8)))
                .sum();
            ensure!(kernel == host, "{reason:?}: kernel {kernel}, host {host}");
        }
        Ok(())
    }

    fn same_counters(&mut self, memory: &Memory) -> Result<()> {
        let map: PerCpuArray<_, u64> = programs::map(&mut self.ebpf, "COUNTERS")?.try_into()?;
        for counter in Counter::ALL {
            // Events are the glue's, which the host does not have.
            if matches!(counter, Counter::EventsLost | Counter::EventsLimited) {
                continue;
            }
            let kernel: u64 = map.get(&(*counter as u32), 0)?.iter().sum();
            let host = memory.counted(*counter);
            println!("  {host:7} {}", counter.metric());
            ensure!(kernel == host, "{counter:?}: kernel {kernel}, host {host}");
        }
        Ok(())
    }

    /// Does every client have the same backend, and did some come back?
    fn same_affinity(&mut self, memory: &Memory) -> Result<()> {
        let map: HashMap<_, [u8; 24], [u8; 40]> =
            programs::map(&mut self.ebpf, "AFFINITY")?.try_into()?;
        let mut used = 0;
        for row in map.iter() {
            let (key, ours) = row?;
            let (key, ours): (AffinityKey, Affinity) = (transmute!(key), transmute!(ours));
            let host = memory.affinity.borrow().get(&key).copied();
            let host = host.with_context(|| format!("only in kernel: {key:?}"))?;
            let is_used = |row: Affinity| row.used != u64::MAX;
            ensure!(
                is_used(host) == is_used(ours)
                    && Affinity {
                        used: ours.used,
                        ..host
                    } == ours,
                "{key:?}\nhost   {host:?}\nkernel {ours:?}"
            );
            used += usize::from(is_used(ours));
        }
        ensure!(used > 0, "no client came back");
        println!("{used} clients kept their backend");
        Ok(())
    }

    /// Is what is known of fragments the same, all but the time? The kernel pushes out what is old.
    fn same_fragments(&mut self, memory: &Memory) -> Result<()> {
        let map: HashMap<_, [u8; 48], [u8; 16]> =
            programs::map(&mut self.ebpf, "FRAGMENTS")?.try_into()?;
        let mut seen = 0;
        for row in map.iter() {
            let (key, ours) = row?;
            let (key, ours): (FragmentKey, Fragment) = (transmute!(key), transmute!(ours));
            let host = memory.fragments.borrow().get(&key).copied();
            let host = host.map(|host| Fragment {
                seen: ours.seen,
                ..host
            });
            ensure!(
                host == Some(ours),
                "{key:?}\nhost   {host:?}\nkernel {ours:?}"
            );
            seen += 1;
        }
        ensure!(seen > 100, "only {seen} first fragments went on");
        println!("{seen} first fragments agree");
        Ok(())
    }

    /// Are ways and plans the same, all but their times? Returns how many there are of each.
    fn same_conversations(&mut self, memory: &Memory) -> Result<(usize, usize)> {
        let times = |mut way: Way| {
            way.created = 0;
            way.seen.store(0, Relaxed);
            way
        };
        let way = |way: &Way| -> [u8; size_of::<Way>()] { transmute!(times(copy(way))) };
        let plan = |plan: &Plan| -> [u8; size_of::<Plan>()] {
            let Plan { key, way, back } = copy_plan(plan);
            transmute!(Plan {
                key,
                way: times(way),
                back: times(back)
            })
        };
        let kernels = |row: [u8; size_of::<Way>()]| way(&transmute!(row));
        let (ways, plans) = (memory.ways.borrow(), memory.plans.borrow());
        let count = self.same_rows(["TCP_WAYS", "OTHER_WAYS"], &ways, |row| way(row), kernels)?;
        let kernels = |row: [u8; size_of::<Plan>()]| plan(&transmute!(row));
        let names = ["TCP_PLANS", "OTHER_PLANS"];
        let planned = self.same_rows(names, &plans, |row| plan(row), kernels)?;
        Ok((count, planned))
    }

    /// Are the rows of two tables together the same? Returns how many there are.
    fn same_rows<V, const N: usize>(
        &mut self,
        names: [&str; 2],
        host: &std::collections::HashMap<WayKey, std::rc::Rc<V>>,
        ours: impl Fn(&V) -> [u8; N],
        theirs: impl Fn([u8; N]) -> [u8; N],
    ) -> Result<usize> {
        let mut seen = 0;
        for (name, is_tcp) in names.into_iter().zip([true, false]) {
            let map: HashMap<&mut MapData, [u8; 40], [u8; N]> =
                programs::map(&mut self.ebpf, name)?.try_into()?;
            for row in map.iter() {
                let (key, row) = row?;
                let key: WayKey = transmute!(key);
                ensure!(
                    (key.protocol == Protocol::TCP) == is_tcp,
                    "{key:?} in {name}"
                );
                let host = host
                    .get(&key)
                    .with_context(|| format!("{name}: only in kernel: {key:?}"))?;
                let (host, row) = (ours(host), theirs(row));
                ensure!(
                    host == row,
                    "{name}: {key:?}\nhost   {host:02x?}\nkernel {row:02x?}"
                );
                seen += 1;
            }
        }
        ensure!(
            seen == host.len(),
            "{names:?}: kernel {seen}, host {}",
            host.len()
        );
        Ok(seen)
    }
}
