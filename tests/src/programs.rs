//! The programs in the running kernel with maps of their own, filled from the tables of a test.

use std::process::Command;
use std::rc::Rc;

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::maps::{Array, HashMap, Map, PerCpuArray, lpm_trie};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use weir_agent::kernel::object::OBJECT;
use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::node::NodeConfig;
use weir_common::way::WayKey;
use weir_common::{DropReason, Protocol};
use zerocopy::{FromBytes, Immutable, IntoBytes, transmute};

use crate::bytes::Bytes;
use crate::tables::Memory;
use crate::world::{PODS, UPLINK};

/// Programs by the number of their hook, less one.
const HOOKS: [&str; 4] = [
    "weir_from_pod",
    "weir_to_pod",
    "weir_to_net",
    "weir_from_net",
];

/// `struct __sk_buff`, and where its fields are that matter here.
const CONTEXT: usize = 192;
const MARK: usize = 8;
const INGRESS_IFINDEX: usize = 36;
const IFINDEX: usize = 40;

/// Loads the object, its programs not yet.
///
/// # Errors
/// Not root; the kernel refuses a map.
pub fn load() -> Result<Ebpf> {
    load_with(NodeConfig::default())
}

/// Loads the object and tells its programs something.
///
/// # Errors
/// As [`load`].
pub fn load_with(config: NodeConfig) -> Result<Ebpf> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "this test loads programs: run it as root"
    );
    let mut loader = EbpfLoader::new();
    loader.override_global("NODE", config.as_bytes(), true);
    loader.load(OBJECT).context("load the object")
}

/// As [`load_with`], with the programs of the packet path.
///
/// # Errors
/// As [`load_with`]; the kernel refuses a program.
pub fn load_hooks(config: NodeConfig) -> Result<Ebpf> {
    let mut ebpf = load_with(config)?;
    for name in HOOKS {
        let program: &mut SchedClassifier = ebpf.program_mut(name).context(name)?.try_into()?;
        program.load()?;
    }
    Ok(ebpf)
}

/// Makes the devices that packets of [`crate::world`] arrive by, in the namespace of the caller's thread.
///
/// # Errors
/// Not root; a device is there already.
pub fn make_devices() -> Result<()> {
    let of_pods = PODS.map(|(_, ifindex)| ifindex);
    for ifindex in of_pods.into_iter().chain([UPLINK, UPLINK + 1]) {
        let (name, index) = (format!("pod{ifindex}"), ifindex.to_string());
        let status = Command::new("ip")
            .args(["link", "add", &name, "index", &index])
            .args(["type", "veth", "peer", "name", &format!("in{ifindex}")])
            .status()
            .context("run ip")?;
        ensure!(status.success(), "make device {name}");
    }
    Ok(())
}

/// Runs the program of a hook on a packet: what it answers, and the frame and the mark after it.
///
/// # Errors
/// The kernel takes no such frame, or knows no such device.
pub fn run(ebpf: &Ebpf, hook: Hook, packet: &Bytes) -> Result<(i32, Vec<u8>, u32)> {
    let name = HOOKS[usize::from(hook.0) - 1];
    let program: &SchedClassifier = ebpf.program(name).context(name)?.try_into()?;
    let mut context = [0; CONTEXT];
    context[MARK..MARK + 4].copy_from_slice(&packet.mark.to_ne_bytes());
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&packet.ifindex.to_ne_bytes());
    let received = packet.received_by.to_ne_bytes();
    context[INGRESS_IFINDEX..INGRESS_IFINDEX + 4].copy_from_slice(&received);
    let mut context_after = [0; CONTEXT];
    // An answer may be longer than what it refuses.
    let mut frame = vec![0; packet.frame.len() + 64];
    let result = program
        .test_run(TestRunOptions {
            data_in: Some(&packet.frame),
            data_out: Some(&mut frame),
            ctx_in: Some(&context),
            ctx_out: Some(&mut context_after),
            ..TestRunOptions::default()
        })
        .with_context(|| format!("run {name} on {packet:02x?}"))?;
    frame.truncate(result.data_size_out as usize);
    let mut mark = [0; 4];
    mark.copy_from_slice(&context_after[MARK..MARK + 4]);
    Ok((result.return_value as i32, frame, u32::from_ne_bytes(mark)))
}

