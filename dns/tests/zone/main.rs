//! The record table of Kubernetes DNS-Based Service Discovery 1.1.0 as questions and answers. The
//! properties of a zone that is changed step by step are in `properties`.
#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

mod properties;

use std::sync::Arc;

use hickory_proto::rr::{Name, Record, RecordType};
use weir_dns::zone::{
    Answer, Domain, EndpointSet, PortProtocol, ServiceKind, ServiceName, Zone, ZoneEndpoint,
    ZonePort, ZoneService,
};

fn service(namespace: &str, name: &str, kind: ServiceKind) -> Arc<ZoneService> {
    Arc::new(ZoneService {
        name: Arc::new(ServiceName::new(namespace, name)),
        kind,
    })
}

fn port(name: &str, protocol: PortProtocol, port: u16) -> ZonePort {
    ZonePort {
        name: name.into(),
        protocol,
        port,
    }
}

fn endpoint(address: &str, hostname: Option<&str>) -> ZoneEndpoint {
    ZoneEndpoint {
        address: address.parse().unwrap(),
        hostname: hostname.map(Into::into),
    }
}

fn cluster_ip(addresses: &[&str], ports: Vec<ZonePort>) -> ServiceKind {
    ServiceKind::ClusterIp {
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        ports,
    }
}

fn external(target: &str) -> ServiceKind {
    ServiceKind::ExternalName {
        target: target.into(),
    }
}

fn example() -> Zone {
    use PortProtocol::{Tcp, Udp};
    let mut zone = Zone::new(Domain::new("cluster.local").unwrap(), 5, 100);
    for namespace in ["default", "kube-system", "empty"] {
        zone.announce(&namespace.into());
    }
    let database = ServiceKind::Headless {
        sets: vec![
            EndpointSet {
                ports: vec![port("sql", Tcp, 5432)],
                endpoints: vec![
                    endpoint("10.1.0.5", Some("db-0")),
                    endpoint("10.1.0.6", Some("db-1")),
                    endpoint("10.1.0.7", Some("twin")),
                    endpoint("10.1.0.8", Some("twin")),
                    endpoint("10.1.0.9", None),
                ],
            },
            EndpointSet {
                ports: vec![port("sql", Tcp, 5432)],
                endpoints: vec![
                    endpoint("fd00:1::5", Some("db-0")),
                    endpoint("fd00:1::", None),
                ],
            },
        ],
    };
    let only_v6 = ServiceKind::Headless {
        sets: vec![EndpointSet {
            ports: vec![],
            endpoints: vec![endpoint("fd00:1::77", None)],
        }],
    };
    for (namespace, name, kind) in [
        (
            "default",
            "web",
            cluster_ip(
                &["10.96.0.20", "fd00:96::20"],
                vec![port("http", Tcp, 80), port("quic", Udp, 443)],
            ),
        ),
        ("default", "plain", cluster_ip(&["10.96.0.21"], vec![])),
        ("default", "pending", cluster_ip(&[], vec![])),
        ("default", "db", database),
        ("default", "db-too", {
            ServiceKind::Headless {
                sets: vec![EndpointSet {
                    ports: vec![],
                    endpoints: vec![endpoint("10.1.0.9", None)],
                }],
            }
        }),
        ("default", "six", only_v6),
        ("default", "nobody", ServiceKind::Headless { sets: vec![] }),
        ("default", "away", external("www.example.com")),
        (
            "default",
            "home",
            external("Web.default.svc.cluster.local."),
        ),
        (
            "default",
            "gone",
            external("none.default.svc.cluster.local"),
        ),
        ("default", "hop", external("home.default.svc.cluster.local")),
        (
            "default",
            "loop-a",
            external("loop-b.default.svc.cluster.local"),
        ),
        (
            "default",
            "loop-b",
            external("loop-a.default.svc.cluster.local"),
        ),
        ("default", "broken", external("a..b")),
        (
            "kube-system",
            "kube-dns",
            cluster_ip(
                &["10.96.0.10"],
                vec![port("dns", Udp, 53), port("dns-tcp", Tcp, 53)],
            ),
        ),
        ("implied", "svc", cluster_ip(&["10.96.0.30"], vec![])),
        ("default", "3com", cluster_ip(&["10.96.0.31"], vec![])),
    ] {
        zone.upsert(service(namespace, name, kind));
    }
    zone
}

