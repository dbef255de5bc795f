//! What follows from documents and addresses: YAML in, objects out.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::model::{Object, ObjectName, ServiceKind};
use crate::watch::controllers::{Assigned, Derived, PodLeases, Surroundings, derive};
use crate::watch::documents::{Parsed, parse};
use crate::watch::last_good::Folder;

fn derived(yaml: &str, leases: &PodLeases, ranges: &[&str], before: &Assigned) -> Derived {
    let documents: Vec<_> = parse("test.yaml", yaml)
        .into_iter()
        .filter_map(|parsed| match parsed {
            Parsed::Ours(document) => Some(document),
            Parsed::Foreign(_) => None,
        })
        .collect();
    let (folder, reports) = Folder::default().next(&documents);
    assert!(reports.is_empty(), "{reports:?}");
    let surroundings = Surroundings {
        node: "here".into(),
        service_cidrs: ranges.iter().map(|r| r.parse().unwrap()).collect(),
    };
    derive(&folder.manifests(), leases, &surroundings, before)
}

fn leases(of: &[(&str, &[&str])]) -> PodLeases {
    of.iter()
        .map(|(pod, ips)| {
            let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
            (ObjectName::new("default", *pod), ips)
        })
        .collect()
}

/// The slices as text.
fn slices(derived: &Derived) -> String {
    let mut text = String::new();
    for object in derived.objects.values() {
        let Object::EndpointSlice(slice) = object else {
            continue;
        };
        let ports: Vec<_> = slice.ports.iter().map(|p| p.port.unwrap()).collect();
        for endpoint in &slice.endpoints {
            let c = endpoint.conditions;
            write!(
                text,
                "{} {:?} {ports:?} {}",
                slice.id.name, slice.family, endpoint.address
            )
            .unwrap();
            for (is_so, word) in [
                (c.ready, " ready"),
                (c.serving, " serving"),
                (c.terminating, " terminating"),
            ] {
                text.push_str(if is_so { word } else { "" });
            }
            if let Some(hostname) = &endpoint.hostname {
                write!(text, " hostname {hostname}").unwrap();
            }
            if let Some(zone) = &endpoint.zone {
                write!(text, " zone {zone}").unwrap();
            }
            text.push('\n');
        }
    }
    text
}

fn addresses(derived: &Derived) -> BTreeMap<String, Vec<String>> {
    derived
        .objects
        .values()
        .filter_map(|o| match o {
            Object::Service(s) => Some(s),
            _ => None,
        })
        .map(|s| {
            let ips = match &s.kind {
                ServiceKind::ClusterIp(ips) => ips.iter().map(ToString::to_string).collect(),
                _ => Vec::new(),
            };
            (s.id.name.to_string(), ips)
        })
        .collect()
}

const V4: &[&str] = &["10.96.0.0/16"];
const DUAL: &[&str] = &["10.96.0.0/16", "fd00:96::/112"];

fn service(name: &str, spec: &str) -> String {
    format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
}

fn pod(name: &str, port: &str, rest: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: web}}}}\nspec: \
         {{containers: [{{ports: [{{name: http, containerPort: {port}}}]}}]{rest}\n"
    )
}

#[test]
fn named_ports_are_resolved_on_each_pod() {
    let yaml = service(
        "web",
        "selector: {app: web}, ports: [{name: a, port: 80, targetPort: http}, {name: b, port: 81, targetPort: 9}]",
    ) + &pod("one", "8080", "}")
        + &pod("two", "8081", "}")
        + &pod("three", "8080, protocol: UDP", "}");
    let pods = leases(&[
        ("one", &["10.0.0.1"]),
        ("two", &["10.0.0.2"]),
        ("three", &["10.0.0.3"]),
    ]);
    assert_eq!(
        slices(&derived(&yaml, &pods, V4, &Assigned::new())),
        "web-0 V4 [9] 10.0.0.3 ready serving\n\
         web-1 V4 [8080, 9] 10.0.0.1 ready serving\n\
         web-2 V4 [8081, 9] 10.0.0.2 ready serving\n"
    );
}

