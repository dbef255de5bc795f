//! A cluster of two real nodes with Weir as CNI, proxy and DNS: Kubernetes' own networking conformance,
//! and applications whose pods the scheduler spreads.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use weir_tests::cache::progress;
use weir_tests::cluster::application::Application;
use weir_tests::cluster::e2e::{self, Selection};
use weir_tests::cluster::matrix::{By, Cell, Way};
use weir_tests::cluster::options::Options;
use weir_tests::cluster::programs::Programs;
use weir_tests::cluster::rollout::{self, DOWNLOADS};
use weir_tests::cluster::{Cluster, End};
use weir_tests::manifests;

/// How many specs of v1.36 carry `[sig-network]` and `[Conformance]`.
const SPECS: usize = 47;

/// How long a pod may take to run and to be reached, images being there.
const START: Duration = Duration::from_secs(60);

/// Starting a cluster takes a minute: tests that run side by side share one, and take turns on it. The
/// last of them takes it down.
static SHARED: Mutex<Weak<Mutex<Cluster>>> = Mutex::new(Weak::new());

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    selection: Selection,
}

/// The cluster, for a test of this name; `None` where none can be built.
fn shared(test: &str) -> Option<Arc<Mutex<Cluster>>> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(running) = shared.upgrade() {
        return Some(running);
    }
    let programs = Programs::for_test(test)?;
    let cluster = Cluster::up(Options::of_test("test"), programs, End::TakenDown).unwrap();
    let cluster = Arc::new(Mutex::new(cluster));
    *shared = Arc::downgrade(&cluster);
    Some(cluster)
}

#[test]
fn networking_conformance_passes_whole() {
    let Some(cluster) = shared("networking_conformance_passes_whole") else {
        return;
    };
    let cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    let Defaults { selection } = Defaults::parse_from(["e2e"]);
    let outcome = e2e::run(&cluster, &selection).unwrap();
    assert!(outcome.is_good(), "{outcome}");
    assert_eq!(
        (outcome.passed, outcome.skipped.len()),
        (SPECS, 0),
        "{outcome}"
    );
}

/// Pairs, and how many of them the policies allow.
#[derive(Debug, PartialEq)]
struct Count {
    by_name: usize,
    allowed_by_name: usize,
    by_address: usize,
    allowed_by_address: usize,
}

#[test]
fn the_shop_connects_across_nodes_as_its_policies_say() {
    let Some(cluster) = shared("the_shop_connects_across_nodes_as_its_policies_say") else {
        return;
    };
    let cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = manifests::shop();
    let application = Application::run(&cluster, &folder).unwrap();
    // 11 pods and 5 ports of Services; 12 times the client is one of several backends.
    let expected = Count {
        by_name: 43,
        allowed_by_name: 9,
        by_address: 120,
        allowed_by_address: 22,
    };
    check(&application, &folder, &expected);

    // What a cluster that does not keep the policies looks like: both customers reach the database, by
    // name and at both of its pods.
    let policies = ["default-deny", "db"];
    let delete = ["--namespace=shop", "delete", "networkpolicy"];
    let delete = [&delete[..], &policies[..]].concat();
    cluster.kubectl().run(&delete).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let wrong = wrong(&application.matrix(&folder).unwrap());
        if wrong.len() == 6 {
            let expected = |line: &String| line.contains("> shop/db") && line.contains("answered");
            assert!(wrong.iter().all(expected), "{}", wrong.join("\n"));
            break;
        }
        assert!(Instant::now() < deadline, "{}", wrong.join("\n"));
    }
}

#[test]
fn online_boutique_connects_across_nodes_as_its_policies_say() {
    let test = "online_boutique_connects_across_nodes_as_its_policies_say";
    let Some(folder) = manifests::online_boutique(test) else {
        return;
    };
    let Some(cluster) = shared(test) else {
        return;
    };
    let cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    let application = Application::run(&cluster, &folder).unwrap();
    // 12 pods, 12 ports of Services, 11 pods that serve.
    let expected = Count {
        by_name: 144,
        allowed_by_name: 49,
        by_address: 121,
        allowed_by_address: 26,
    };
    check(&application, &folder, &expected);
}

#[test]
fn a_rolling_update_cuts_no_download_through_a_node_port() {
    let test = "a_rolling_update_cuts_no_download_through_a_node_port";
    let Some(cluster) = shared(test) else {
        return;
    };
    let cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    let rollout = rollout::run(&cluster).unwrap();
    progress(&rollout.to_string());
    assert_eq!(rollout.held.attempted, DOWNLOADS);
    assert_eq!(rollout.held.cut(), 0, "{rollout}");
    // Both nodes are asked, and both have pods that go.
    assert_eq!(rollout.ways.len(), 4, "{rollout}");
    assert!(rollout.fresh.attempted > 400, "{rollout}");
    assert_eq!(rollout.fresh.failed(), 0, "{rollout}");
}