fn show(record: &Record) -> String {
    format!(
        "{} {} {} {}",
        record.name,
        record.ttl,
        record.record_type(),
        record.data
    )
}

/// The answer in words: outcome, then the sorted records.
fn ask(zone: &Zone, name: &str, kind: RecordType) -> Vec<String> {
    let mut name = Name::from_ascii(name).unwrap();
    name.set_fqdn(true);
    let (word, chain, records) = match zone.answer(&name, kind) {
        Answer::Records { chain, records, .. } => ("ok".to_owned(), chain, records),
        Answer::NoData { chain, soa } => (format!("nodata {}", soa.name), chain, vec![]),
        Answer::NxDomain { chain, soa } => (format!("nxdomain {}", soa.name), chain, vec![]),
        Answer::Cname { chain, target } => (format!("elsewhere {target}"), chain, vec![]),
        Answer::Circle => ("circle".to_owned(), vec![], vec![]),
        Answer::Refuse => ("refuse".to_owned(), vec![], vec![]),
        Answer::NotMine => ("not mine".to_owned(), vec![], vec![]),
    };
    let mut records: Vec<String> = records.iter().map(show).collect();
    records.sort();
    std::iter::once(word)
        .chain(chain.iter().map(show))
        .chain(records)
        .collect()
}

