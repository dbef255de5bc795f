//! Rows 1 and 3 of the targets: what a service costs through the socket path, and what everything on
//! costs against a kernel that routes by itself.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use weir_tests::machine::Machine;
use weir_tests::netns::{self, End, Netns};
use weir_tests::node::{Family, Node, NodeOptions, Pod, binary};
use weir_tests::process::{Launch, Process};
use weir_tests::workloads::{Transport, Workload};

use crate::exchange::{Destination, Latency, Transaction};
use crate::report::{Row, Target};
use crate::rounds::{Arm, Rounds, interleave, median, ratio};

/// Both ends of every exchange are here; agent and everything else may have the other one.
const CPU: &str = "1";
/// Of every server, and of the services before them.
pub(crate) const PORT: u16 = 7777;
/// What servers answer with: the one behind Weir, the one behind plain routing.
const WEIRS: u8 = 1;
const PLAIN: u8 = 2;
/// How many other services are programmed while service 1 is measured.
const OTHER_SERVICES: usize = 10_000;

/// How long a bench is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Length {
    pub(crate) rounds: usize,
    pub(crate) transactions: usize,
}

/// A place with a client and a server: two pods of a node, or two namespaces behind plain routing.
pub(crate) trait Place {
    fn client(&self, name: &str) -> Launch;
}

impl Place for Pod {
    fn client(&self, name: &str) -> Launch {
        self.launch(name, binary("weir-bench"))
    }
}

/// A client that connects thousands of times must not run out of ports: each waits a minute after it is
/// closed.
pub(crate) fn give_ports(client: &Netns) -> Result<()> {
    client.set_sysctl("net.ipv4.ip_local_port_range", "1024 65000")?;
    client.set_sysctl("net.ipv4.tcp_tw_reuse", "1")
}

/// Starts a client that measures from a place to a target.
fn start_client(
    place: &dyn Place,
    log: &std::path::Path,
    what: Transaction,
    target: Destination,
    count: usize,
) -> Result<Process> {
    std::fs::write(log, "")?;
    place
        .client("measure")
        .args(["measure", "--cpu", CPU])
        .args([
            "--what",
            clap::ValueEnum::to_possible_value(&what)
                .context("a name")?
                .get_name(),
        ])
        .args([
            "--target",
            &target.address.to_string(),
            "--answer",
            &target.answer.to_string(),
            "--count",
            &count.to_string(),
        ])
        .log_to(log)
        .spawn()
}

/// Asks from a place, over one connection, until the connection was seen where it should be.
///
/// # Errors
/// It was not, or an answer is another server's.
pub(crate) fn witness(
    place: &dyn Place,
    log: &std::path::Path,
    target: Destination,
    is_seen: impl Fn() -> Result<bool>,
) -> Result<()> {
    const LONG: usize = 10_000_000;
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut client = start_client(place, log, Transaction::TcpRr, target, LONG)?;
    let mut failed = None;
    let seen = client.wait_until("seen on its way", PATIENCE, || {
        is_seen().unwrap_or_else(|error| {
            failed = Some(error);
            true
        })
    });
    client.kill()?;
    failed.map_or(seen, Err)
}

/// Measures from a place to a target.
pub(crate) fn measure(
    place: &dyn Place,
    log: &std::path::Path,
    what: Transaction,
    target: Destination,
    count: usize,
) -> Result<Latency> {
    let mut client = start_client(place, log, what, target, count)?;
    let status = client.wait(Duration::from_secs(60))?;
    let said = client.log();
    let line = said.lines().last().unwrap_or_default();
    serde_json::from_str(line).with_context(|| format!("the client ended with {status}: {said}"))
}

/// A node with everything on, two pods, and a service in front of the second.
pub(crate) struct WeirPlace {
    // Dropped before the node that it runs on.
    _server: Process,
    pub(crate) client: Pod,
    pub(crate) server: Pod,
    pub(crate) node: Node,
}

impl WeirPlace {
    fn make(other_services: usize) -> Result<Self> {
        let mut manifests = service_yaml("server", "10.96.0.77", "server");
        for n in 0..other_services {
            let address = format!("10.97.{}.{}", n / 250, n % 250 + 1);
            manifests.push_str("---\n");
            manifests.push_str(&service_yaml(&format!("other-{n}"), &address, "server"));
        }
        let node = Node::start(NodeOptions::named("bench"))?;
        Self::on(node, &manifests, POLICY)
    }

