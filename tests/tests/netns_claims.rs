//! Ring 4: addresses that a Service asks for and should not get: another Service's, those of the world, a load
//! balancer's whose clients are restricted. Real sockets; what claims decide in detail is in `golden/claims`.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::net::SocketAddr;
use std::time::Duration;

use weir_tests::netns::{End, Netns, link};
use weir_tests::node::{Node, NodeOptions, Pod, binary};
use weir_tests::process::{Launch, Process};
use weir_tests::traffic::{Answer, PATIENCE, ask_tcp, eventually};
use weir_tests::workloads::{Transport, Workload};

/// The cluster IP of `web`, which others want.
const WEB: &str = "10.96.0.80:80";
const THIEF: &str = "10.96.0.66:80";
/// A server of the world, which knows nothing of the cluster.
const SERVER: &str = "198.51.100.1:8080";
const BALANCED: &str = "192.0.2.50:80";
/// How long the agent may take to see a manifest and write its rows.
const SOON: Duration = Duration::from_secs(3);
/// Longer than a request that is answered takes; shorter ones are refused.
const BRIEFLY: Duration = Duration::from_millis(700);

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A Service whose endpoints are the pods of its name.
fn service(name: &str, ip: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  \
         clusterIPs: ['{ip}']\n  selector: {{role: {name}}}\n  ports: [{{port: 80, targetPort: 8080}}]\n{spec}"
    )
}

fn pod(node: &Node, name: &str, role: &str) -> Pod {
    let pod = Workload::named("shop", name)
        .label("role", role)
        .port(Transport::Tcp, 8080);
    node.run_pod(pod).unwrap()
}

fn by(name: &str) -> Answer {
    Answer::By(name.to_owned())
}

fn problem(node: &Node, service: &str, address: &str) -> Option<String> {
    let rows = node.ask("services").unwrap();
    let rows = rows.as_array().unwrap().clone();
    let mut rows = rows.into_iter();
    let row = rows.find(|row| row["service"] == service && row["address"] == address);
    row?["problem"].as_str().map(ToOwned::to_owned)
}

#[test]
fn a_service_that_names_anothers_address_gets_nothing_of_it_and_stops_nobody() {
    let mut options = NodeOptions::named("thief");
    options.agent_args = ["--external-ip-range", "10.96.0.0/16"]
        .map(Into::into)
        .into();
    let mut node = Node::start(options).unwrap();
    let thief = service("a-thief", "10.96.0.66", "  externalIPs: ['10.96.0.80']\n");
    let web = service("web", "10.96.0.80", "");
    let client = pod(&node, "client", "client");
    let _backends = [pod(&node, "thief-0", "a-thief"), pod(&node, "web-0", "web")];
    // He was there first, and has it while it is nobody's.
    node.write_manifest("a-thief.yaml", &thief).unwrap();
    let ask = |target| ask_tcp(client.netns(), at(target), PATIENCE);
    eventually(
        "the address is given",
        SOON,
        || ask(WEB),
        |it| *it == by("thief-0"),
    )
    .unwrap();

    node.write_manifest("web.yaml", &web).unwrap();
    eventually(
        "its own Service has it",
        SOON,
        || ask(WEB),
        |it| *it == by("web-0"),
    )
    .unwrap();
    let belongs = Some("belongs to shop/web".to_owned());
    for round in 0..2 {
        for _ in 0..50 {
            assert_eq!(ask(WEB), by("web-0"), "round {round}");
            assert_eq!(ask(THIEF), by("thief-0"), "round {round}");
        }
        let new = pod(&node, &format!("new-{round}"), "new");
        assert_eq!(ask_tcp(new.netns(), at(WEB), PATIENCE), by("web-0"));
        assert_eq!(node.readyz(), "ok", "round {round}");
        assert_eq!(problem(&node, "shop/a-thief", WEB), belongs);
        // An agent that starts with both there gives nothing to the other.
        node.kill_agent().unwrap();
        node.start_agent().unwrap();
        node.wait_ready().unwrap();
    }

    std::fs::remove_file(node.manifests().join("web.yaml")).unwrap();
    eventually(
        "it is free again",
        SOON,
        || ask(WEB),
        |it| *it == by("thief-0"),
    )
    .unwrap();
}

