//! Pods come and go while agent and plugin are killed, the disk is full, the store is damaged: nothing
//! is leaked, and no address is used twice.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use fastrand::Rng;
use nix::mount::{MsFlags, mount};
use serde_json::Value;
use weir_agent::pods::{Leases, Places, Ranges};
use weir_tests::complaint::complaint;
use weir_tests::node::{Family, Node, NodeOptions, Pod, binary};
use weir_tests::shop::Shop;
use weir_tests::workloads::Workload;

/// Pods that come and go at once.
const PARALLEL: usize = 4;
const PATIENCE: Duration = Duration::from_secs(20);

/// How a run of the plugin ended.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
enum Ended {
    Done,
    Refused,
    Killed,
}

/// Runs the plugin, and kills it after this long if it still runs.
fn plugin(node: &Node, verb: &str, pod: &Pod, kill: Option<Duration>) -> (Ended, Value) {
    let mut command = node.machine().netns().command(binary("weir-cni"));
    command
        .env("CNI_COMMAND", verb)
        .env("CNI_PATH", "/opt/cni/bin");
    command.envs(pod.cni_env());
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    // A pipe holds the configuration, whether or not the plugin lives to read it.
    let config = node.cni_config("1.1.0").to_string();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(config.as_bytes())
        .unwrap();
    if let Some(after) = kill {
        sleep(after);
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            child.wait().unwrap();
            return (Ended::Killed, Value::Null);
        }
    }
    let output = child.wait_with_output().unwrap();
    let said = serde_json::from_slice(&output.stdout).unwrap_or_default();
    match output.status.success() {
        true => (Ended::Done, said),
        false => (Ended::Refused, said),
    }
}

/// Takes a pod's object away, as its kubelet does after DEL.
fn forget(node: &Node, pod: &Pod) {
    let Workload {
        namespace, name, ..
    } = &pod.workload;
    let file = format!("pods/{namespace}.{name}.yaml");
    fs::remove_file(node.manifests().join(file)).unwrap();
}

/// The addresses in the result of an ADD.
fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.map(|ip| {
        let address = ip["address"].as_str().unwrap();
        address.split('/').next().unwrap().parse().unwrap()
    })
    .collect()
}

/// What the kernel and the disk still hold of pods; empty when nothing is left. Stops the agent.
fn leftovers(node: &mut Node) -> Vec<String> {
    let mut left = Vec::new();
    let status = node.ask("status").unwrap();
    for table in status["tables"].as_array().unwrap() {
        let is_of_pods = ["DEVICES", "PODS"].contains(&table["table"].as_str().unwrap());
        if is_of_pods && table["rows"] != 0 {
            left.push(format!("rows: {table}"));
        }
    }
    let verified = node.weir("verify").output().unwrap();
    if !verified.status.success() {
        left.push(String::from_utf8_lossy(&verified.stdout).into_owned());
    }
    let devices = node.machine().netns().ip("-o link").unwrap();
    left.extend(
        devices
            .lines()
            .filter(|l| !l.contains(" lo: "))
            .map(str::to_owned),
    );
    let pins = fs::read_dir(node.machine().bpffs().path().join("weir/links")).unwrap();
    let pins = pins.map(|pin| pin.unwrap().file_name().into_string().unwrap());
    left.extend(pins.filter(|pin| !pin.starts_with("weir_")));
    let state = node.machine().dir().join("state");
    // A note goes a little after its device.
    let notes = || weir_cni::released::list(&state.join("released")).unwrap();
    let begin = Instant::now();
    while !notes().is_empty() && begin.elapsed() < PATIENCE {
        sleep(Duration::from_millis(5));
    }
    left.extend(notes().iter().map(|note| format!("release {note}")));
    node.kill_agent().unwrap();
    let places = Places {
        store: state.join("leases.redb"),
        released: state.join("released"),
    };
    let cidrs: Vec<_> = node
        .options
        .pod_cidrs
        .iter()
        .map(|c| c.parse().unwrap())
        .collect();
    let leases = Leases::open(places, Ranges::Given(&cidrs), "a test".into()).unwrap();
    left.extend(leases.all().keys().map(|lease| format!("lease {lease}")));
    left
}