/// How often a counter was raised, on all CPUs together.
///
/// # Errors
/// The kernel refuses to read.
pub fn counted(ebpf: &mut Ebpf, counter: Counter) -> Result<u64> {
    let counters: PerCpuArray<_, u64> = map(ebpf, "COUNTERS")?.try_into()?;
    Ok(counters.get(&(counter as u32), 0)?.iter().sum())
}

/// How many packets were dropped for each reason, those for which none was left out.
///
/// # Errors
/// The kernel refuses to read.
pub fn dropped(ebpf: &mut Ebpf) -> Result<Vec<(DropReason, u64)>> {
    let drops: PerCpuArray<_, [u64; 2]> = map(ebpf, "DROPS")?.try_into()?;
    let mut all = Vec::new();
    for reason in DropReason::ALL {
        let rows = drops.get(&u32::from(*reason as u8), 0)?;
        let packets = rows.iter().map(|[packets, _]| packets).sum();
        if packets > 0 {
            all.push((*reason, packets));
        }
    }
    Ok(all)
}

/// The rows of a table of ways or plans, of `N` bytes each.
///
/// # Errors
/// The kernel refuses to read.
pub fn rows<V: FromBytes, const N: usize>(ebpf: &mut Ebpf, name: &str) -> Result<Vec<(WayKey, V)>> {
    let table: HashMap<_, [u8; 40], [u8; N]> = map(ebpf, name)?.try_into()?;
    let mut rows = Vec::new();
    for row in table.iter() {
        let (key, row) = row?;
        let row = V::read_from_bytes(&row).map_err(|_| anyhow!("{name} has other rows"))?;
        rows.push((transmute!(key), row));
    }
    Ok(rows)
}

/// Writes rows anew that both sides have, in the order of their keys: to the first table those of TCP, of `N` bytes each.
///
/// # Errors
/// The kernel does not have a row.
pub fn rewrite<V, const N: usize>(
    ebpf: &mut Ebpf,
    names: [&str; 2],
    host: &std::collections::HashMap<WayKey, Rc<V>>,
    mut row: impl FnMut(&V) -> [u8; N],
) -> Result<()> {
    /// `BPF_EXIST`.
    const EXIST: u64 = 2;
    let mut rows: Vec<_> = host.iter().collect();
    rows.sort_unstable_by_key(|(key, _)| **key);
    for (name, is_tcp) in names.into_iter().zip([true, false]) {
        let mut table: HashMap<_, [u8; 40], [u8; N]> = map(ebpf, name)?.try_into()?;
        let is_meant = |key: &WayKey| (key.protocol == Protocol::TCP) == is_tcp;
        for (key, value) in rows.iter().filter(|(key, _)| is_meant(key)) {
            let key: [u8; 40] = transmute!(**key);
            table.insert(key, row(value), EXIST)?;
        }
    }
    Ok(())
}

/// Runs something in a network namespace that ends with it.
///
/// # Errors
/// Its own; not root.
pub fn in_own_namespace<T: Send + 'static>(
    run: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .context("unshare; is this root?")?;
        run()
    });
    thread.join().map_err(|_| anyhow!("the test panicked"))?
}

/// A map of the object.
///
/// # Errors
/// There is none of that name.
pub fn map<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    ebpf.map_mut(name).with_context(|| format!("map {name}"))
}

