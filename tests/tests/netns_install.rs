//! The node as `deploy/` runs it: an agent with its container's capabilities and no more, a DNS server
//! that never was root, the files that a container runtime finds, and all of it gone after a cleanup.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use weir_agent::kernel::pin_path;
use weir_common::limits;
use weir_common::table::TABLES;
use weir_dns::privilege::USER;
use weir_tests::node::{Family, Node, NodeOptions, binary};
use weir_tests::traffic::is_echoed;
use weir_tests::workloads::Workload;

const PATIENCE: Duration = Duration::from_secs(20);
/// As in the chart, which `install.rs` compares with a list of its own.
const CAPABILITIES: &str = "-all,+bpf,+net_admin,+perfmon";
/// The user of weir-dns, whose group the agent is in.
const DNS: u32 = USER.uid;

/// Of weir-dns.
const METRICS: &str = "127.0.0.1:9661";

/// `setpriv` with what a container gets: no more capabilities, no new ones, the group of weir-dns.
const CONFINED: &str = "setpriv --inh-caps=-all --no-new-privs";

#[test]
fn the_agents_capabilities_suffice_from_install_to_cleanup() {
    let mut node = Node::prepare(NodeOptions::named("confined")).unwrap();
    let dir = node.machine().dir().to_owned();
    let (conf, bin) = (dir.join("cni/net.d"), dir.join("cni/bin"));
    node.options.agent = confined(&dir);
    node.options.agent_args = vec!["--cni-conf-dir".into(), conf.display().to_string()];

    let install = |node: &Node| {
        let mut install = node.machine().netns().command(&node.options.agent);
        install.arg("install").arg("--cni-bin-dir").arg(&bin);
        output(install.arg("--plugin").arg(binary("weir-cni")))
    };
    let plugin = bin.join("weir-cni");
    assert_eq!(install(&node), format!("installed {}\n", plugin.display()));
    assert_eq!(fs::metadata(&plugin).unwrap().mode() & 0o7777, 0o755);
    assert!(fs::read(&plugin).unwrap() == fs::read(binary("weir-cni")).unwrap());
    assert!(!conf.exists(), "nobody starts pods yet");

    let mut pod = None;
    for start in ["first", "second"] {
        node.start_agent().unwrap();
        node.wait_ready().unwrap();
        let log = node.agent().unwrap().log();
        assert!(!log.contains(" WARN "), "{start}: {log}");
        let conflist = conf.join("05-weir.conflist");
        wait_until("the configuration is written", || conflist.exists());
        let list: Value = serde_json::from_slice(&fs::read(&conflist).unwrap()).unwrap();
        assert_eq!(list["plugins"][0]["type"], "weir-cni");
        let socket = list["plugins"][0]["agentSocket"].as_str().unwrap();
        assert!(Path::new(socket).exists(), "{socket}");
        let zone = fs::metadata(dir.join("zone/zone.sock")).unwrap();
        assert_eq!((zone.uid(), zone.gid()), (0, DNS));

        if pod.is_none() {
            pod = Some(node.run_pod(Workload::named("default", "echo")).unwrap());
        }
        let address = pod.as_ref().unwrap().address(Family::V4).unwrap();
        let netns = node.machine().netns();
        assert!(is_echoed(netns, address, PATIENCE).unwrap(), "{start}");
        node.kill_agent().unwrap();
        assert!(conflist.exists(), "it stays");
    }

    let mut cleanup = node.machine().netns().command(&node.options.agent);
    cleanup
        .arg("cleanup")
        .arg("--bpffs")
        .arg(node.machine().bpffs().path().join("weir"))
        .arg("--cgroup")
        .arg(node.machine().cgroup().path())
        .arg("--run-dir")
        .arg(dir.join("run"))
        .arg("--state-dir")
        .arg(dir.join("state"))
        .arg("--zone-socket")
        .arg(dir.join("zone/zone.sock"))
        .arg("--cni-conf-dir")
        .arg(&conf)
        .arg("--cni-bin-dir")
        .arg(&bin)
        .arg("--leases");
    let said = output(&mut cleanup);
    for path in ["run", "state", "zone"].map(|name| dir.join(name)) {
        assert!(!path.exists(), "{}: {said}", path.display());
    }
    for folder in [&conf, &bin] {
        assert_eq!(fs::read_dir(folder).unwrap().count(), 0, "{said}");
    }
    let left = fs::read_dir(node.machine().bpffs().path()).unwrap();
    let left: Vec<_> = left.map(|it| it.unwrap().file_name()).collect();
    assert!(left.iter().all(|it| it != "weir"), "{left:?}: {said}");
    let links = node.machine().netns().command("ip").arg("link").output();
    let links = String::from_utf8(links.unwrap().stdout).unwrap();
    assert!(!links.contains("weir"), "{links}");
    assert_eq!(output(&mut cleanup), "", "nothing is left to remove");
}

