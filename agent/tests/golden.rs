//! Golden files of the service compiler: Kubernetes YAML in, the plan as text out. Each case runs with
//! its documents as written, shuffled, one by one, all at once, twice over, and with everything deleted
//! at the end. `WEIR_BLESS=1` writes the plans into the files.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use weir_agent::compile::ServicePlan;
use weir_agent::compile::service::{DnsRedirect, NodeView, compile};
use weir_agent::model::{Object, ObjectName, Snapshot};
use weir_agent::watch::documents::{Parsed, parse};
use weir_common::Protocol;
use weir_common::service::FrontendFlags;

const MARK: &str = "# == plan ==\n";

struct Case {
    objects: Vec<Object>,
    reports: String,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/service")
}

fn read(name: &str, text: &str) -> Case {
    let mut objects = Vec::new();
    let mut reports = String::new();
    for parsed in parse(name, text) {
        let Parsed::Ours(document) = parsed else {
            panic!("{name}: a kind that is not ours");
        };
        let id = document
            .id
            .as_ref()
            .map_or_else(String::new, ToString::to_string);
        match document.outcome {
            Ok(converted) => {
                for problem in converted.problems {
                    writeln!(
                        reports,
                        "quarantined {id} {}: {}",
                        problem.part, problem.reason
                    )
                    .unwrap();
                }
                objects.extend(converted.object);
            }
            Err(invalid) => writeln!(reports, "quarantined {id}: {}", invalid.reason).unwrap(),
        }
    }
    Case { objects, reports }
}

/// The plans of every service in the snapshot, for the node `here`, whose own DNS listens on an address
/// of each family.
fn plans(snapshot: &Snapshot) -> String {
    let node = NodeView {
        name: "here",
        zone: Some("a"),
        external_ips: &["198.51.100.0/24", "192.0.2.200/32", "2001:db8::/32"]
            .map(|range| range.parse().unwrap()),
    };
    let dns = DnsRedirect {
        service: ObjectName::new("kube-system", "kube-dns"),
        addresses: vec![
            "169.254.20.10".parse().unwrap(),
            "fd00:20::10".parse().unwrap(),
        ],
        port: 1053,
    };
    let services: BTreeMap<_, _> = snapshot.services.iter().collect();
    let mut text = String::new();
    for service in services.values() {
        let slices = snapshot.slices_of(&service.id).map(Arc::as_ref);
        print(&compile(service, slices, &node, Some(&dns)), &mut text);
    }
    text
}

fn print(plan: &ServicePlan, out: &mut String) {
    writeln!(out, "{}", plan.id).unwrap();
    for report in &plan.reports {
        writeln!(out, "  report: {report}").unwrap();
    }
    if plan.frontends.is_empty() {
        out.push_str("  no frontends\n");
    }
    for frontend in &plan.frontends {
        let key = &frontend.key;
        if key.is_of_cluster_ip() {
            writeln!(out, "  {}, else -> nothing", IpAddr::from(key.addr)).unwrap();
            continue;
        }
        let protocol = name(key.protocol);
        let at = match (IpAddr::from(key.addr), key.scope.is_of_nodes()) {
            (ip, false) => socket(ip, key.port.into()),
            (IpAddr::V4(_), true) => format!("nodes v4:{}", u16::from(key.port)),
            (IpAddr::V6(_), true) => format!("nodes v6:{}", u16::from(key.port)),
        };
        write!(out, "  {at} {protocol}").unwrap();
        if key.scope.is_external() {
            out.push_str(", from outside");
        }
        if frontend.affinity != 0 {
            write!(out, ", affinity {} s", frontend.affinity).unwrap();
        }
        if frontend.flags & FrontendFlags::DROP_WHEN_EMPTY != 0 {
            out.push_str(", drop when empty");
        }
        if frontend.flags & FrontendFlags::OWN_NODE_ONLY != 0 {
            out.push_str(", on this node only");
        }
        out.push_str(if frontend.backends.is_empty() {
            " -> nothing\n"
        } else {
            " ->\n"
        });
        for backend in &frontend.backends {
            writeln!(
                out,
                "    {}",
                socket(backend.addr.into(), backend.port.into())
            )
            .unwrap();
        }
    }
    for (protocol, backend) in &plan.draining {
        let at = socket(backend.addr.into(), backend.port.into());
        writeln!(out, "  draining: {at} {}", name(*protocol)).unwrap();
    }
}

fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::TCP => "TCP",
        Protocol::UDP => "UDP",
        Protocol::SCTP => "SCTP",
        _ => panic!("a protocol that no Service has"),
    }
}

fn socket(ip: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

/// The same order for the same seed.
fn shuffled(objects: &[Object], seed: u64) -> Vec<Object> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut objects = objects.to_vec();
    rng.shuffle(&mut objects);
    objects
}

fn after(objects: &[Object]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for object in objects {
        snapshot.apply(object.clone());
    }
    snapshot
}

/// The histories that must end in the same plans.
fn histories(objects: &[Object]) -> Vec<(&'static str, Snapshot)> {
    let mut histories = vec![("squashed", after(objects))];
    for seed in 0..10 {
        histories.push(("shuffled", after(&shuffled(objects, seed))));
    }
    let twice: Vec<_> = objects
        .iter()
        .flat_map(|o| [o.clone(), o.clone()])
        .collect();
    histories.push(("duplicated", after(&twice)));
    let again: Vec<_> = objects.iter().chain(objects).cloned().collect();
    histories.push(("said again", after(&again)));
    // Everything is taken away and comes back in another order, and each step is compiled.
    let mut split = Snapshot::default();
    for object in objects {
        split.apply(object.clone());
        plans(&split);
    }
    for object in shuffled(objects, 11) {
        assert!(split.delete(&object.id()));
        plans(&split);
        split.apply(object);
    }
    histories.push(("split", split));
    histories
}

#[test]
fn service_plans_are_as_written() {
    let bless = std::env::var_os("WEIR_BLESS").is_some_and(|v| v == "1");
    let mut paths: Vec<_> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "yaml"))
        .collect();
    paths.sort();
    assert!(
        paths.len() >= 15,
        "only {} cases in {}",
        paths.len(),
        folder().display()
    );
    let mut failures = String::new();
    for path in paths {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let (yaml, expected) = text.split_once(MARK).unwrap_or((&text, ""));
        let case = read(&name, yaml);
        let found = after(&case.objects);
        let found: String = format!("{}{}", plans(&found), case.reports)
            .lines()
            .map(|l| format!("# {l}\n"))
            .collect();
        if bless {
            std::fs::write(&path, format!("{yaml}{MARK}{found}")).unwrap();
        } else if found != expected {
            write!(failures, "\n{name}: expected\n{expected}found\n{found}").unwrap();
        }
        let wanted = plans(&after(&case.objects));
        for (history, snapshot) in histories(&case.objects) {
            let plans = plans(&snapshot);
            if plans != wanted {
                write!(failures, "\n{name}, {history}: found\n{plans}").unwrap();
            }
        }
        let mut snapshot = after(&case.objects);
        let ids: BTreeSet<_> = case.objects.iter().map(Object::id).collect();
        for id in shuffled(&case.objects, 12).iter().map(Object::id) {
            // A document that stands there twice is one object.
            snapshot.delete(&id);
        }
        assert!(!ids.is_empty(), "{name} is empty");
        if !plans(&snapshot).is_empty() || !snapshot.slices_of.is_empty() {
            write!(
                failures,
                "\n{name}: something is left after everything was deleted"
            )
            .unwrap();
        }
    }
    assert!(
        failures.is_empty(),
        "{failures}\nWEIR_BLESS=1 writes what was found"
    );
}