    /// On a node that is ready, with these services, one of which is called `server`, and policies.
    pub(crate) fn on(node: Node, services: &str, policies: &str) -> Result<Self> {
        // A policy each way, so that judging is part of what is measured.
        node.write_manifest("policy.yaml", policies)?;
        let client = node.run_pod(Workload::named("bench", "client"))?;
        give_ports(client.netns())?;
        // The pod declares the port; the bench's own server answers on it.
        let mut server =
            node.declare_pod(Workload::named("bench", "server").port(Transport::Tcp, PORT))?;
        node.add_pod(&mut server)?;
        let process = serve(
            server.launch("serve", binary("weir-bench")),
            node.machine().dir(),
            WEIRS,
        )?;
        // Last: a runtime does not wait while thousands are read.
        node.write_manifest("services.yaml", services)?;
        node.wait_for_service("bench/server", 1, Duration::from_secs(30))?;
        Ok(Self {
            _server: process,
            client,
            server,
            node,
        })
    }

    /// An address that leads to the server.
    pub(crate) fn at(address: SocketAddr) -> Destination {
        Destination {
            address,
            answer: WEIRS,
        }
    }

    /// The server itself.
    pub(crate) fn direct(&self) -> Result<Destination> {
        let address = self.server.address(Family::V4)?;
        Ok(Self::at(SocketAddr::new(address, PORT)))
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.node.machine().dir().join("measure.log")
    }
}

/// Two namespaces behind a third that routes: the kernel with nothing installed.
pub(crate) struct PlainPlace {
    _server: Process,
    pub(crate) client: PlainPod,
    _server_pod: PlainPod,
    pub(crate) router: Machine,
}

/// A namespace behind a router, with a cgroup below the router's, as deep as pods of Weir have theirs: what a request costs
/// depends on it.
pub(crate) struct PlainPod {
    pub(crate) netns: Netns,
    cgroup: PathBuf,
}

impl Place for PlainPod {
    fn client(&self, name: &str) -> Launch {
        Launch::new(name, binary("weir-bench"))
            .in_netns(&self.netns)
            .in_cgroup(&self.cgroup)
    }
}

impl PlainPod {
    pub(crate) fn new(router: &Machine, name: &str, net: &str) -> Result<Self> {
        let netns = Netns::new(name)?;
        behind(router.netns(), &netns, net)?;
        let cgroup = router.cgroup().child(name)?;
        Ok(Self { netns, cgroup })
    }
}

impl Place for Netns {
    fn client(&self, name: &str) -> Launch {
        Launch::new(name, binary("weir-bench")).in_netns(self)
    }
}

impl PlainPlace {
    /// Where the server is.
    pub(crate) fn server() -> Destination {
        Destination {
            address: SocketAddr::new(IpAddr::from([10, 200, 2, 2]), PORT),
            answer: PLAIN,
        }
    }

    pub(crate) fn make() -> Result<Self> {
        let router = Machine::new("router")?;
        router.netns().set_sysctl("net.ipv4.ip_forward", "1")?;
        let client = PlainPod::new(&router, "client", "10.200.1")?;
        give_ports(&client.netns)?;
        let server_pod = PlainPod::new(&router, "server", "10.200.2")?;
        let server = serve(server_pod.client("serve"), router.dir(), PLAIN)?;
        Ok(Self {
            _server: server,
            client,
            _server_pod: server_pod,
            router,
        })
    }

    fn log(&self) -> PathBuf {
        self.router.dir().join("measure.log")
    }
}

/// Puts a namespace behind a router, as host 2 of a network of 24 bits, `10.200.1`, of which the router is host 1.
pub(crate) fn behind(router: &Netns, host: &Netns, net: &str) -> Result<()> {
    netns::link(
        End {
            netns: host,
            device: "eth0",
            addresses: &[&format!("{net}.2/24")],
        },
        End {
            netns: router,
            device: &format!("to-{}", net.replace('.', "-")),
            addresses: &[&format!("{net}.1/24")],
        },
    )?;
    host.add_route("default", format!("{net}.1").parse()?)
}

pub(crate) fn serve(launch: Launch, dir: &std::path::Path, answer: u8) -> Result<Process> {
    let mut server = launch
        .args(["serve", "--cpu", CPU, "--port", &PORT.to_string()])
        .args(["--answer", &answer.to_string()])
        .log_to(&dir.join("serve.log"))
        .spawn()?;
    server.wait_for_log("ready", Duration::from_secs(10))?;
    Ok(server)
}

fn service_yaml(name: &str, address: &str, app: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: bench}}\n\
         spec: {{clusterIP: {address}, selector: {{app: {app}}}, \
         ports: [{{name: tcp, port: {PORT}}}, {{name: udp, port: {PORT}, protocol: UDP}}]}}\n"
    )
}

pub(crate) const POLICY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
    metadata: {name: bench, namespace: bench}\nspec:\n  podSelector: {}\n  \
    policyTypes: [Ingress, Egress]\n  ingress: [{from: [{podSelector: {}}]}]\n  \
    egress: [{to: [{podSelector: {}}]}]\n";

