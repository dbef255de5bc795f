//! A rolling update of both DaemonSets to an image whose programs and tables are laid out differently, and back,
//! under load from pods of both nodes to a Service with backends on both: what is lost. And downloads that were there
//! before and go on until after it: from outside through the node port of each node to pods of both, from pods to a
//! Service, and from outside to pods, whose addresses are masqueraded.
//!
//! Seen failing with a second image of the features `weir-agent/other-layout,weir-agent/broken-take-over-first`: 58 of
//! 60,000 connections and 11 of 12,000 lookups.
//!
//! It needs two images, in `WEIR_IMAGES` as `PATH=NAME,PATH=NAME`; docs/testing.md has the commands. With `WEIR_EARLIER`
//! the second is of a version that takes no sockets over (0.1.0 and before): on the way back to such a one its weir-dns
//! gets questions before it has the zone, so agents are updated first.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use weir_tests::cluster::clients::Client;
use weir_tests::cluster::options::Options;
use weir_tests::cluster::programs::Programs;
use weir_tests::cluster::rollout::{DOWNLOADS, Depot};
use weir_tests::cluster::{Cluster, End};
use weir_tests::kubectl::Kubectl;
use weir_tests::load::Tally;

/// Connections per second, of each node.
const RATE: u32 = 250;
/// Lookups per second, of each node.
const LOOKUPS: u32 = 50;
/// How long there is load, in seconds, and how long each download takes. The updates must be over before.
const SECONDS: u32 = 120;
/// Downloads of pods of each node from a Service, and as many from outside of the cluster.
const HELD: u64 = 25;

/// Outside of the cluster, where no pod's address is known: an answer comes to what was masqueraded alone.
const WORLD: &str = "10.210.0.1:8000";

fn images() -> Vec<(PathBuf, String)> {
    let said = std::env::var("WEIR_IMAGES").expect("WEIR_IMAGES=PATH=NAME,PATH=NAME");
    let pairs = said.split(',').map(|pair| {
        let (path, name) = pair.split_once('=').expect("PATH=NAME");
        (path.into(), name.to_owned())
    });
    pairs.collect()
}

const SERVER: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: upgrade}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
";

fn backend(name: &str, node: &str, image: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: upgrade, labels: {{app: web}}}}\n\
         spec:\n  nodeName: {node}\n  containers:\n  - name: web\n    image: {image}\n    \
         args: [netexec, --http-port=8080]\n    readinessProbe: {{httpGet: {{path: /healthz, port: 8080}}, periodSeconds: 1}}\n"
    )
}

/// Ends when the test does.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Both DaemonSets with this image, on every node. Returns how long it took.
fn roll(kubectl: &Kubectl, image: &str) -> Duration {
    let begin = Instant::now();
    let sets = [
        ("daemonset/weir", ["install", "agent"].as_slice()),
        ("daemonset/weir-dns", &["dns"]),
    ];
    let is_one_by_one = std::env::var_os("WEIR_EARLIER").is_some();
    for (set, containers) in sets {
        let images: Vec<String> = containers.iter().map(|c| format!("{c}={image}")).collect();
        let mut words = vec!["-n", "kube-system", "set", "image", set];
        words.extend(images.iter().map(String::as_str));
        kubectl.run(&words).unwrap();
        if is_one_by_one {
            wait_until_rolled(kubectl, set);
        }
    }
    for (set, _) in sets {
        wait_until_rolled(kubectl, set);
    }
    begin.elapsed()
}

fn wait_until_rolled(kubectl: &Kubectl, set: &str) {
    let status = ["-n", "kube-system", "rollout", "status", set];
    let status = [&status[..], &["--timeout=90s"]].concat();
    kubectl.run(&status).unwrap();
}