/// Kills the agent at random moments of its life, and starts the next a moment later.
fn kill_now_and_then(node: &Node, mut random: Rng, is_over: &AtomicBool) -> usize {
    let mut kills = 0;
    while !is_over.load(Ordering::Relaxed) {
        let mut agent = node.agent_launch().spawn().unwrap();
        let end = Instant::now() + Duration::from_millis(random.u64(0..5000));
        while Instant::now() < end && !is_over.load(Ordering::Relaxed) {
            sleep(Duration::from_millis(10));
        }
        assert_eq!(agent.ended().unwrap(), None, "{}", agent.log());
        agent.kill().unwrap();
        kills += 1;
        sleep(Duration::from_millis(random.u64(0..200)));
    }
    kills
}

/// One pod after another: ADD, a short life, DEL until it succeeds, as a runtime would.
struct Runtime<'a> {
    node: &'a Node,
    /// Who has which address now.
    live: &'a Mutex<HashMap<IpAddr, String>>,
    started: &'a AtomicUsize,
    random: Rng,
    ended: BTreeMap<String, usize>,
}

impl Runtime<'_> {
    fn run(mut self, lives: usize) -> BTreeMap<String, usize> {
        loop {
            let number = self.started.fetch_add(1, Ordering::Relaxed);
            if number >= lives {
                return self.ended;
            }
            self.live_once(&format!("p{number}"));
        }
    }

    fn kill(&mut self) -> Option<Duration> {
        let is_killed = self.random.u8(0..4) == 0;
        is_killed.then(|| Duration::from_micros(self.random.u64(0..30_000)))
    }

    fn count(&mut self, verb: &str, ended: &Ended) {
        *self.ended.entry(format!("{verb} {ended:?}")).or_default() += 1;
    }

    fn live_once(&mut self, name: &str) {
        let pod = self
            .node
            .declare_pod(Workload::named("crash", name))
            .unwrap();
        let kill = self.kill();
        let (ended, result) = plugin(self.node, "ADD", &pod, kill);
        self.count("ADD", &ended);
        let has = addresses(&result);
        if ended == Ended::Done {
            assert_eq!(has.len(), 2, "{result}");
            let mut live = self.live.lock().unwrap();
            for address in &has {
                let other = live.insert(*address, name.to_owned());
                assert_eq!(other, None, "{address} is given to {name} as well");
            }
        }
        sleep(Duration::from_millis(self.random.u64(0..50)));
        // From here on the address may be somebody else's: DEL frees it before it returns.
        self.live.lock().unwrap().retain(|_, pod| pod != name);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let kill = self.kill();
            let (ended, said) = plugin(self.node, "DEL", &pod, kill);
            self.count("DEL", &ended);
            match ended {
                Ended::Done => break,
                _ => assert!(Instant::now() < deadline, "DEL of {name}: {said}"),
            }
        }
        forget(self.node, &pod);
        if ended == Ended::Refused {
            // A runtime backs off, too; otherwise most attempts would meet no agent.
            sleep(Duration::from_millis(100));
        }
    }
}

