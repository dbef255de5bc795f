//! Machines, namespaces and processes of the tests themselves: that they are separate, and that
//! nothing of them stays.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use weir_tests::machine::Machine;
use weir_tests::netns::{End, Netns, link};
use weir_tests::run;

/// Environment of the child run that is killed; see `a_killed_run_is_swept`.
const VICTIM: &str = "WEIR_TEST_VICTIM";

#[test]
fn linked_namespaces_reach_each_other() {
    let (a, b) = (Netns::new("a").unwrap(), Netns::new("b").unwrap());
    link(
        End {
            netns: &a,
            device: "eth0",
            addresses: &["192.0.2.1/24", "fd00:2::1/64"],
        },
        End {
            netns: &b,
            device: "eth0",
            addresses: &["192.0.2.2/24", "fd00:2::2/64"],
        },
    )
    .unwrap();
    for address in ["192.0.2.2:80", "[fd00:2::2]:80"] {
        let listener = b.run(|| TcpListener::bind(address).unwrap()).unwrap();
        let said = std::thread::scope(|scope| {
            scope.spawn(|| listener.accept().unwrap().0.write_all(b"hello").unwrap());
            a.run(|| {
                let mut said = String::new();
                TcpStream::connect(address)
                    .unwrap()
                    .read_to_string(&mut said)
                    .unwrap();
                said
            })
            .unwrap()
        });
        assert_eq!(said, "hello", "{address}");
    }
}

#[test]
fn a_sysctl_of_a_namespace_is_its_own() {
    let (a, b) = (Netns::new("a").unwrap(), Netns::new("b").unwrap());
    let forwarding = |n: &Netns| {
        n.run(|| std::fs::read_to_string("/proc/sys/net/ipv4/conf/lo/forwarding").unwrap())
            .unwrap()
    };
    a.set_sysctl("net.ipv4.conf.lo.forwarding", "1").unwrap();
    b.set_sysctl("net.ipv4.conf.lo.forwarding", "0").unwrap();
    assert_eq!((forwarding(&a).trim(), forwarding(&b).trim()), ("1", "0"));
}

#[test]
fn a_panic_inside_reaches_the_caller_and_leaves_nothing() {
    let machine = Machine::new("panics").unwrap();
    let places = places_of(&machine);
    let process = machine
        .launch("sleeper", "sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    let pid = process.pid();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let (machine, _process) = (machine, process);
        machine.netns().run(|| panic!("on purpose")).unwrap();
    }));
    assert!(outcome.is_err());
    assert_gone(&places, pid);
}

#[test]
fn a_process_is_in_its_namespace_and_cgroup_and_writes_its_log() {
    let machine = Machine::new("proc").unwrap();
    let script = "ip -o link | wc -l; cat /proc/self/cgroup; sleep 1000";
    let mut process = machine
        .launch("sh", "sh")
        .args(["-c", script])
        .spawn()
        .unwrap();
    process
        .wait_for_log("0::/", Duration::from_secs(5))
        .unwrap();
    let log = process.log();
    assert!(log.starts_with("1\n"), "only the loopback is there: {log}");
    assert!(
        log.contains(&format!("0::/{}\n", machine.netns().name())),
        "{log}"
    );
    let status = process.stop(Duration::from_secs(5)).unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(15)
    );
}

#[test]
fn a_process_that_ends_early_shows_its_log() {
    let machine = Machine::new("early").unwrap();
    let mut process = machine
        .launch("failing", "sh")
        .args(["-c", "echo no such flag; exit 3"])
        .spawn()
        .unwrap();
    let error = process
        .wait_until("ready", Duration::from_secs(5), || false)
        .unwrap_err();
    let said = format!("{error:#}");
    assert!(
        said.contains("exit status: 3") && said.contains("no such flag"),
        "{said}"
    );
}

#[test]
fn a_process_outlives_the_thread_that_started_it() {
    let machine = Machine::new("thread").unwrap();
    let script = "trap 'echo alive' USR1; echo up; while :; do sleep 0.01; done";
    let (mut process, thread) = std::thread::scope(|scope| {
        let start = || {
            let mut process = machine
                .launch("sh", "sh")
                .args(["-c", script])
                .spawn()
                .unwrap();
            process.wait_for_log("up", Duration::from_secs(5)).unwrap();
            (
                process,
                format!("/proc/self/task/{}", nix::unistd::gettid()),
            )
        };
        scope.spawn(start).join()
    })
    .unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while Path::new(&thread).exists() {
        assert!(Instant::now() < deadline, "a joined thread is still there");
        std::thread::yield_now();
    }
    process.signal(nix::sys::signal::Signal::SIGUSR1).unwrap();
    process
        .wait_for_log("alive", Duration::from_secs(5))
        .unwrap();
}

#[test]
fn a_killed_run_is_swept() {
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "victim", "--ignored", "--nocapture"])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut stdout = victim.stdout.take().unwrap();
    let mut byte = [0];
    while !said.ends_with("ready\n") && stdout.read(&mut byte).unwrap() == 1 {
        said.push(char::from(byte[0]));
    }
    victim.kill().unwrap();
    victim.wait().unwrap();
    let fields: Vec<&str> = said
        .lines()
        .find(|l| l.ends_with("ready"))
        .unwrap()
        .split(' ')
        .collect();
    let [.., pid, bpf, cgroup, netns, dir, _] = fields[..] else {
        panic!("{said}")
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    while is_running(pid.parse().unwrap()) {
        assert!(Instant::now() < deadline, "the process outlived its test");
        std::thread::sleep(Duration::from_millis(2));
    }
    // Another run, side by side, may sweep it first.
    assert_eq!(
        run::sweep()
            .into_iter()
            .map(|e| format!("{e:#}"))
            .collect::<Vec<_>>(),
        [""; 0]
    );
    assert_gone(
        &[bpf, cgroup, netns, dir].map(str::to_owned),
        pid.parse().unwrap(),
    );
}

#[test]
#[ignore = "run and killed by a_killed_run_is_swept"]
fn victim() {
    if std::env::var_os(VICTIM).is_none() {
        return;
    }
    let machine = Machine::new("victim").unwrap();
    let process = machine
        .launch("sleep", "sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    println!(
        "\n{} {} ready",
        process.pid(),
        places_of(&machine).join(" ")
    );
    std::thread::sleep(Duration::from_secs(60));
}

/// The bpffs, cgroup, namespace and directory of a machine, in this order.
fn places_of(machine: &Machine) -> [String; 4] {
    let (bpf, cgroup) = (machine.bpffs().path(), machine.cgroup().path());
    [bpf, cgroup, &machine.netns().path(), machine.dir()].map(|p| p.display().to_string())
}

fn assert_gone(places: &[String], pid: u32) {
    for place in places {
        assert!(!Path::new(place).exists(), "{place} is still there");
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("procfs");
    assert!(
        !places.iter().any(|p| mounts.contains(&format!("{p} "))),
        "still mounted"
    );
    assert!(!is_running(pid), "process {pid} still runs");
}

/// A zombie does not run.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}