#[test]
fn endpoints_are_of_the_families_of_the_service() {
    let pods = leases(&[("one", &["10.0.0.1", "fd00::1"])]);
    let selector = "selector: {app: web}, ports: [{port: 80}]";
    for (spec, expected) in [
        ("", "V4"),
        (", ipFamilyPolicy: PreferDualStack", "V4 V6"),
        (
            ", ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6, IPv4]",
            "V4 V6",
        ),
        (", ipFamilies: [IPv6]", "V6"),
        (", clusterIP: None", "V4"),
        (
            ", clusterIP: None, ipFamilyPolicy: PreferDualStack",
            "V4 V6",
        ),
        (", clusterIP: 'fd00:96::1:1'", "V6"),
    ] {
        let yaml = service("web", &format!("{selector}{spec}")) + &pod("one", "8080", "}");
        let found = slices(&derived(&yaml, &pods, DUAL, &Assigned::new()));
        let families: Vec<_> = found
            .lines()
            .map(|l| l.split(' ').nth(1).unwrap())
            .collect();
        assert_eq!(families.join(" "), expected, "{spec}");
    }
}

#[test]
fn conditions_follow_the_pod() {
    let meta = |name: &str, extra: &str, status: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: web}}{extra}}}\n{status}"
        )
    };
    let ready =
        "status: {phase: Running, podIP: 10.0.1.1, conditions: [{type: Ready, status: 'True'}]}\n";
    let unready =
        "status: {phase: Running, podIP: 10.0.1.2, conditions: [{type: Ready, status: 'False'}]}\n";
    let done = "status: {phase: Succeeded, podIP: 10.0.1.3}\n";
    let deleted = ", deletionTimestamp: '2026-01-01T00:00:00Z'";
    let yaml = |publish: &str| {
        service(
            "web",
            &format!("selector: {{app: web}}, ports: [{{port: 80}}]{publish}"),
        ) + &meta("a", "", ready)
            + &meta("b", "", unready)
            + &meta("c", "", done)
            + &meta("d", deleted, &ready.replace("1.1", "1.4"))
            + &meta("e", deleted, &unready.replace("1.2", "1.5"))
            + &meta("f", "", "")
            + &meta("g", "", "status: {phase: Pending}\n")
    };
    let pods = leases(&[
        ("f", &["10.0.1.6"]),
        ("g", &["10.0.1.7"]),
        ("stranger", &["10.0.1.8"]),
    ]);
    assert_eq!(
        slices(&derived(&yaml(""), &pods, V4, &Assigned::new())),
        "web-0 V4 [80] 10.0.1.1 ready serving\n\
         web-0 V4 [80] 10.0.1.2\n\
         web-0 V4 [80] 10.0.1.4 serving terminating\n\
         web-0 V4 [80] 10.0.1.5 terminating\n\
         web-0 V4 [80] 10.0.1.6 ready serving\n\
         web-0 V4 [80] 10.0.1.7\n"
    );
    let published = slices(&derived(
        &yaml(", publishNotReadyAddresses: true"),
        &pods,
        V4,
        &Assigned::new(),
    ));
    assert!(
        published.lines().all(|l| l.contains(" ready")),
        "{published}"
    );
}

#[test]
fn an_endpoint_has_the_hostname_and_zone_of_its_pod() {
    let node = "---\napiVersion: v1\nkind: Node\nmetadata: {name: here, labels: {topology.kubernetes.io/zone: a}}\n";
    let yaml = service(
        "db",
        "selector: {app: web}, clusterIP: None, ports: [{port: 80}]",
    ) + &pod("db-0", "1", ", hostname: db-0, subdomain: db}")
        + &pod("other", "1", ", hostname: db-1, subdomain: elsewhere}")
        + node;
    let pods = leases(&[("db-0", &["10.0.0.1"]), ("other", &["10.0.0.2"])]);
    assert_eq!(
        slices(&derived(&yaml, &pods, V4, &Assigned::new())),
        "db-0 V4 [80] 10.0.0.1 ready serving hostname db-0 zone a\n\
         db-0 V4 [80] 10.0.0.2 ready serving zone a\n"
    );
}