#[test]
fn the_specification_table_holds() {
    use RecordType::{A, AAAA, AXFR, CNAME, MX, NS, PTR, SOA, SRV, TXT};
    const OK: &str = "ok";
    const NODATA: &str = "nodata cluster.local.";
    const NXDOMAIN: &str = "nxdomain cluster.local.";
    let table: Vec<(&str, RecordType, Vec<&str>)> = vec![
        // Schema version.
        (
            "dns-version.cluster.local",
            TXT,
            vec![OK, "dns-version.cluster.local. 28800 TXT 1.1.0"],
        ),
        ("dns-version.cluster.local", A, vec![NODATA]),
        ("x.dns-version.cluster.local", TXT, vec![NXDOMAIN]),
        // Cluster IPs.
        (
            "web.default.svc.cluster.local",
            A,
            vec![OK, "web.default.svc.cluster.local. 5 A 10.96.0.20"],
        ),
        (
            "web.default.svc.cluster.local",
            AAAA,
            vec![OK, "web.default.svc.cluster.local. 5 AAAA fd00:96::20"],
        ),
        (
            "WEB.Default.SVC.cluster.LOCAL",
            A,
            vec![OK, "WEB.Default.SVC.cluster.LOCAL. 5 A 10.96.0.20"],
        ),
        ("web.default.svc.cluster.local", MX, vec![NODATA]),
        ("web.default.svc.cluster.local", SRV, vec![NODATA]),
        ("web.default.svc.cluster.local", CNAME, vec![NODATA]),
        ("plain.default.svc.cluster.local", AAAA, vec![NODATA]),
        ("pending.default.svc.cluster.local", A, vec![NODATA]),
        (
            "3com.default.svc.cluster.local",
            A,
            vec![OK, "3com.default.svc.cluster.local. 5 A 10.96.0.31"],
        ),
        ("none.default.svc.cluster.local", A, vec![NXDOMAIN]),
        ("web.other.svc.cluster.local", A, vec![NXDOMAIN]),
        ("x.web.default.svc.cluster.local", A, vec![NXDOMAIN]),
        (
            "10-96-0-20.web.default.svc.cluster.local",
            A,
            vec![NXDOMAIN],
        ),
        ("web.default.cluster.local", A, vec![NXDOMAIN]),
        ("web.cluster.local", A, vec![NXDOMAIN]),
        // Named ports.
        (
            "_http._tcp.web.default.svc.cluster.local",
            SRV,
            vec![
                OK,
                "_http._tcp.web.default.svc.cluster.local. 5 SRV 0 100 80 web.default.svc.cluster.local.",
            ],
        ),
        (
            "_QUIC._UDP.web.default.svc.cluster.local",
            SRV,
            vec![
                OK,
                "_QUIC._UDP.web.default.svc.cluster.local. 5 SRV 0 100 443 web.default.svc.cluster.local.",
            ],
        ),
        (
            "_http._udp.web.default.svc.cluster.local",
            SRV,
            vec![NXDOMAIN],
        ),
        (
            "http._tcp.web.default.svc.cluster.local",
            SRV,
            vec![NXDOMAIN],
        ),
        ("_http._tcp.web.default.svc.cluster.local", A, vec![NODATA]),
        ("_tcp.web.default.svc.cluster.local", SRV, vec![NODATA]),
        ("_sctp.web.default.svc.cluster.local", SRV, vec![NXDOMAIN]),
        ("_tcp.plain.default.svc.cluster.local", SRV, vec![NXDOMAIN]),
        (
            "_._tcp.plain.default.svc.cluster.local",
            SRV,
            vec![NXDOMAIN],
        ),
        (
            "_x._http._tcp.web.default.svc.cluster.local",
            SRV,
            vec![NXDOMAIN],
        ),
        // Reverse names of cluster IPs.
        (
            "20.0.96.10.in-addr.arpa",
            PTR,
            vec![
                OK,
                "20.0.96.10.in-addr.arpa. 5 PTR web.default.svc.cluster.local.",
            ],
        ),
        (
            "0.2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa",
            PTR,
            vec![
                OK,
                "0.2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa. 5 PTR web.default.svc.cluster.local.",
            ],
        ),
        ("20.0.96.10.in-addr.arpa", A, vec!["nodata in-addr.arpa."]),
        ("99.0.96.10.in-addr.arpa", PTR, vec!["not mine"]),
        ("0.96.10.in-addr.arpa", PTR, vec!["not mine"]),
        // Headless.
        (
            "db.default.svc.cluster.local",
            A,
            vec![
                OK,
                "db.default.svc.cluster.local. 5 A 10.1.0.5",
                "db.default.svc.cluster.local. 5 A 10.1.0.6",
                "db.default.svc.cluster.local. 5 A 10.1.0.7",
                "db.default.svc.cluster.local. 5 A 10.1.0.8",
                "db.default.svc.cluster.local. 5 A 10.1.0.9",
            ],
        ),
        (
            "db.default.svc.cluster.local",
            AAAA,
            vec![
                OK,
                "db.default.svc.cluster.local. 5 AAAA fd00:1::",
                "db.default.svc.cluster.local. 5 AAAA fd00:1::5",
            ],
        ),
        ("db.default.svc.cluster.local", TXT, vec![NODATA]),
        ("nobody.default.svc.cluster.local", A, vec![NXDOMAIN]),
        ("nobody.default.svc.cluster.local", TXT, vec![NXDOMAIN]),
        ("six.default.svc.cluster.local", A, vec![NODATA]),
        (
            "db-0.db.default.svc.cluster.local",
            A,
            vec![OK, "db-0.db.default.svc.cluster.local. 5 A 10.1.0.5"],
        ),
        (
            "DB-0.db.default.svc.cluster.local",
            AAAA,
            vec![OK, "DB-0.db.default.svc.cluster.local. 5 AAAA fd00:1::5"],
        ),
        ("db-1.db.default.svc.cluster.local", AAAA, vec![NODATA]),
        ("db-9.db.default.svc.cluster.local", A, vec![NXDOMAIN]),
        (
            "twin.db.default.svc.cluster.local",
            A,
            vec![
                OK,
                "twin.db.default.svc.cluster.local. 5 A 10.1.0.7",
                "twin.db.default.svc.cluster.local. 5 A 10.1.0.8",
            ],
        ),
        (
            "10-1-0-9.db.default.svc.cluster.local",
            A,
            vec![OK, "10-1-0-9.db.default.svc.cluster.local. 5 A 10.1.0.9"],
        ),
        ("10-1-0-5.db.default.svc.cluster.local", A, vec![NXDOMAIN]),
        (
            "fd00-1--0.db.default.svc.cluster.local",
            AAAA,
            vec![
                OK,
                "fd00-1--0.db.default.svc.cluster.local. 5 AAAA fd00:1::",
            ],
        ),
        (
            "_sql._tcp.db.default.svc.cluster.local",
            SRV,
            vec![
                OK,
                "_sql._tcp.db.default.svc.cluster.local. 5 SRV 0 20 5432 10-1-0-9.db.default.svc.cluster.local.",
                "_sql._tcp.db.default.svc.cluster.local. 5 SRV 0 20 5432 db-0.db.default.svc.cluster.local.",
                "_sql._tcp.db.default.svc.cluster.local. 5 SRV 0 20 5432 db-1.db.default.svc.cluster.local.",
                "_sql._tcp.db.default.svc.cluster.local. 5 SRV 0 20 5432 fd00-1--0.db.default.svc.cluster.local.",
                "_sql._tcp.db.default.svc.cluster.local. 5 SRV 0 20 5432 twin.db.default.svc.cluster.local.",
            ],
        ),
        ("_tcp.db.default.svc.cluster.local", A, vec![NODATA]),
        (
            "5.0.1.10.in-addr.arpa",
            PTR,
            vec![
                OK,
                "5.0.1.10.in-addr.arpa. 5 PTR db-0.db.default.svc.cluster.local.",
            ],
        ),
        (
            "9.0.1.10.in-addr.arpa",
            PTR,
            vec![
                OK,
                "9.0.1.10.in-addr.arpa. 5 PTR 10-1-0-9.db-too.default.svc.cluster.local.",
                "9.0.1.10.in-addr.arpa. 5 PTR 10-1-0-9.db.default.svc.cluster.local.",
            ],
        ),
        // ExternalName.
        (
            "away.default.svc.cluster.local",
            CNAME,
            vec![
                OK,
                "away.default.svc.cluster.local. 5 CNAME www.example.com.",
            ],
        ),
        (
            "away.default.svc.cluster.local",
            A,
            vec![
                "elsewhere www.example.com.",
                "away.default.svc.cluster.local. 5 CNAME www.example.com.",
            ],
        ),
        (
            "hop.default.svc.cluster.local",
            A,
            vec![
                OK,
                "hop.default.svc.cluster.local. 5 CNAME home.default.svc.cluster.local.",
                "home.default.svc.cluster.local. 5 CNAME Web.default.svc.cluster.local.",
                "Web.default.svc.cluster.local. 5 A 10.96.0.20",
            ],
        ),
        (
            "gone.default.svc.cluster.local",
            A,
            vec![
                NXDOMAIN,
                "gone.default.svc.cluster.local. 5 CNAME none.default.svc.cluster.local.",
            ],
        ),
        (
            "home.default.svc.cluster.local",
            MX,
            vec![
                NODATA,
                "home.default.svc.cluster.local. 5 CNAME Web.default.svc.cluster.local.",
            ],
        ),
        ("loop-a.default.svc.cluster.local", A, vec!["circle"]),
        ("broken.default.svc.cluster.local", A, vec![NODATA]),
        (
            "_http._tcp.away.default.svc.cluster.local",
            SRV,
            vec![NXDOMAIN],
        ),
        // Pods by address.
        (
            "10-1-0-99.default.pod.cluster.local",
            A,
            vec![OK, "10-1-0-99.default.pod.cluster.local. 5 A 10.1.0.99"],
        ),
        ("10-1-0-99.default.pod.cluster.local", AAAA, vec![NODATA]),
        (
            "fd00-1--99.default.pod.cluster.local",
            AAAA,
            vec![
                OK,
                "fd00-1--99.default.pod.cluster.local. 5 AAAA fd00:1::99",
            ],
        ),
        ("10-1-0-999.default.pod.cluster.local", A, vec![NXDOMAIN]),
        ("10-1-0-99.other.pod.cluster.local", A, vec![NXDOMAIN]),
        ("name.default.pod.cluster.local", A, vec![NXDOMAIN]),
        ("x.10-1-0-99.default.pod.cluster.local", A, vec![NXDOMAIN]),
        // Empty branches exist.
        ("svc.cluster.local", A, vec![NODATA]),
        ("pod.cluster.local", A, vec![NODATA]),
        ("default.svc.cluster.local", A, vec![NODATA]),
        ("empty.svc.cluster.local", A, vec![NODATA]),
        ("implied.svc.cluster.local", A, vec![NODATA]),
        ("default.pod.cluster.local", A, vec![NODATA]),
        ("other.svc.cluster.local", A, vec![NXDOMAIN]),
        ("other.pod.cluster.local", A, vec![NXDOMAIN]),
        // The zone itself.
        (
            "cluster.local",
            SOA,
            vec![
                OK,
                "cluster.local. 5 SOA ns.dns.cluster.local. hostmaster.cluster.local. 120 7200 1800 86400 5",
            ],
        ),
        (
            "cluster.local",
            NS,
            vec![OK, "cluster.local. 5 NS ns.dns.cluster.local."],
        ),
        ("cluster.local", A, vec![NODATA]),
        (
            "ns.dns.cluster.local",
            A,
            vec![OK, "ns.dns.cluster.local. 5 A 10.96.0.10"],
        ),
        ("dns.cluster.local", A, vec![NODATA]),
        ("x.dns.cluster.local", A, vec![NXDOMAIN]),
        ("cluster.local", AXFR, vec!["refuse"]),
        // Not ours.
        ("www.example.com", A, vec!["not mine"]),
        ("local", A, vec!["not mine"]),
        ("notcluster.local", A, vec!["not mine"]),
        (".", NS, vec!["not mine"]),
    ];
    let zone = example();
    let asked = table.len();
    let wrong: Vec<String> = table
        .into_iter()
        .filter_map(|(name, kind, expected)| {
            let got = ask(&zone, name, kind);
            (got != expected).then(|| format!("{name} {kind}\n  want {expected:?}\n  got  {got:?}"))
        })
        .collect();
    assert!(wrong.is_empty(), "of {asked}:\n{}", wrong.join("\n"));
}