/// What sockets were given is remembered over restarts of the agent, and is not believed once other programs had them: as if an
/// older agent had been there, which notes nothing. Seen failing when the agent asked for the maps of the programs, which
/// takes a capability that it does not have.
#[test]
fn unused_ports_are_known_as_long_as_the_same_agent_has_the_sockets() {
    let mut node = Node::prepare(NodeOptions::named("ports")).unwrap();
    node.options.agent = confined(node.machine().dir());
    let table = TABLES.iter().find(|it| it.name == "UNUSED_PORTS").unwrap();
    let pin = pin_path(&node.machine().bpffs().path().join("weir"), table);
    let rows = || -> Array<MapData, u64> {
        Map::Array(MapData::from_pin(&pin).unwrap())
            .try_into()
            .unwrap()
    };
    let ports = || {
        let rows = rows();
        (0..limits::UNUSED_PORTS).map(move |row| rows.get(&row, 0).unwrap())
    };
    let mut start = || {
        node.start_agent().unwrap();
        node.wait_ready().unwrap();
        node.kill_agent().unwrap();
    };
    start();
    assert!(ports().all(|row| row == u64::MAX), "new");
    rows().set(1, 7, 0).unwrap();
    start();
    assert_eq!(rows().get(&1, 0).unwrap(), 7, "kept");
    assert_eq!(ports().filter(|row| *row == u64::MAX).count(), 1_023);
    // The number of another program.
    rows().set(limits::UNUSED_PORTS + 3, 1, 0).unwrap();
    start();
    assert!(ports().all(|row| row == 0), "each may have been used");
    start();
    assert!(ports().all(|row| row == 0), "nobody knows better");
}

