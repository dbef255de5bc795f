//! The programs on other kernels than this machine's.

use std::path::Path;
use std::time::Duration;

use weir_agent::kernel::object::OBJECT;
use weir_tests::node::binary;
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
fn a_kernel_without_tcx_is_told_so_by_doctor_and_at_start() {
    let test = "a_kernel_without_tcx_is_told_so_by_doctor_and_at_start";
    let Some(kernel) = kernel(test, Series::V6_1) else {
        return;
    };
    let contents = Contents::default().program(&binary("weir-agent"));
    let script = "mkdir -p /manifests /cg && mount -t cgroup2 none /cg
weir-agent doctor --bpffs /sys/fs/bpf/weir --cgroup /cg && exit 1
weir-agent run --node-name old --manifests /manifests --pod-cidr 10.0.0.0/24 \\
  --bpffs /sys/fs/bpf/weir --cgroup /cg --run-dir /run/weir --state-dir /state && exit 1
ls /sys/fs/bpf";
    let shown = kernel
        .run(&contents, script, PATIENCE)
        .unwrap_or_else(|e| panic!("{e:#}"));
    let told = shown.matches("older than 6.6, the first with tcx links");
    assert_eq!(told.count(), 2, "doctor and start say it: {shown}");
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
    let Some(kernel) = kernel(test, series) else {
        return;
    };
    let contents = Contents::default()
        .program(Path::new(env!("CARGO_BIN_EXE_weir-load-programs")))
        .file("/weir.o", OBJECT);
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

fn kernel(test: &str, series: Series) -> Option<Kernel> {
    let kernel = Contents::check_tools().and_then(|()| Kernel::ready(series));
    kernel.map_err(|e| not_run(test, &e)).ok()
}