/// The kubelet gives the runtime a hash of the file as the pod's uid; the object of the pod is a mirror, whose uid is
/// another.
#[test]
fn a_static_pod_starts_obeys_policy_and_starts_again_when_its_file_changes() {
    let test = "a_static_pod_starts_obeys_policy_and_starts_again_when_its_file_changes";
    let Some(cluster) = shared(test) else {
        return;
    };
    let cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    let (kubectl, image) = (cluster.kubectl(), cluster.agnhost().unwrap());
    let client = |name: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{app: {name}}}}}, \
             spec: {{terminationGracePeriodSeconds: 1, \
             containers: [{{name: main, image: '{image}', args: [pause]}}]}}}}"
        )
    };
    let objects = [
        client("moth"),
        client("bat"),
        "{apiVersion: v1, kind: Service, metadata: {name: lamp}, \
         spec: {selector: {app: lamp}, ports: [{port: 80, targetPort: 8080}]}}"
            .to_owned(),
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: lamp}, \
         spec: {podSelector: {matchLabels: {app: lamp}}, policyTypes: [Ingress], \
         ingress: [{from: [{podSelector: {matchLabels: {app: moth}}}]}]}}"
            .to_owned(),
    ];
    kubectl.apply(&objects.join("\n---\n")).unwrap();
    let file = cluster.static_pods("n1").unwrap().join("lamp.yaml");
    // What begins with a brace the kubelet takes for JSON.
    let lamp = |light: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: lamp, namespace: default, \
             labels: {{app: lamp}}, annotations: {{light: {light}}}}}\n\
             spec: {{terminationGracePeriodSeconds: 1, \
             containers: [{{name: main, image: '{image}', \
             args: [netexec, '--http-port=8080', '--udp-port=-1']}}]}}\n"
        )
    };
    for light in ["red", "green"] {
        fs::write(&file, lamp(light)).unwrap();
        // The mirror has the annotations of the file, so an old one is not taken for the new.
        let mirror =
            "--output=jsonpath={.metadata.annotations.light} {.status.phase} {.status.podIP}";
        let begin = Instant::now();
        let address = loop {
            let said = kubectl.run(&["get", "pod", "lamp-n1", mirror]);
            let said = said.unwrap_or_else(|error| error.to_string());
            match said.split(' ').collect::<Vec<_>>()[..] {
                [found, "Running", address] if found == light && !address.is_empty() => {
                    break address.to_owned();
                }
                _ => assert!(begin.elapsed() < START, "{light}: {said}"),
            }
            thread::sleep(Duration::from_millis(200));
        };
        progress(&format!(
            "static pod {light}: {:.1} s",
            begin.elapsed().as_secs_f64()
        ));
        let asks = |client: &str| {
            let ask = ["exec", client, "--", "/agnhost", "connect", "--timeout=1s"];
            let by_name = kubectl.run(&[&ask[..], &["lamp.default:80"]].concat());
            let by_address = kubectl.run(&[&ask[..], &[&format!("{address}:8080")]].concat());
            (by_name.is_ok(), by_address.is_ok())
        };
        for (client, expected) in [("moth", (true, true)), ("bat", (false, false))] {
            let begin = Instant::now();
            while asks(client) != expected {
                let seen = kubectl.run(&["get", "pods", "--output=wide"]).unwrap();
                assert!(begin.elapsed() < START, "{light}, {client}:\n{seen}");
            }
            assert_eq!(asks(client), expected, "{light}, {client}: it stays so");
        }
    }
    fs::remove_file(&file).unwrap();
    for kind in ["pod/moth", "pod/bat", "service/lamp", "networkpolicy/lamp"] {
        kubectl.run(&["delete", kind]).unwrap();
    }
}

fn check(application: &Application, folder: &Path, expected: &Count) {
    let spread = application.spread();
    assert_eq!(spread.len(), 2, "the scheduler used one node: {spread:?}");
    let begin = Instant::now();
    let cells = application.matrix(folder).unwrap();
    let count = |is_it: &dyn Fn(&Cell) -> bool| cells.iter().filter(|cell| is_it(cell)).count();
    let counted = Count {
        by_name: count(&|c| c.by == By::Name),
        allowed_by_name: count(&|c| c.by == By::Name && c.is_allowed),
        by_address: count(&|c| c.by == By::Address),
        allowed_by_address: count(&|c| c.by == By::Address && c.is_allowed),
    };
    let of_way = |way| count(&|c| c.way == way);
    progress(&format!(
        "{} pods on the nodes: {} pairs within, {} across, {} either, in {:.1} s",
        spread
            .values()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(" and "),
        of_way(Way::WithinNode),
        of_way(Way::AcrossNodes),
        of_way(Way::Either),
        begin.elapsed().as_secs_f64(),
    ));
    let wrong = wrong(&cells);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(counted, *expected);
    for way in [Way::WithinNode, Way::AcrossNodes] {
        for is_allowed in [true, false] {
            let some = count(&|c| c.way == way && c.is_allowed == is_allowed);
            assert!(some > 0, "no pair {way:?} that is allowed: {is_allowed}");
        }
    }
}

fn wrong(cells: &[Cell]) -> Vec<String> {
    let wrong = cells.iter().filter(|cell| !cell.is_right());
    wrong.map(ToString::to_string).collect()
}