/// Writes every table that the agent fills.
///
/// # Errors
/// The kernel refuses a row.
pub fn write_all(ebpf: &mut Ebpf, memory: &Memory) -> Result<()> {
    let mut table: HashMap<_, [u8; 24], [u8; 24]> = map(ebpf, "FRONTENDS")?.try_into()?;
    for (key, row) in &memory.frontends {
        table.insert(bytes(key), bytes(row), 0)?;
    }
    let mut table: Array<_, [u8; 24]> = map(ebpf, "BACKENDS")?.try_into()?;
    for (index, row) in &memory.backends {
        table.set(*index, bytes(row), 0)?;
    }
    let mut table: HashMap<_, [u8; 16], u32> = map(ebpf, "NODES")?.try_into()?;
    for (addr, row) in &memory.nodes {
        table.insert(addr.0, row.flags, 0)?;
    }
    let mut table: HashMap<_, [u8; 24], [u8; 40]> = map(ebpf, "AFFINITY")?.try_into()?;
    for (key, row) in &*memory.affinity.borrow() {
        table.insert(bytes(key), bytes(row), 0)?;
    }
    let mut table: HashMap<_, u32, [u8; 56]> = map(ebpf, "DEVICES")?.try_into()?;
    for (index, row) in &memory.devices {
        table.insert(*index, bytes(&**row), 0)?;
    }
    let mut table: HashMap<_, [u8; 16], [u8; 8]> = map(ebpf, "PODS")?.try_into()?;
    for (addr, row) in &memory.pods {
        table.insert(addr.0, bytes(row), 0)?;
    }
    let mut table: lpm_trie::LpmTrie<_, [u8; 16], u32> = map(ebpf, "CIDRS")?.try_into()?;
    for (key, class) in &memory.cidrs {
        table.insert(&lpm_trie::Key::new(key.prefix_len, key.addr.0), class.0, 0)?;
    }
    let mut table: HashMap<_, [u8; 16], u32> = map(ebpf, "CLASSES")?.try_into()?;
    for (addr, class) in &memory.classes {
        table.insert(addr.0, class.0, 0)?;
    }
    let mut table: lpm_trie::LpmTrie<_, [u8; 8], [u8; 12]> = map(ebpf, "PORTS")?.try_into()?;
    for (key, row) in &memory.ports {
        let mut data = [0; 8];
        data.copy_from_slice(&key.as_bytes()[4..]);
        table.insert(&lpm_trie::Key::new(key.prefix_len, data), bytes(row), 0)?;
    }
    let mut table: HashMap<_, u32, [u8; 32]> = map(ebpf, "UPLINKS")?.try_into()?;
    for (index, row) in &memory.uplinks {
        table.insert(*index, bytes(&**row), 0)?;
    }
    let mut table: lpm_trie::LpmTrie<_, [u8; 16], u32> = map(ebpf, "CLUSTER")?.try_into()?;
    for key in &memory.cluster {
        table.insert(&lpm_trie::Key::new(key.prefix_len, key.addr.0), 1, 0)?;
    }
    write_changing(ebpf, memory)
}

/// Writes the tables that change while packets flow: verdicts, generations, the epoch.
///
/// # Errors
/// The kernel refuses a row.
pub fn write_changing(ebpf: &mut Ebpf, memory: &Memory) -> Result<()> {
    let mut table: HashMap<_, [u8; 8], [u8; 16]> = map(ebpf, "VERDICTS")?.try_into()?;
    for (key, row) in &memory.verdicts {
        table.insert(bytes(key), bytes(row), 0)?;
    }
    let mut table: Array<_, u32> = map(ebpf, "LIVE")?.try_into()?;
    for (id, generation) in &memory.live {
        table.set(*id, generation.0, 0)?;
    }
    let mut table: Array<_, u32> = map(ebpf, "EPOCH")?.try_into()?;
    table.set(0, memory.epoch, 0)?;
    Ok(())
}

/// A key or a row as a map takes it.
fn bytes<const N: usize>(row: &(impl IntoBytes + Immutable)) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(row.as_bytes());
    bytes
}

/// The clock that programs see, which moves with every tick; in nanoseconds.
pub fn clock() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_COARSE);
    time.map_or(0, |time| std::time::Duration::from(time).as_nanos() as u64)
}