/// Row 1: through a service at the socket, against the pod's own address.
pub(crate) fn service_at_the_socket(length: Length) -> Result<Vec<Row>> {
    let place = WeirPlace::make(OTHER_SERVICES)?;
    let direct = place.direct()?;
    let service = WeirPlace::at(SocketAddr::new(IpAddr::from([10, 96, 0, 77]), PORT));
    let log = place.log();
    let mut rows = Vec::new();
    for (what, name, most) in [
        (
            Transaction::TcpCrr,
            "connect/request/close through a service ÷ direct",
            1.015,
        ),
        (
            Transaction::TcpRr,
            "request/response through a service ÷ direct",
            1.005,
        ),
    ] {
        let mut arms: Vec<Arm<'_>> = [
            ("direct", direct),
            ("service", service),
            ("control", direct),
        ]
        .into_iter()
        .map(|(arm, target)| Arm {
            name: arm,
            run: Box::new({
                let (client, log) = (&place.client, &log);
                move || measure(client, log, what, target, length.transactions)
            }),
        })
        .collect();
        let rounds = interleave(length.rounds, &mut arms)?;
        rows.push(row(
            1,
            name,
            &rounds,
            "service",
            "direct",
            Target::Ratio(most),
        )?);
    }
    let mut arms: Vec<Arm<'_>> = [
        ("direct", direct),
        ("service", service),
        ("control", direct),
    ]
    .into_iter()
    .map(|(arm, target)| Arm {
        name: arm,
        run: Box::new({
            let (client, log) = (&place.client, &log);
            move || {
                measure(
                    client,
                    log,
                    Transaction::UdpConnect,
                    target,
                    length.transactions * 5,
                )
            }
        }),
    })
    .collect();
    let rounds = interleave(length.rounds, &mut arms)?;
    let mut connect = row(
        1,
        "connect() of a datagram socket to a service, at 10,000 services",
        &rounds,
        "service",
        "direct",
        Target::ExtraNanos(300),
    )?;
    connect.note = "both arms run the socket hook; the extra is that of a hit over a miss".into();
    rows.push(connect);
    Ok(rows)
}

/// Row 3: two pods of a node with everything on, against plain kernel routing.
pub(crate) fn everything_on(length: Length) -> Result<Vec<Row>> {
    let weir = WeirPlace::make(0)?;
    let plain = PlainPlace::make()?;
    let (weir_log, plain_log) = (weir.log(), plain.log());
    let weir_target = weir.direct()?;
    let plain_target = PlainPlace::server();
    let mut rows = Vec::new();
    for (what, name) in [
        (
            Transaction::TcpCrr,
            "connect/request/close, everything on ÷ plain routing",
        ),
        (
            Transaction::TcpRr,
            "request/response, everything on ÷ plain routing",
        ),
        (
            Transaction::UdpRr,
            "datagram request/response, everything on ÷ plain routing",
        ),
    ] {
        let (weir, plain) = (&weir.client, &plain.client);
        let (weir_log, plain_log) = (&weir_log, &plain_log);
        let count = length.transactions;
        let mut arms = [
            Arm {
                name: "plain",
                run: Box::new(move || measure(plain, plain_log, what, plain_target, count)),
            },
            Arm {
                name: "weir",
                run: Box::new(move || measure(weir, weir_log, what, weir_target, count)),
            },
            Arm {
                name: "control",
                run: Box::new(move || measure(plain, plain_log, what, plain_target, count)),
            },
        ];
        let rounds = interleave(length.rounds, &mut arms)?;
        rows.push(row(3, name, &rounds, "weir", "plain", Target::Ratio(0.97))?);
    }
    Ok(rows)
}

fn row(
    number: u32,
    claim: &str,
    rounds: &Rounds,
    arm: &str,
    base: &str,
    target: Target,
) -> Result<Row> {
    let arms = Compared {
        arm,
        base,
        control: "control",
    };
    compare(number, claim, rounds, arms, Some(target))
}

/// Arms of a comparison by their names: ours, the peer, and the peer again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compared<'a> {
    pub(crate) arm: &'a str,
    pub(crate) base: &'a str,
    pub(crate) control: &'a str,
}

pub(crate) fn compare(
    number: u32,
    claim: &str,
    rounds: &Rounds,
    Compared { arm, base, control }: Compared<'_>,
    target: Option<Target>,
) -> Result<Row> {
    Ok(Row {
        number,
        claim: claim.to_owned(),
        peer: base.to_owned(),
        ours_p01_ns: median(rounds, arm, |l| l.p01)?,
        peer_p01_ns: median(rounds, base, |l| l.p01)?,
        ours_p50_ns: median(rounds, arm, |l| l.p50)?,
        peer_p50_ns: median(rounds, base, |l| l.p50)?,
        ours_p99_ns: median(rounds, arm, |l| l.p99)?,
        peer_p99_ns: median(rounds, base, |l| l.p99)?,
        ratio_p01: ratio(rounds, arm, base, |l| l.p01)?,
        ratio_p50: ratio(rounds, arm, base, |l| l.p50)?,
        control_p01: Some(ratio(rounds, control, base, |l| l.p01)?),
        target,
        note: String::new(),
    })
}
