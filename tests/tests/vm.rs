//! The programs on other kernels than this machine's.

use std::path::{Path, PathBuf};
use std::time::Duration;

use weir_tests::not_run::not_run;
use weir_tests::vm::{Contents, Kernel, Series};

/// Emulated, a boot takes some five seconds of an idle core; this machine may not be idle.
const PATIENCE: Duration = Duration::from_secs(180);

#[test]
fn every_program_loads_on_linux_6_1() {
    load_every_program("every_program_loads_on_linux_6_1", Series::V6_1);
}

#[test]
fn every_program_loads_on_linux_6_12() {
    load_every_program("every_program_loads_on_linux_6_12", Series::V6_12);
}

#[test]
fn a_script_that_fails_fails_the_machine() {
    let test = "a_script_that_fails_fails_the_machine";
    let Some(kernel) = kernel(test, Series::V6_1) else {
        return;
    };
    let contents = Contents::default().file("/etc/greeting", "hello from the test");
    let ended = kernel.run(&contents, "cat /etc/greeting\ncat /nowhere\n", PATIENCE);
    let said = format!("{:#}", ended.unwrap_err());
    assert!(
        said.contains("hello from the test") && said.contains("/nowhere"),
        "{said}"
    );
}

fn load_every_program(test: &str, series: Series) {
    let Some(object) = object() else {
        return not_run(
            test,
            &"no BPF object: set WEIR_BPF_OBJECT to the path of one",
        );
    };
    let Some(kernel) = kernel(test, series) else {
        return;
    };
    let contents = Contents::default()
        .program(Path::new(env!("CARGO_BIN_EXE_weir-load-programs")))
        .file("/weir.o", object);
    let script = "uname -r
ls /sys/kernel/btf/vmlinux
weir-load-programs /weir.o /sys/fs/bpf";
    let shown = kernel
        .run(&contents, script, PATIENCE)
        .unwrap_or_else(|e| panic!("{e:#}"));
    let expected = format!("{}.", series.version());
    assert!(
        shown.lines().any(|line| line.starts_with(&expected)),
        "{shown}"
    );
    println!("{shown}");
}

fn object() -> Option<Vec<u8>> {
    let path = PathBuf::from(std::env::var_os("WEIR_BPF_OBJECT")?);
    Some(std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

fn kernel(test: &str, series: Series) -> Option<Kernel> {
    let kernel = Contents::check_tools().and_then(|()| Kernel::ready(series));
    kernel.map_err(|e| not_run(test, &e)).ok()
}
