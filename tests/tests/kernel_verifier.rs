//! Ring 3: what the verifier of the running kernel has to walk, and how long that takes. Needs root.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aya::programs::Program;
use weir_tests::programs;

/// Instructions that it may visit in each program. What grows past its ceiling makes every start of a node slower, so say
/// in the commit what for, and raise it.
const CEILINGS: [(&str, u32); 12] = [
    ("weir_connect4", 7_000),
    ("weir_connect6", 8_000),
    ("weir_from_net", 49_000),
    ("weir_from_pod", 53_000),
    ("weir_getpeer4", 80),
    ("weir_getpeer6", 100),
    ("weir_recvmsg4", 80),
    ("weir_recvmsg6", 100),
    ("weir_sendmsg4", 7_200),
    ("weir_sendmsg6", 7_800),
    ("weir_to_net", 44_000),
    ("weir_to_pod", 46_000),
];

/// Far more than it takes, also beside other tests; `cargo xtask bench` measures it.
const PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn every_program_passes_the_verifier_below_its_ceiling() -> Result<()> {
    let mut ebpf = programs::load()?;
    let mut visited = BTreeMap::new();
    let mut took = Duration::ZERO;
    for (name, program) in ebpf.programs_mut() {
        let start = Instant::now();
        match program {
            Program::SchedClassifier(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            _ => bail!("{name} is of an unexpected kind"),
        }
        .with_context(|| format!("load {name}"))?;
        took += start.elapsed();
        ensure!(name.len() <= 15, "the kernel cuts the name {name}");
        let count = program.info()?.verified_instruction_count();
        visited.insert(name.to_owned(), count.context("the kernel does not say")?);
    }
    println!("instructions that the verifier visited, in {took:?} for all:");
    for (name, visited) in &visited {
        println!("  {name:15} {visited}");
    }
    let ceilings: BTreeMap<_, _> = CEILINGS.map(|(name, most)| (name.to_owned(), most)).into();
    ensure!(visited.keys().eq(ceilings.keys()), "{visited:?}");
    for (name, visited) in &visited {
        ensure!(
            *visited <= ceilings[name],
            "{name}: {visited}, at most {}",
            ceilings[name]
        );
    }
    ensure!(took < PATIENCE, "{took:?}");
    Ok(())
}
