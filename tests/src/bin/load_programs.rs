//! Loads every program of a BPF object through the verifier of the running kernel, attaches none.
//! One line each, `<program> <verified instructions>`; fails if any is refused.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use aya::programs::{Program, ProgramError, ProgramInfo};
use aya::{EbpfLoader, VerifierLogLevel};

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(object), Some(bpffs)) = (args.next(), args.next()) else {
        bail!("usage: weir-load-programs OBJECT BPFFS");
    };
    let bytes = std::fs::read(&object).with_context(|| format!("read {}", object.display()))?;
    let mut loader = EbpfLoader::new();
    loader
        .default_map_pin_directory(&bpffs)
        .verifier_log_level(VerifierLogLevel::STATS);
    let mut ebpf = loader.load(&bytes).context("create the maps")?;

    let mut refused = Vec::new();
    for (name, program) in ebpf.programs_mut() {
        match load(program) {
            Ok(info) => match info.verified_instruction_count() {
                Some(count) => println!("{name} {count}"),
                None => println!("{name} ?"),
            },
            Err(e) => {
                println!("{name} refused: {e:#}");
                refused.push(name.to_owned());
            }
        }
    }
    if !refused.is_empty() {
        bail!("refused: {}", refused.join(", "));
    }
    Ok(())
}

fn load(program: &mut Program) -> Result<ProgramInfo> {
    let kind = program.prog_type();
    let loaded: Result<(), ProgramError> = match program {
        Program::SchedClassifier(p) => p.load(),
        Program::CgroupSockAddr(p) => p.load(),
        Program::CgroupSock(p) => p.load(),
        Program::CgroupSkb(p) => p.load(),
        Program::SockOps(p) => p.load(),
        Program::Xdp(p) => p.load(),
        _ => bail!("{kind:?} is a kind of program that this does not know"),
    };
    loaded?;
    Ok(program.info()?)
}
