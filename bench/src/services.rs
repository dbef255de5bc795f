//! Rows 2 and 4 of the targets: a Service in the cluster, and one from outside by its node port, beside kube-proxy in
//! nftables mode. The same Services on both sides, two pods of one node each, and a client on a wire to the node.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use weir_common::event::Hook;
use weir_common::way::Way;
use weir_tests::netns::Netns;
use weir_tests::node::{Node, NodeOptions};

use crate::exchange::{Destination, Transaction};
use crate::kube_proxy::{KubeProxyPlace, conntrack};
use crate::paths::{
    Compared, Length, POLICY, PORT, Place, PlainPlace, WeirPlace, behind, compare, give_ports,
    measure, witness,
};
use crate::report::{Row, Target};
use crate::rounds::{Arm, Rounds, interleave};
use crate::tables::Tables;

/// The Service that is measured, with its node port.
const SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 77), PORT);
const NODE_PORT: u16 = 30_077;
/// The same with `externalTrafficPolicy: Local`: kube-proxy leaves the client's address as it is, too.
const LOCAL: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 78), PORT);
const LOCAL_NODE_PORT: u16 = 30_078;
/// The network of the client outside; the node is its first host.
const OUTSIDE: &str = "10.200.9";
const NODE: Ipv4Addr = Ipv4Addr::new(10, 200, 9, 1);
const SETTLE: Duration = Duration::from_secs(30);

/// What clients of pods and from outside may do; a port is named, so that there is something to judge.
const OPEN_POLICY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
    metadata: {name: bench, namespace: bench}\nspec:\n  podSelector: {}\n  \
    policyTypes: [Ingress, Egress]\n  ingress: [{ports: [{port: 7777, protocol: TCP}]}]\n  \
    egress: [{to: [{podSelector: {}}]}]\n";

/// A Service before the server, of one TCP port.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) address: SocketAddrV4,
    /// With its `externalTrafficPolicy`.
    node_port: Option<(u16, &'static str)>,
}

impl Service {
    /// Its object, as an API server has it.
    pub(crate) fn object(&self) -> Value {
        let mut port = json!({
            "name": "tcp",
            "protocol": "TCP",
            "port": self.address.port(),
            "targetPort": PORT,
        });
        let mut spec = json!({
            "type": "ClusterIP",
            "clusterIP": self.address.ip(),
            "clusterIPs": [self.address.ip()],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None",
            "selector": {"app": "server"},
        });
        if let Some((number, policy)) = self.node_port {
            port["nodePort"] = json!(number);
            spec["type"] = json!("NodePort");
            spec["externalTrafficPolicy"] = json!(policy);
        }
        spec["ports"] = json!([port]);
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": "bench", "uid": self.name},
            "spec": spec,
        })
    }
}

/// The Services that are measured, and that many others.
fn services(others: usize) -> Result<Vec<Service>> {
    let named = [
        ("server", SERVER, (NODE_PORT, "Cluster")),
        ("local", LOCAL, (LOCAL_NODE_PORT, "Local")),
    ];
    let measured = named.map(|(name, address, node_port)| Service {
        name: name.to_owned(),
        address,
        node_port: Some(node_port),
    });
    let first = Ipv4Addr::new(10, 96, 1, 0).to_bits();
    let others = (0..u32::try_from(others)?).map(|n| Service {
        name: format!("other-{n}"),
        address: SocketAddrV4::new(Ipv4Addr::from_bits(first + n), PORT),
        node_port: None,
    });
    Ok(measured.into_iter().chain(others).collect())
}