#[test]
#[ignore = "takes two images, which take long to build: by hand"]
fn a_rolling_update_to_another_layout_and_back_loses_nothing() {
    let images = images();
    let [(first, first_name), (second, second_name)] = images.as_slice() else {
        panic!(
            "WEIR_IMAGES names {} images, and two are needed",
            images.len()
        );
    };
    let programs = Programs::ready().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let options = Options {
        image: root.join(first),
        ..Options::of_test("roll")
    };
    let agnhost = programs.agnhost().unwrap();
    let cluster = Cluster::up(options, programs, End::TakenDown).unwrap();
    let kubectl = cluster.kubectl();
    cluster.import(&root.join(second)).unwrap();
    // The manifest names the image of this version; what runs is what was asked for.
    roll(&kubectl, first_name);

    kubectl.run(&["create", "namespace", "upgrade"]).unwrap();
    kubectl.apply(SERVER).unwrap();
    for (i, node) in ["n1", "n1", "n2", "n2"].into_iter().enumerate() {
        let pod = backend(&format!("web-{i}"), node, &agnhost);
        let deadline = Instant::now() + Duration::from_secs(20);
        // A namespace that is new has no account for pods yet.
        while let Err(why) = kubectl.apply(&pod) {
            assert!(Instant::now() < deadline, "{why:#}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    let ready = [
        "-n",
        "upgrade",
        "wait",
        "--for=condition=Ready",
        "pod",
        "-l",
        "app=web",
    ];
    kubectl
        .run(&[&ready[..], &["--timeout=60s"]].concat())
        .unwrap();
    let of = [
        "-n",
        "upgrade",
        "get",
        "service",
        "web",
        "-o",
        "jsonpath={.spec.clusterIP}",
    ];
    let service = kubectl.run(&of).unwrap();
    // Backends that are ready are not yet known everywhere.
    let deadline = Instant::now() + Duration::from_secs(20);
    for node in ["n1", "n2"] {
        while cluster.backends(node, "upgrade/web") < 4 {
            assert!(
                Instant::now() < deadline,
                "{node} does not know its backends"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    // Images that are not optimised take the processors away from the clients for longer than a second.
    let patience = std::env::var_os("WEIR_SLOW").map_or(1000, |_| 3000);
    let for_all = format!("--seconds {SECONDS} --patience {patience}");
    let http = format!("--kind http --target {service}:80 --rate {RATE} {for_all}");
    let dns = format!(
        "--kind dns --target 10.96.0.10:53 --name web.upgrade.svc.cluster.local. --rate {LOOKUPS} {for_all}"
    );
    let client = |kind: &str, node: &str, words: &str| {
        Client::start(&cluster, "upgrade", &format!("{kind}-{node}"), node, words).unwrap()
    };
    let depot = Depot::deploy(&cluster).unwrap();
    let pods = depot.pods().unwrap();
    let mut world = cluster.outside("weir-download").unwrap();
    world.args(["serve", "--name=world", "--port=8000", "--unprobed"]);
    let _world = Server(world.spawn().unwrap());
    let download = |name: &str, node: &str, target: &str| {
        let words = format!("--target {target} --seconds {SECONDS}");
        let name = format!("{name}-{node}");
        Client::download(&cluster, "upgrade", &name, node, HELD, &words).unwrap()
    };
    let target = depot.service().unwrap().to_string();
    // The first download ends SECONDS from here at the soonest.
    let begin = Instant::now();
    let served = ["n1", "n2"].map(|node| download("served", node, &target));
    let masqueraded = ["n1", "n2"].map(|node| download("masqueraded", node, WORLD));
    let held = depot.download(DOWNLOADS, SECONDS).unwrap();
    let clients = ["n1", "n2"].map(|node| client("http", node, &http));
    let askers = ["n1", "n2"].map(|node| client("dns", node, &dns));
    let there = roll(&kubectl, second_name);
    let back = roll(&kubectl, first_name);
    let updated = begin.elapsed();
    let within = Duration::from_secs((SECONDS + 30).into());
    let sum = |clients: [Client; 2]| {
        let mut all = Tally::default();
        for client in clients {
            all += client.finish(within).unwrap();
        }
        all
    };
    let (connections, lookups) = (sum(clients), sum(askers));
    println!("there {there:?}, back {back:?}: {connections:?}, {lookups:?}");
    let held = held.finish().unwrap();
    let ways = depot.ways(&pods, &held).unwrap();
    println!("held through node ports: {held:?}\nasked and answered: {ways:?}");
    let of_pods = [("to a Service", served), ("to outside", masqueraded)].map(|(what, clients)| {
        let held = clients.map(|client| client.held(within).unwrap());
        println!("held from pods {what}: {held:?}");
        held
    });
    assert!(
        updated < Duration::from_secs(SECONDS.into()),
        "the updates took {updated:?}, longer than there was load"
    );
    assert_eq!(connections.attempted, u64::from(2 * RATE * SECONDS));
    assert_eq!(lookups.attempted, u64::from(2 * LOOKUPS * SECONDS));
    assert_eq!(connections.failed(), 0, "{connections:?}");
    assert_eq!(lookups.failed(), 0, "{lookups:?}");
    assert_eq!((held.attempted, held.cut()), (DOWNLOADS, 0), "{held:?}");
    assert_eq!(ways.len(), 4, "every way is among them: {ways:?}");
    for held in of_pods.iter().flatten() {
        assert_eq!((held.attempted, held.cut()), (HELD, 0), "{held:?}");
    }
}
