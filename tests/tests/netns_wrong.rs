//! Wrong input and wrong surroundings: each gives one clear message that says what to do, and the pods
//! that are there keep working. Crashes and full disks are in `netns_crash`.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use weir_tests::complaint::complaint;
use weir_tests::node::{Family, Node, NodeOptions, binary};
use weir_tests::process::Launch;
use weir_tests::shop::Shop;
use weir_tests::traffic::{Answer, ask_tcp};
use weir_tests::workloads::{Transport, Workload};

const PATIENCE: Duration = Duration::from_secs(20);

/// What is wrong, how the agent is then started, and words that its complaint must have.
type Surroundings = (
    &'static str,
    fn(&Node, Launch) -> Launch,
    &'static [&'static str],
);

const SURROUNDINGS: [Surroundings; 6] = [
    (
        "no bpffs",
        |_, agent| agent.instead("--bpffs", "/tmp/no-bpffs/weir"),
        &["/tmp/no-bpffs/weir is not on a bpffs", "mount -t bpf"],
    ),
    (
        "no cgroup2",
        |_, agent| agent.instead("--cgroup", "/tmp"),
        &["/tmp is not on a cgroup2", "--cgroup", "mount -t cgroup2"],
    ),
    (
        "no such cgroup",
        |_, agent| agent.instead("--cgroup", "/sys/fs/cgroup/none"),
        &["/sys/fs/cgroup/none is not a folder", "--cgroup"],
    ),
    (
        "no permission",
        |node, _| unprivileged(node),
        &["CAP_BPF", "CAP_NET_ADMIN", "65534", "run as root"],
    ),
    (
        "no manifests",
        |_, agent| agent.instead("--manifests", "/tmp/no-manifests"),
        &["--manifests", "/tmp/no-manifests", "not a folder"],
    ),
    (
        "two sources",
        |_, agent| agent.args(["--kubeconfig", "/tmp/any"]),
        &["--manifests and --kubeconfig exclude each other"],
    ),
];

#[test]
fn an_agent_that_cannot_serve_says_why_and_leaves_the_pods_alone() {
    let mut shop = Shop::open(NodeOptions::named("wrong"), 1, 1).unwrap();
    shop.node.kill_agent().unwrap();
    for (what, wrong, words) in SURROUNDINGS {
        let launch = wrong(&shop.node, shop.node.agent_launch());
        let (code, said) = complaint(&shop.node, launch).unwrap();
        assert_eq!(code, Some(1), "{what}: {said}");
        for word in words {
            assert!(said.contains(word), "{what}: no {word:?} in {said}");
        }
        shop.still_serves().unwrap();
    }
    // Nothing of all that stands in the way of a right one.
    shop.node.start_agent().unwrap();
    shop.node.wait_ready().unwrap();
    shop.still_serves().unwrap();
    println!("{} wrong starts", SURROUNDINGS.len());
}

/// The agent as nobody. It gets a copy of the program that it may read.
fn unprivileged(node: &Node) -> Launch {
    let dir = node.machine().dir();
    let copy = dir.join("weir-agent");
    if !copy.exists() {
        fs::copy(binary("weir-agent"), &copy).unwrap();
    }
    let nobody = [
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "--",
    ];
    let agent = node.agent_launch();
    agent.through("setpriv", nobody.map(str::to_owned), &copy)
}

#[test]
fn a_second_agent_ends_with_one_message_and_the_first_does_not_notice() {
    let mut shop = Shop::open(NodeOptions::named("two"), 1, 1).unwrap();
    let pid = shop.node.agent().unwrap().pid();
    let (code, said) = complaint(&shop.node, shop.node.agent_launch()).unwrap();
    assert_eq!(code, Some(1), "{said}");
    for word in ["another weir-agent serves this node", "stop it first"] {
        assert!(said.contains(word), "{said}");
    }
    assert_eq!(shop.node.agent().unwrap().pid(), pid);
    assert_eq!(shop.node.agent().unwrap().ended().unwrap(), None);
    shop.node.wait_ready().unwrap();
    shop.still_serves().unwrap();
    let verified = shop.node.weir("verify").status().unwrap();
    assert!(verified.success());
    // And it still adds pods: its socket is its own.
    let third = Workload::named("shop", "third");
    shop.backends.push(shop.node.run_pod(third).unwrap());
}

