//! The programs in the running kernel with maps of their own, filled from the tables of a test.

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::maps::{Array, HashMap, Map, lpm_trie};
use aya::{Ebpf, EbpfLoader};
use weir_agent::kernel::object::OBJECT;
use weir_common::node::NodeConfig;
use zerocopy::{Immutable, IntoBytes};

use crate::tables::Memory;

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
    let mut table: HashMap<_, [u8; 16], u32> = map(ebpf, "CLASSES")?.try_into()?;
    for (addr, class) in &memory.classes {
        table.insert(addr.0, class.0, 0)?;
    }
    let mut table: lpm_trie::LpmTrie<_, [u8; 8], [u8; 8]> = map(ebpf, "PORTS")?.try_into()?;
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
    let mut table: HashMap<_, [u8; 8], [u8; 12]> = map(ebpf, "VERDICTS")?.try_into()?;
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
