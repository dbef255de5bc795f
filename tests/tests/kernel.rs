//! Ring 3.
#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]
use aya::EbpfLoader;
#[test]
fn every_program_passes_the_verifier() {
    let mut ebpf = EbpfLoader::new()
        .load(weir_agent::kernel::object::OBJECT)
        .unwrap();
    let names: Vec<String> = ebpf.programs().map(|(n, _)| n.to_owned()).collect();
    for name in names {
        let program = ebpf.program_mut(&name).unwrap();
        let r = match program {
            aya::programs::Program::SchedClassifier(p) => p
                .load()
                .map(|()| p.info().unwrap().verified_instruction_count()),
            aya::programs::Program::CgroupSockAddr(p) => p
                .load()
                .map(|()| p.info().unwrap().verified_instruction_count()),
            _ => panic!(),
        };
        match r {
            Ok(n) => println!("{name} {n:?}"),
            Err(e) => {
                let s = format!("{e:?}");
                let s = s.replace("\\n", "\n");
                println!("{name} FAILED {}", &s[s.len().saturating_sub(4000)..]);
            }
        }
    }
}