#[test]
fn a_busy_http_port_is_named_and_so_is_the_option() {
    let mut shop = Shop::open(NodeOptions::named("http"), 1, 1).unwrap();
    shop.node.kill_agent().unwrap();
    let netns = shop.node.machine().netns();
    let taken = netns.run(|| TcpListener::bind("127.0.0.1:9660").unwrap());
    let taken = taken.unwrap();
    let (code, said) = complaint(&shop.node, shop.node.agent_launch()).unwrap();
    assert_eq!(code, Some(1), "{said}");
    for word in ["127.0.0.1:9660", "free the port", "--http"] {
        assert!(said.contains(word), "{said}");
    }
    shop.still_serves().unwrap();
    drop(taken);
    shop.node.start_agent().unwrap();
    shop.node.wait_ready().unwrap();
}

#[test]
fn a_busy_dns_port_ends_weir_dns_with_3_and_names_who_has_it() {
    let mut shop = Shop::open(NodeOptions::named("dns-port"), 1, 1).unwrap();
    shop.node.dns().unwrap().kill().unwrap();
    let netns = shop.node.machine().netns();
    let taken = netns.run(|| UdpSocket::bind("169.254.53.53:53").unwrap());
    let taken = taken.unwrap();
    let log = shop.node.machine().dir().join("dns.log");
    let before = fs::read_to_string(&log).unwrap().len();
    shop.node.start_dns().unwrap();
    let status = shop.node.dns().unwrap().wait(PATIENCE).unwrap();
    assert_eq!(status.code(), Some(3), "{status}");
    let said = fs::read_to_string(&log).unwrap().split_off(before);
    assert_eq!(said.lines().count(), 1, "{said}");
    for word in ["ERROR", "UDP 169.254.53.53:53", "`ss -lnup", "--listen"] {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
    shop.still_serves().unwrap();
    drop(taken);
    shop.node.start_dns().unwrap();
    shop.wait_for_names().unwrap();
}

#[test]
fn a_table_of_another_layout_is_never_opened() {
    let mut shop = Shop::open(NodeOptions::named("layout"), 1, 1).unwrap();
    shop.node.kill_agent().unwrap();
    let weir = shop.node.machine().bpffs().path().join("weir");
    let pin = fs::read_dir(&weir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with("FRONTENDS_v")
        })
        .unwrap();
    let kept = pin.with_file_name("kept");
    fs::rename(&pin, &kept).unwrap();
    let made = Command::new("bpftool")
        .args(["map", "create"])
        .arg(&pin)
        .args([
            "type", "hash", "key", "4", "value", "4", "entries", "16", "name", "other",
        ])
        .status();
    assert!(made.unwrap().success());
    let (code, said) = complaint(&shop.node, shop.node.agent_launch()).unwrap();
    assert_eq!(code, Some(1), "{said}");
    let path = pin.display().to_string();
    for word in [
        "table FRONTENDS",
        &path,
        "key 4 B, value 4 B",
        "weir-agent cleanup",
    ] {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
    shop.still_serves().unwrap();
    fs::rename(&kept, &pin).unwrap();
    shop.node.start_agent().unwrap();
    shop.node.wait_ready().unwrap();
    shop.still_serves().unwrap();
}

/// A file that is wrong, the object by which `weir status` names it, and words of the reason.
type Wrong = (
    &'static str,
    &'static str,
    &'static str,
    &'static [&'static str],
);

const WRONG: [Wrong; 3] = [
    (
        "yaml.yaml",
        "kind: Service\napiVersion: v1\nmetadata: {name: torn\n",
        "yaml.yaml document 1",
        &["line"],
    ),
    (
        "address.yaml",
        "kind: Service\napiVersion: v1\nmetadata: {name: far, namespace: shop}\n\
         spec: {clusterIP: 10.96.0.999, ports: [{port: 80}]}\n",
        "Service shop/far",
        &["clusterIP", "10.96.0.999"],
    ),
    (
        "policy.yaml",
        "kind: NetworkPolicy\napiVersion: networking.k8s.io/v1\n\
         metadata: {name: typo, namespace: shop}\n\
         spec: {podSelector: {matchLabels: {app: typo}}, policyTypes: [Ingress], ingres: []}\n",
        "NetworkPolicy shop/typo",
        &["unknown field `ingres`"],
    ),
];