/// Weir's side, with the last of the Services in its tables.
fn weir(node: Node, services: &[Service], policies: &str) -> Result<(WeirPlace, Tables)> {
    let manifests: Vec<String> = services.iter().map(|it| it.object().to_string()).collect();
    let place = WeirPlace::on(node, &manifests.join("\n---\n"), policies)?;
    let tables = Tables::open(&place.node.machine().bpffs().path().join("weir"))?;
    eventually("every Service is in the tables", || {
        for service in services {
            let row = tables.frontend(*service.address.ip(), service.address.port())?;
            if row.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    let row = tables.frontend(*SERVER.ip(), PORT)?.context("a row")?;
    let server = server_of(&place)?;
    if tables.place_of(&row, *server.ip())?.is_none() {
        bail!("{SERVER} does not lead to {server} in the tables");
    }
    Ok((place, tables))
}

fn server_of(place: &WeirPlace) -> Result<SocketAddrV4> {
    match place.direct()?.address {
        SocketAddr::V4(address) => Ok(address),
        SocketAddr::V6(address) => bail!("{address} is not of IPv4"),
    }
}

fn eventually(what: &str, is_so: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SETTLE;
    while !is_so()? {
        if Instant::now() > deadline {
            bail!("not within {SETTLE:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// One side of a comparison: from where, to where.
struct Side<'a> {
    name: &'static str,
    from: &'a dyn Place,
    to: Destination,
}

/// Measures sides in turn, all from the same log's folder.
fn measured<'a>(
    length: Length,
    log: &'a Path,
    what: Transaction,
    sides: Vec<Side<'a>>,
) -> Result<Rounds> {
    let mut arms: Vec<Arm<'a>> = sides
        .into_iter()
        .map(|Side { name, from, to }| Arm {
            name,
            run: Box::new(move || measure(from, log, what, to, length.transactions)),
        })
        .collect();
    interleave(length.rounds, &mut arms)
}

/// What a comparison is of, in its order: the kernel remembers closed connections for a while, so what opens many of them
/// is last.
const WHAT: [(Transaction, &str); 2] = [
    (Transaction::TcpRr, "request/response"),
    (Transaction::TcpCrr, "connect/request/close"),
];

/// Both sides, and where each of them is asked.
struct Sides<'a> {
    weir: &'a WeirPlace,
    tables: &'a Tables,
    log: &'a Path,
    peer: &'a KubeProxyPlace,
}

impl Sides<'_> {
    /// That a connection of Weir's client has a way at this hook from an address to the server, which counts what passes,
    /// and that a policy has allowed it where the server's pod begins.
    fn has_way(
        &self,
        from: &dyn Place,
        to: SocketAddrV4,
        hook: Hook,
        arrives: SocketAddrV4,
    ) -> Result<()> {
        let server = server_of(self.weir)?;
        witness(from, self.log, WeirPlace::at(to.into()), || {
            let ways = self.tables.ways(hook, arrives, server)?;
            let counts = |way: &Way| way.packets.load(Relaxed) > 1_000;
            let mut judged = self.tables.ways(Hook::FROM_POD, server, server)?;
            judged.extend(self.tables.ways(Hook::TO_POD, server, server)?);
            let is_allowed = |way: &Way| way.ingress_rule.load(Relaxed) != 0;
            Ok(ways.iter().any(counts) && judged.iter().any(is_allowed))
        })
        .with_context(|| format!("the way of Weir to {to}"))
    }

    /// That a connection of the peer's client is translated by kube-proxy's rules.
    fn is_translated(&self, from: &dyn Place, to: SocketAddrV4) -> Result<()> {
        witness(from, self.log, KubeProxyPlace::at(to), || {
            Ok(self.peer.translated(to)? > 0)
        })
        .with_context(|| format!("kube-proxy's rules for {to}"))
    }

    /// That what was measured has gone where it should: each connection to the peer is remembered by its kernel, and
    /// none by the kernel of Weir's node. Returns what was seen, in words.
    fn verify(
        &self,
        what: Transaction,
        length: Length,
        at_peer: &[SocketAddrV4],
    ) -> Result<String> {
        let least = match what {
            Transaction::TcpCrr => length.transactions,
            _ => 1,
        };
        let mut seen = Vec::new();
        for to in at_peer {
            let translated = self.peer.translated(*to)?;
            if translated < least {
                bail!(
                    "kube-proxy translated {translated} connections to {to}, of {least} at least"
                );
            }
            seen.push(format!("{translated} connections to {to}"));
        }
        let tracked = conntrack(self.weir.node.machine().netns())?.len();
        if tracked > 0 {
            bail!("the kernel tracks {tracked} connections of Weir's node");
        }
        Ok(format!(
            "conntrack has {} on kube-proxy's node, none on Weir's",
            seen.join(" and ")
        ))
    }
}

/// Row 2: from a pod to a cluster IP whose backend is another pod of the node, everything on, against kube-proxy.
pub(crate) fn beside_kube_proxy(length: Length, others: usize, program: &Path) -> Result<Vec<Row>> {
    let services = services(others)?;
    let peer = KubeProxyPlace::make(program, &services, OUTSIDE, NODE)?;
    peer.leads_to_server(SERVER)?;
    let node = Node::start(NodeOptions::named("bench"))?;
    let (weir, tables) = weir(node, &services, POLICY)?;
    let log = weir.log();
    let sides = Sides {
        weir: &weir,
        tables: &tables,
        log: &log,
        peer: &peer,
    };
    // The socket has replaced the address before there was a packet.
    let arrives = server_of(&weir)?;
    sides.has_way(&weir.client, SERVER, Hook::FROM_POD, arrives)?;
    sides.is_translated(peer.client(), SERVER)?;
    let side = |name| Side {
        name,
        from: peer.client(),
        to: KubeProxyPlace::at(SERVER),
    };
    let mut rows = Vec::new();
    for (what, name) in WHAT {
        let arms = vec![
            side("kube-proxy"),
            Side {
                name: "weir",
                from: &weir.client,
                to: WeirPlace::at(SERVER.into()),
            },
            side("control"),
        ];
        let rounds = measured(length, &log, what, arms)?;
        let seen = sides.verify(what, length, &[SERVER])?;
        let most = match what {
            Transaction::TcpCrr => 0.80,
            _ => 0.85,
        };
        let mut row = compare(
            2,
            &format!("{name} to a cluster IP, everything on ÷ kube-proxy in nftables mode"),
            &rounds,
            Compared {
                arm: "weir",
                base: "kube-proxy",
                control: "control",
            },
            Some(Target::Ratio(most)),
        )?;
        row.note = format!("{} services on both sides; {seen}", services.len());
        rows.push(row);
    }
    peer.leads_to_server(SERVER)?;
    peer.end()?;
    Ok(rows)
}

/// A node with a client on a wire to it, ready.
fn node_with_outside() -> Result<(Node, Netns)> {
    let mut node = Node::prepare(NodeOptions::named("bench"))?;
    let outside = Netns::new("outside")?;
    let netns = node.machine().netns();
    behind(netns, &outside, OUTSIDE)?;
    netns.ip("route del default")?;
    netns.add_route("default", format!("{OUTSIDE}.2").parse()?)?;
    node.start_agent()?;
    node.start_dns()?;
    node.wait_ready()?;
    eventually("the uplink has its programs", || {
        let verify = node.ask("verify")?;
        let hooks = verify["hooks"].as_array().context("a list of hooks")?;
        let is_one = |hook: &&Value| {
            let name = hook["hook"].as_str();
            hook["problem"].is_null() && name.is_some_and(|it| it.starts_with("uplink-"))
        };
        Ok(hooks.iter().filter(is_one).count() == 2)
    })?;
    Ok((node, outside))
}

/// What the node port is compared with: the arm, the arm once more, what it is, and the most of request/response.
const PEERS: [(&str, &str, &str, Option<f64>); 4] = [
    (
        "direct",
        "direct again",
        "the pod's own address",
        Some(1.05),
    ),
    (
        "kube-proxy",
        "kube-proxy again",
        "kube-proxy in nftables mode",
        Some(0.80),
    ),
    (
        "local",
        "local again",
        "the same with externalTrafficPolicy: Local",
        None,
    ),
    (
        "plain",
        "plain again",
        "the pod's address by plain routing",
        None,
    ),
];

/// Row 4: from outside to a node port whose backend is a pod of the node, against the pod itself and against kube-proxy.
pub(crate) fn node_port(length: Length, others: usize, program: &Path) -> Result<Vec<Row>> {
    let services = services(others)?;
    let peer = KubeProxyPlace::make(program, &services, OUTSIDE, NODE)?;
    peer.leads_to_server(SERVER)?;
    let (node, outside) = node_with_outside()?;
    give_ports(&outside)?;
    let (weir, tables) = weir(node, &services, OPEN_POLICY)?;
    let log = weir.log();
    let to_weir = |name, to| Side {
        name,
        from: &outside,
        to,
    };
    let port = |number| SocketAddrV4::new(NODE, number);
    let sides = Sides {
        weir: &weir,
        tables: &tables,
        log: &log,
        peer: &peer,
    };
    // What there is without either: how far the ratio to kube-proxy could go by routing alone.
    let plain = PlainPlace::make()?;
    let plain_outside = Netns::new("outside")?;
    behind(plain.router.netns(), &plain_outside, OUTSIDE)?;
    give_ports(&plain_outside)?;
    let to_plain = |name| Side {
        name,
        from: &plain_outside,
        to: PlainPlace::server(),
    };
    let asked = port(NODE_PORT);
    sides.has_way(&outside, asked, Hook::FROM_NET, asked)?;
    for number in [NODE_PORT, LOCAL_NODE_PORT] {
        sides.is_translated(peer.outside(), port(number))?;
    }
    let to_peer = |name, number| Side {
        name,
        from: peer.outside(),
        to: KubeProxyPlace::at(port(number)),
    };
    let mut rows = Vec::new();
    for (what, name) in WHAT {
        let arms = vec![
            to_plain("plain"),
            to_weir("direct", weir.direct()?),
            to_peer("kube-proxy", NODE_PORT),
            to_weir("weir", WeirPlace::at(port(NODE_PORT).into())),
            to_peer("local", LOCAL_NODE_PORT),
            to_plain("plain again"),
            to_weir("direct again", weir.direct()?),
            to_peer("kube-proxy again", NODE_PORT),
            to_peer("local again", LOCAL_NODE_PORT),
        ];
        let rounds = measured(length, &log, what, arms)?;
        let seen = sides.verify(what, length, &[port(NODE_PORT), port(LOCAL_NODE_PORT)])?;
        let is_target = what == Transaction::TcpRr;
        let first = rows.len();
        for (base, again, is, most) in PEERS {
            let arms = Compared {
                arm: "weir",
                base,
                control: again,
            };
            let target = most.filter(|_| is_target).map(Target::Ratio);
            let claim = format!("{name} from outside to a node port ÷ {is}");
            rows.push(compare(4, &claim, &rounds, arms, target)?);
        }
        rows[first].note = format!("{} services on both sides; {seen}", services.len());
    }
    peer.leads_to_server(SERVER)?;
    peer.end()?;
    Ok(rows)
}