#[test]
fn services_without_pods_of_their_own_get_no_slices() {
    let pods = leases(&[("one", &["10.0.0.1"])]);
    for spec in [
        "ports: [{port: 80}]",
        "selector: {}, ports: [{port: 80}]",
        "selector: {app: api}, ports: [{port: 80}]",
        "type: ExternalName, externalName: a.example, selector: {app: web}",
    ] {
        let yaml = service("web", spec) + &pod("one", "8080", "}");
        assert_eq!(
            slices(&derived(&yaml, &pods, V4, &Assigned::new())),
            "",
            "{spec}"
        );
    }
}

#[test]
fn a_slice_that_is_written_down_stays_as_it_is() {
    let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-0}\naddressType: IPv4\n\
                 ports: [{port: 1}]\nendpoints: [{addresses: ['192.0.2.1']}]\n";
    let yaml =
        service("web", "selector: {app: web}, ports: [{port: 80}]") + &pod("one", "1", "}") + slice;
    let pods = leases(&[("one", &["10.0.0.1"])]);
    assert_eq!(
        slices(&derived(&yaml, &pods, V4, &Assigned::new())),
        "web-0 V4 [1] 192.0.2.1 ready serving\n"
    );
}

#[test]
fn addresses_are_given_out_once_and_kept() {
    let many: String = (0..200)
        .map(|i| service(&format!("s{i}"), "ports: [{port: 80}]"))
        .collect();
    // Leaves 16 addresses to people, one to the network and one to broadcast.
    let small = &["10.96.0.0/24"];
    let first = derived(&many, &PodLeases::new(), small, &Assigned::new());
    let unique: std::collections::BTreeSet<_> = addresses(&first).into_values().flatten().collect();
    assert_eq!(unique.len(), 200);
    // A newcomer and a departure move nobody.
    let others =
        service("aaa", "ports: [{port: 80}]") + &many.replacen("name: s0}", "name: zzz}", 1);
    let second = derived(&others, &PodLeases::new(), small, &first.assigned);
    let (before, after) = (addresses(&first), addresses(&second));
    for (name, ips) in &before {
        if name != "s0" {
            assert_eq!(after[name], *ips, "{name}");
        }
    }
    assert!(
        !second
            .assigned
            .contains_key(&ObjectName::new("default", "s0"))
    );
}

#[test]
fn a_service_that_cannot_have_its_address_is_reported() {
    let none: &[&str] = &[];
    let cases: &[(&str, &[&str], &str)] = &[
        (
            "ipFamilies: [IPv6]",
            V4,
            "it asks for an IPv6 address, and no service range of that family is configured",
        ),
        (
            "ipFamilyPolicy: RequireDualStack",
            V4,
            "it requires addresses of both families, and one service range is configured",
        ),
        ("type: ClusterIP", none, "no service range is configured"),
        (
            "clusterIP: 10.96.0.10",
            V4,
            "cluster IP 10.96.0.10 is that of Service default/dns",
        ),
        (
            "type: ClusterIP",
            &["10.96.0.10/32"],
            "no IPv4 service address is free",
        ),
    ];
    for (spec, ranges, reason) in cases {
        let yaml = service("dns", "clusterIP: 10.96.0.10, ports: [{port: 53}]")
            + &service("web", &format!("{spec}, ports: [{{port: 80}}]"));
        let found = derived(&yaml, &PodLeases::new(), ranges, &Assigned::new());
        assert_eq!(found.reports["Service default/web"], *reason, "{spec}");
        assert_eq!(
            addresses(&found).keys().collect::<Vec<_>>(),
            ["dns"],
            "{spec}"
        );
    }
}