/// Waits for a gauge of the page of metrics.
fn wait_for_gauge(node: &Node, name: &str, value: usize) {
    let line = format!("{name} {value}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let page = node.metrics().unwrap();
        if page.lines().any(|l| l == line) {
            return;
        }
        assert!(Instant::now() < deadline, "no {line:?} in\n{page}");
    }
}

#[test]
fn an_object_that_is_wrong_is_quarantined_by_name_and_the_others_proceed() {
    let mut shop = Shop::open(NodeOptions::named("objects"), 1, 1).unwrap();
    let typo = Workload::named("shop", "typo").port(Transport::Tcp, 80);
    shop.backends.push(shop.node.run_pod(typo).unwrap());
    for (file, text, _, _) in WRONG {
        // In the same file, after what is wrong, an object that is right.
        let name = Path::new(file).file_stem().unwrap().to_string_lossy();
        let right = format!(
            "---\nkind: Service\napiVersion: v1\nmetadata: {{name: by-{name}, namespace: shop}}\n\
             spec: {{selector: {{app: web}}, ports: [{{port: 80}}]}}\n"
        );
        shop.node
            .write_manifest(file, &format!("{text}{right}"))
            .unwrap();
        let right = format!("shop/by-{name}");
        shop.node.wait_for_service(&right, 1, PATIENCE).unwrap();
    }
    wait_for_gauge(&shop.node, "weir_quarantined_objects", WRONG.len());
    let status = shop.node.ask("status").unwrap();
    let log = shop.node.agent().unwrap().log();
    for (_, _, object, words) in WRONG {
        let quarantined = status["quarantined"].as_array().unwrap();
        let is_it = |q: &&serde_json::Value| q["object"].as_str().unwrap().contains(object);
        let found: Vec<_> = quarantined.iter().filter(is_it).collect();
        assert_eq!(found.len(), 1, "{object}: {quarantined:?}");
        let reason = found[0]["reason"].as_str().unwrap();
        for word in words {
            assert!(reason.contains(word), "{object}: no {word:?} in {reason}");
        }
        let says_it = |line: &&str| line.contains(object) && line.contains("Quarantined");
        let lines = log.lines().filter(says_it).count();
        assert_eq!(lines, 1, "{object} is logged {lines} times:\n{log}");
    }
    shop.still_serves().unwrap();

    // A policy that is not understood lets nothing in, and stays so until it is.
    let typo = shop.backends[1].address(Family::V4).unwrap();
    let reaches = |shop: &Shop| {
        let mut curl = shop.clients[0].command("curl");
        curl.args(["-s", "--max-time", "1", &format!("http://{typo}/")]);
        curl.status().unwrap().success()
    };
    assert!(!reaches(&shop), "a policy that is not understood is open");

    // Wrong objects do not survive their correction.
    for (file, _, _, _) in WRONG {
        fs::remove_file(shop.node.manifests().join(file)).unwrap();
    }
    wait_for_gauge(&shop.node, "weir_quarantined_objects", 0);
    assert!(reaches(&shop));
    shop.still_serves().unwrap();
}

/// The agent is the one with the feature `ends-a-task` (`agent/Cargo.toml`).
#[test]
fn an_agent_one_of_whose_tasks_ends_says_which_and_ends_and_pods_go_on() {
    let mut node = Node::start(NodeOptions {
        agent: binary("weir-agent-other-layout"),
        ..NodeOptions::named("task")
    })
    .unwrap();
    let web = Workload::named("shop", "web").port(Transport::Tcp, 80);
    let server = node.run_pod(web).unwrap();
    let client = node.run_pod(Workload::named("shop", "client")).unwrap();
    let target = SocketAddr::new(server.address(Family::V4).unwrap(), 80);
    let asked = || ask_tcp(client.netns(), target, Duration::from_secs(1));
    assert_eq!(asked(), Answer::By("web".into()));

    let file = node.machine().dir().join("run/end-a-task");
    fs::write(&file, "").unwrap();
    let ended = node.agent().unwrap().wait(Duration::from_secs(5)).unwrap();
    let log = node.agent().unwrap().log();
    assert_eq!(ended.code(), Some(1), "{log}");
    let says = "the task \"of a test\" has ended: nothing does its work any more";
    assert!(log.contains(says), "{log}");
    assert_eq!(asked(), Answer::By("web".into()), "the kernel goes on");

    fs::remove_file(&file).unwrap();
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    node.run_pod(Workload::named("shop", "next")).unwrap();
    assert_eq!(asked(), Answer::By("web".into()));
}