/// With the capability that `cargo xtask image` gives the file, on a copy; under the parent that its
/// container has, which is not root either.
#[test]
fn the_dns_server_has_its_port_without_ever_being_root() {
    let mut node = Node::prepare(NodeOptions::named("dnsuser")).unwrap();
    let dir = node.machine().dir().to_owned();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    node.options.agent = confined(&dir);
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    let [program, parent] = ["weir-dns", "weir-agent"].map(|name| {
        let copy = dir.join(name);
        fs::copy(binary(name), &copy).unwrap();
        copy
    });
    let start = |node: &Node, name: &str| {
        let ids = format!("--reuid={DNS} --regid={DNS} --clear-groups");
        let words = format!("{ids} --inh-caps=-all --bounding-set=-all,+net_bind_service");
        let empty = dir.join("resolv.conf");
        fs::write(&empty, "").unwrap();
        node.machine()
            .launch(name, "setpriv")
            .args(words.split_whitespace())
            .arg(&parent)
            .args(["keep", "--"])
            .arg(&program)
            .args(["--listen=169.254.53.53:53", &format!("--user={USER}")])
            .arg("--hand-over")
            .arg(dir.join("zone/handover"))
            .arg(format!("--metrics={METRICS}"))
            .arg("--feed")
            .arg(dir.join("zone/zone.sock"))
            .arg("--resolv-conf")
            .arg(empty)
            .spawn()
            .unwrap()
    };
    // Seen failing: without the file's capability the port is refused.
    let mut refused = start(&node, "dns-refused");
    assert_eq!(refused.wait(PATIENCE).unwrap().code(), Some(3));
    let mut grant = Command::new("setcap");
    output(grant.arg("cap_net_bind_service=ep").arg(&program));
    let mut dns = start(&node, "dns");
    dns.wait_for_log("starting", PATIENCE).unwrap();
    for restarts in 0..=1 {
        wait_until("the zone is known", || {
            let mut dig = node.machine().netns().command("dig");
            dig.args(["+short", "+time=1", "+tries=1", "@169.254.53.53"]);
            dig.arg("kube-dns.kube-system.svc.cluster.local");
            String::from_utf8_lossy(&dig.output().unwrap().stdout).trim() == "10.96.0.10"
        });
        let mut curl = node.machine().netns().command("curl");
        let page = output(curl.args(["-sf", &format!("http://{METRICS}/metrics")]));
        let expected = format!("weir_dns_restarts_total {restarts}\n");
        assert!(page.contains(&expected), "{page}");
        let child = dns.children().unwrap()[0];
        let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap();
        for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"] {
            assert!(status.contains(line), "{status}");
        }
        // The first is killed, the second loses its parent. Neither stays.
        match restarts {
            0 => kill(Pid::from_raw(child), Signal::SIGKILL).unwrap(),
            _ => drop(dns.kill().unwrap()),
        }
        let proc = format!("/proc/{child}");
        wait_until("the server is gone", || !Path::new(&proc).exists());
    }
}

/// As a pod on the host's network that runs as the user of weir-dns: it does not see the node's folders.
#[test]
fn who_only_runs_as_the_dns_servers_user_gets_neither_its_sockets_nor_its_port() {
    let mut node = Node::start(NodeOptions::named("dnsthief")).unwrap();
    let dir = node.machine().dir().to_owned();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    let hand_over = fs::metadata(dir.join("zone/handover")).unwrap();
    let kept = (hand_over.uid(), hand_over.gid(), hand_over.mode() & 0o7777);
    assert_eq!(kept, (0, DNS, 0o770));
    let program = dir.join("thief");
    fs::copy(binary("weir-dns"), &program).unwrap();
    let dns = node.dns().unwrap().pid();
    let unix = || fs::read_to_string(format!("/proc/{dns}/net/unix")).unwrap();
    // By the name that it had before there was a listener.
    wait_until("sockets are offered in the folder", || {
        unix().contains("zone/handover/.169.254.53.53:53.")
    });
    let all = unix();
    assert!(!all.contains("@weir-dns"), "offered to everybody: {all}");
    let mut thief = node
        .machine()
        .launch("thief", "setpriv")
        .args([&format!("--reuid={DNS}"), &format!("--regid={DNS}")])
        .args(["--clear-groups", "--inh-caps=-all", "--bounding-set=-all"])
        .arg(&program)
        .args(["--listen=169.254.53.53:53", "--upstream=127.0.0.1:9"])
        .args(["--feed=/nonexistent", "--hand-over=/nonexistent"])
        .spawn()
        .unwrap();
    assert_eq!(thief.wait(PATIENCE).unwrap().code(), Some(3));
    let said = thief.log();
    assert!(!said.contains("shares its sockets"), "{said}");
    assert!(said.contains("CAP_NET_BIND_SERVICE"), "{said}");
}

/// A program that runs the agent with the container's capabilities.
fn confined(dir: &Path) -> PathBuf {
    let path = dir.join("confined-agent");
    let script = format!(
        "#!/bin/sh\nexec {CONFINED} --bounding-set={CAPABILITIES} --groups={DNS} {} \"$@\"\n",
        binary("weir-agent").display()
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