#[test]
fn pods_that_come_and_go_while_agent_and_plugin_are_killed_leak_and_double_nothing() {
    let lives = if std::env::var_os("WEIR_LONG").is_some() {
        4000
    } else {
        1000
    };
    let given = std::env::var("WEIR_SEED").ok();
    let seed = given.map_or_else(|| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("WEIR_SEED={seed} repeats the choices of this run");
    let mut node = Node::prepare(NodeOptions::named("crash")).unwrap();
    let (live, started) = (Mutex::default(), AtomicUsize::new(0));
    let is_over = AtomicBool::new(false);
    let (ended, kills) = std::thread::scope(|scope| {
        let killer = scope.spawn(|| kill_now_and_then(&node, Rng::with_seed(seed), &is_over));
        let runtimes: Vec<_> = (1..=PARALLEL as u64)
            .map(|number| Runtime {
                node: &node,
                live: &live,
                started: &started,
                random: Rng::with_seed(seed.wrapping_add(number)),
                ended: BTreeMap::new(),
            })
            .map(|runtime| scope.spawn(|| runtime.run(lives)))
            .collect();
        let ended: Vec<_> = runtimes.into_iter().map(|r| r.join()).collect();
        is_over.store(true, Ordering::Relaxed);
        (ended, killer.join().unwrap())
    });
    let mut all: BTreeMap<String, usize> = BTreeMap::new();
    for (what, count) in ended.into_iter().flat_map(|e| e.unwrap()) {
        *all.entry(what).or_default() += count;
    }
    println!("{lives} pods, {kills} agents killed: {all:?}");
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    assert_eq!(leftovers(&mut node), [""; 0]);
    // Not vacuous: pods did get their network in between, and kills did hit.
    for what in ["ADD Done", "ADD Killed", "DEL Killed"] {
        let count = all.get(what).copied().unwrap_or_default();
        assert!(count >= lives / 20, "only {count} of {lives}: {what}");
    }
}

/// A situation in which a pod that runs is deleted.
type Deletion = (&'static str, fn(&mut Node, &Pod));

const DELETIONS: [Deletion; 6] = [
    ("as usual", |_, _| {}),
    ("a second time", |node, pod| assert_deleted(node, pod)),
    ("without its namespace", |_, pod| {
        let name = pod.netns().name();
        let gone = std::process::Command::new("ip")
            .args(["netns", "delete", name])
            .status();
        assert!(gone.unwrap().success());
    }),
    ("without its device", |node, pod| {
        let device = device(node, pod);
        node.machine()
            .netns()
            .ip(&format!("link delete {device}"))
            .unwrap();
    }),
    ("without an agent", |node, _| node.kill_agent().unwrap()),
    ("while an agent starts", |node, _| {
        node.kill_agent().unwrap();
        node.start_agent().unwrap();
    }),
];

fn assert_deleted(node: &Node, pod: &Pod) {
    let (ended, said) = plugin(node, "DEL", pod, None);
    assert_eq!(ended, Ended::Done, "{said}");
}

/// The node's device of a pod.
fn device(node: &Node, pod: &Pod) -> String {
    let pods = node.ask("endpoints").unwrap();
    let id = pod.workload.id();
    let found = pods
        .as_array()
        .unwrap()
        .iter()
        .find(|p| p["pod"] == id.as_str());
    found.unwrap()["device"].as_str().unwrap().to_owned()
}

#[test]
fn del_succeeds_whatever_is_missing_and_frees_everything() {
    let mut shop = Shop::open(NodeOptions::named("del"), 1, 1).unwrap();
    for (situation, prepare) in DELETIONS {
        let mut pod = shop.node.declare_pod(Workload::named("del", "it")).unwrap();
        shop.node.add_pod(&mut pod).unwrap();
        let device = device(&shop.node, &pod);
        prepare(&mut shop.node, &pod);
        assert_deleted(&shop.node, &pod);
        // With nobody to delete it later, the device is gone when DEL returns; else soon.
        let deadline = Instant::now() + PATIENCE;
        while shop
            .node
            .machine()
            .netns()
            .ip("-o link")
            .unwrap()
            .contains(&device)
        {
            assert!(
                Instant::now() < deadline,
                "{situation}: {device} is still there"
            );
        }
        if shop.node.agent().is_err() {
            shop.node.start_agent().unwrap();
        }
        shop.node.wait_ready().unwrap();
        forget(&shop.node, &pod);
        let away = |rows: &[Value]| rows.iter().all(|row| row["pod"] != "del/it");
        shop.node
            .wait_for(situation, PATIENCE, "endpoints", away)
            .unwrap();
        shop.still_serves().unwrap();
    }
    // Of a container that nobody knows.
    let stranger = shop
        .node
        .declare_pod(Workload::named("del", "stranger"))
        .unwrap();
    assert_deleted(&shop.node, &stranger);
    forget(&shop.node, &stranger);
    shop.still_serves().unwrap();
    for pod in shop.clients.drain(..).chain(shop.backends.drain(..)) {
        shop.node.delete_pod(pod).unwrap();
    }
    assert_eq!(leftovers(&mut shop.node), [""; 0]);
}

/// Fills the file system of a folder to the last byte.
fn fill(folder: &Path) {
    let mut filler = fs::File::create(folder.join("filler")).unwrap();
    for size in [1 << 16, 1 << 12, 1] {
        let block = vec![b'x'; size];
        while filler.write_all(&block).is_ok() {}
    }
}

#[test]
fn a_full_disk_refuses_pods_with_a_clear_message_and_lets_them_go() {
    let mut node = Node::prepare(NodeOptions::named("full")).unwrap();
    let state = node.machine().dir().join("state");
    // It goes with the machine's folder.
    let tmpfs = mount(
        Some("weirt"),
        &state,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=16m"),
    );
    tmpfs.unwrap();
    node.start_agent().unwrap();
    node.start_dns().unwrap();
    node.wait_ready().unwrap();
    let mut shop = Shop::on(node, 2, 1).unwrap();
    let before: Vec<_> = shop
        .backends
        .iter()
        .flat_map(|p| p.addresses.clone())
        .collect();

    fill(&state);
    let late = shop
        .node
        .declare_pod(Workload::named("full", "late"))
        .unwrap();
    shop.node
        .wait_for_pod("full/late", Duration::from_secs(10))
        .unwrap();
    let refused = (0..20)
        // Pages that the store has at hand may hold a lease or two more.
        .map(|_| {
            let (ended, said) = plugin(&shop.node, "ADD", &late, None);
            if ended == Ended::Done {
                assert_deleted(&shop.node, &late);
            }
            (ended, said)
        })
        .find(|(ended, _)| *ended == Ended::Refused);
    let (_, said) = refused.expect("a full disk took twenty leases");
    let said = said.to_string();
    for word in ["lease store", "leases.redb", "No space left on device"] {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
    let pods = shop.node.ask("endpoints").unwrap();
    let row = pods
        .as_array()
        .unwrap()
        .iter()
        .find(|p| p["pod"] == "full/late");
    assert_eq!(
        row.unwrap()["addresses"],
        Value::Array(Vec::new()),
        "{pods}"
    );
    shop.still_serves().unwrap();

    // What is refused can be deleted, and so can what runs.
    assert_deleted(&shop.node, &late);
    let gone = shop.backends.pop().unwrap();
    shop.node.delete_pod(gone).unwrap();
    shop.still_serves().unwrap();

    // An agent that starts on the full disk does not lease what is in use.
    shop.node.kill_agent().unwrap();
    shop.node.start_agent().unwrap();
    shop.node.wait_ready().unwrap();
    for is_full in [true, false] {
        if !is_full {
            fs::remove_file(state.join("filler")).unwrap();
        }
        let (ended, said) = plugin(&shop.node, "ADD", &late, None);
        if !is_full {
            assert_eq!(ended, Ended::Done, "{said}");
        }
        let given = addresses(&said);
        let mut in_use = shop.clients[0].addresses.iter().chain(&before[..2]);
        assert!(!in_use.any(|it| given.contains(it)), "{said}");
        shop.still_serves().unwrap();
        assert_deleted(&shop.node, &late);
    }
}

#[test]
fn a_damaged_lease_store_refuses_pods_and_leaves_those_that_run() {
    let mut shop = Shop::open(NodeOptions::named("torn"), 1, 1).unwrap();
    let store = shop.node.machine().dir().join("state/leases.redb");
    shop.node.kill_agent().unwrap();
    let whole = fs::read(&store).unwrap();
    let mut flipped = whole.clone();
    flipped
        .iter_mut()
        .skip(4096)
        .step_by(97)
        .for_each(|byte| *byte ^= 0x5a);
    for (damage, bytes) in [
        ("cut in half", &whole[..whole.len() / 2]),
        ("empty", &whole[..0]),
        ("bytes flipped", &flipped),
    ] {
        fs::write(&store, bytes).unwrap();
        let (code, said) = complaint(&shop.node, shop.node.agent_launch()).unwrap();
        assert_eq!(code, Some(1), "{damage}: {said}");
        let path = store.display().to_string();
        for word in ["lease store", &path, "is damaged", "Drain this node"] {
            assert!(said.contains(word), "{damage}: no {word:?} in {said}");
        }
        let late = shop
            .node
            .declare_pod(Workload::named("torn", "late"))
            .unwrap();
        let (ended, said) = plugin(&shop.node, "ADD", &late, None);
        assert_eq!(ended, Ended::Refused, "{damage}: {said}");
        assert_deleted(&shop.node, &late);
        forget(&shop.node, &late);
        shop.still_serves().unwrap();
    }

    // What the message says to do: drain, move the file away, start.
    for pod in shop.clients.drain(..).chain(shop.backends.drain(..)) {
        shop.node.delete_pod(pod).unwrap();
    }
    fs::rename(&store, store.with_extension("damaged")).unwrap();
    shop.node.start_agent().unwrap();
    shop.node.wait_ready().unwrap();
    let pod = shop.node.run_pod(Workload::named("torn", "next")).unwrap();
    assert!(pod.address(Family::V4).is_ok());
    shop.node.delete_pod(pod).unwrap();
    assert_eq!(leftovers(&mut shop.node), [""; 0]);
}