#[test]
fn srv_targets_come_with_their_addresses() {
    let name = Name::from_ascii("_http._tcp.web.default.svc.cluster.local.").unwrap();
    let Answer::Records { additionals, .. } = example().answer(&name, RecordType::SRV) else {
        panic!("no records");
    };
    let shown: Vec<String> = additionals.iter().map(show).collect();
    assert_eq!(
        shown,
        [
            "web.default.svc.cluster.local. 5 A 10.96.0.20",
            "web.default.svc.cluster.local. 5 AAAA fd00:96::20",
        ]
    );
}

#[test]
fn a_service_that_changes_kind_leaves_nothing_behind() {
    let mut zone = example();
    zone.upsert(service("default", "web", external("www.example.com")));
    assert_eq!(
        ask(&zone, "20.0.96.10.in-addr.arpa", RecordType::PTR),
        ["not mine"]
    );
    zone.remove(&ServiceName::new("default", "db-too"));
    assert_eq!(
        ask(&zone, "9.0.1.10.in-addr.arpa", RecordType::PTR),
        [
            "ok",
            "9.0.1.10.in-addr.arpa. 5 PTR 10-1-0-9.db.default.svc.cluster.local."
        ]
    );
    zone.remove(&ServiceName::new("implied", "svc"));
    assert_eq!(
        ask(&zone, "implied.svc.cluster.local", RecordType::A),
        ["nxdomain cluster.local."]
    );
    zone.retire("empty");
    assert_eq!(
        ask(&zone, "empty.svc.cluster.local", RecordType::A),
        ["nxdomain cluster.local."]
    );
}

#[test]
fn a_domain_that_is_the_root_or_no_name_is_rejected() {
    for text in ["", ".", "a..b", &"x".repeat(64)] {
        assert!(Domain::new(text).is_err(), "{text:?}");
    }
}