/// A node with the world behind it.
struct Site {
    // Processes end before the namespaces that they are in.
    _server: Process,
    client: Pod,
    _backend: Pod,
    node: Node,
    world: Netns,
}

impl Site {
    fn new(name: &str) -> Self {
        let mut node = Node::prepare(NodeOptions::named(name)).unwrap();
        let world = Netns::new("world").unwrap();
        let netns = node.machine().netns();
        link(
            End {
                netns,
                device: "eth0",
                addresses: &["198.51.100.2/24"],
            },
            End {
                netns: &world,
                device: "node",
                addresses: &["198.51.100.1/24"],
            },
        )
        .unwrap();
        netns.ip("route del default").unwrap();
        netns
            .add_route("default", "198.51.100.1".parse().unwrap())
            .unwrap();
        // The load balancer leads to the node.
        world
            .add_route("192.0.2.50/32", "198.51.100.2".parse().unwrap())
            .unwrap();
        let mut server = Launch::new("server", binary("weir-echo"))
            .in_netns(&world)
            .log_to(&node.machine().dir().join("world.log"))
            .args(["--name", "world", "--tcp", "8080"])
            .spawn()
            .unwrap();
        server.wait_for_log("ready", PATIENCE).unwrap();
        node.start_agent().unwrap();
        node.start_dns().unwrap();
        node.wait_ready().unwrap();
        Self {
            client: pod(&node, "client", "client"),
            _backend: pod(&node, "web-0", "web"),
            _server: server,
            node,
            world,
        }
    }
}

#[test]
fn nobody_gets_what_pods_send_to_the_world_by_naming_an_external_ip() {
    let site = Site::new("external");
    let ask = || ask_tcp(site.client.netns(), at(SERVER), PATIENCE);
    assert_eq!(ask(), by("world"));
    let named = "  externalIPs: ['198.51.100.1']\n";
    let text = service("web", "10.96.0.80", named).replace("port: 80,", "port: 8080,");
    site.node.write_manifest("web.yaml", &text).unwrap();
    site.node.wait_for_service("shop/web", 1, SOON).unwrap();
    for _ in 0..50 {
        assert_eq!(ask(), by("world"));
    }
    let own = "10.96.0.80:8080";
    assert_eq!(ask_tcp(site.client.netns(), at(own), PATIENCE), by("web-0"));
    assert_eq!(site.node.readyz(), "ok");
}

#[test]
fn a_load_balancer_whose_clients_are_restricted_is_closed_and_one_of_everybody_is_not() {
    let site = Site::new("ranges");
    let outside = |within| ask_tcp(&site.world, at(BALANCED), within);
    let inside = |within| ask_tcp(site.client.netns(), at(BALANCED), within);
    let web = |ranges: &str| {
        let spec = format!(
            "  type: LoadBalancer\n{ranges}\
             status: {{loadBalancer: {{ingress: [{{ip: 192.0.2.50}}]}}}}\n"
        );
        site.node
            .write_manifest("web.yaml", &service("web", "10.96.0.80", &spec))
            .unwrap();
    };
    let restricted = "  loadBalancerSourceRanges: [203.0.113.0/24]\n";
    let everybody = "  loadBalancerSourceRanges: [203.0.113.0/24, 0.0.0.0/0]\n";
    for (open, closed) in [("", restricted), (everybody, restricted)] {
        web(open);
        eventually("open", SOON, || outside(PATIENCE), |it| *it == by("web-0")).unwrap();
        assert_eq!(inside(PATIENCE), by("web-0"));
        web(closed);
        eventually("closed", SOON, || outside(BRIEFLY), |it| *it != by("web-0")).unwrap();
        for _ in 0..5 {
            assert_ne!(outside(BRIEFLY), by("web-0"));
            assert_ne!(inside(BRIEFLY), by("web-0"));
        }
        assert_eq!(ask_tcp(site.client.netns(), at(WEB), PATIENCE), by("web-0"));
        assert_eq!(site.node.readyz(), "ok");
    }
}
