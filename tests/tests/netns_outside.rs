//! Ring 4: what may come in by the wire, and how long it may be silent: an address of the node or of its pods as a source, and
//! connections of which one half is closed.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use weir_tests::lan::Pair;
use weir_tests::machine::Machine;
use weir_tests::netns::Netns;
use weir_tests::node::Family;
use weir_tests::traffic::{Answer, PATIENCE, ask_udp, drops, eventually, udp_socket};
use weir_tests::workloads::{Transport, Workload};

const WORLD: [&str; 2] = ["10.210.0.200", "fd00:210::200"];
/// Longer than a sweep of conversations takes to come round, and than a closed connection is kept.
const SILENCE: Duration = Duration::from_secs(40);

/// Two nodes, and a machine beside them.
fn site(name: &str) -> (Pair, Machine) {
    let pair = Pair::start(name).unwrap();
    let world = Machine::new("world").unwrap();
    let [v4, v6] = WORLD;
    let addresses = [format!("{v4}/24"), format!("{v6}/64")];
    pair.lan
        .plug(&world, &addresses.each_ref().map(String::as_str))
        .unwrap();
    (pair, world)
}

/// IPv6 has no filter of reverse paths: whatever source a packet has, it comes as far as the pod's device.
#[test]
fn whose_address_comes_in_by_the_wire_is_nobody_of_this_node() {
    let (pair, world) = site("spoofed");
    let node = &pair.nodes[0];
    let closed = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed, namespace: shop}\n\
                  spec: {podSelector: {matchLabels: {app: closed}}, policyTypes: [Ingress]}\n";
    pair.write_manifest("closed.yaml", closed).unwrap();
    let run = |name| {
        let pod = Workload::named("shop", name).port(Transport::Udp, 8081);
        pair.run_pod(0, pod).unwrap()
    };
    let (pod, other) = (run("closed"), run("other"));
    let target = SocketAddr::new(pod.address(Family::V6).unwrap(), 8081);
    let own = pair.places[0].address(Family::V6).unwrap();
    // The node reaches its pods whatever policy says, and nobody else does.
    let ask = || ask_udp(node.machine().netns(), target, PATIENCE);
    assert_eq!(ask(), Answer::By("closed".into()));
    let range = &pair.places[0].pod_cidrs[1];
    world
        .netns()
        .ip(&format!("-6 route add {range} via {own}"))
        .unwrap();
    for (claims, reason) in [
        (WORLD[1].parse().unwrap(), "ingress_denied"),
        (own, "ingress_denied"),
        (other.address(Family::V6).unwrap(), "spoofed_address"),
    ] {
        let claims: IpAddr = claims;
        if claims != WORLD[1].parse::<IpAddr>().unwrap() {
            let add = format!("-6 addr add {claims}/128 dev lo nodad");
            world.netns().ip(&add).unwrap();
        }
        let before = drops(node, reason).unwrap();
        let socket = udp_socket(world.netns(), SocketAddr::new(claims, 0), PATIENCE).unwrap();
        socket.send_to(b"who", target).unwrap();
        let many = || drops(node, reason).unwrap() - before;
        let name = format!("{claims} is dropped as {reason}");
        eventually(&name, PATIENCE, many, |many| *many == 1).unwrap();
    }
}

/// Reads all that its one client says, works for a while, and answers.
fn serve(netns: &Netns, at: SocketAddr) {
    let listener = netns.run(move || TcpListener::bind(at)).unwrap().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut asked = Vec::new();
        stream.read_to_end(&mut asked).unwrap();
        thread::sleep(SILENCE);
        stream.write_all(&asked).unwrap();
    });
}

/// Says all, and waits for the answer.
fn ask(netns: &Netns, target: SocketAddr) -> Vec<u8> {
    let connect = move || TcpStream::connect_timeout(&target, PATIENCE);
    let mut stream = netns.run(connect).unwrap().unwrap();
    stream.set_read_timeout(Some(SILENCE + PATIENCE)).unwrap();
    stream.write_all(b"all").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

/// From outside through a node port to a pod here and one on the other node, and from a pod to outside. Seen failing with a sweep
/// that takes one goodbye for the end, as it was up to b7e7e40.
#[test]
fn a_half_closed_connection_may_be_silent_for_longer_than_a_sweep() {
    let (pair, world) = site("half");
    let pods = [0, 1].map(|on| {
        pair.run_pod(on, Workload::named("shop", &format!("web{on}")))
            .unwrap()
    });
    let mut asked = Vec::new();
    for (on, pod) in pods.iter().enumerate() {
        let node_port = 30_080 + on as u16;
        let ip = pod.address(Family::V4).unwrap();
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web{on}, namespace: shop}}\nspec:\n  type: NodePort\n  \
             clusterIP: 10.96.0.4{on}\n  ports: [{{port: 80, targetPort: 8080, nodePort: {node_port}}}]\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web{on}-1, namespace: shop, \
             labels: {{kubernetes.io/service-name: web{on}}}}}\naddressType: IPv4\n\
             endpoints: [{{addresses: ['{ip}'], nodeName: {}, conditions: {{ready: true}}}}]\n\
             ports: [{{port: 8080}}]\n",
            pair.places[on].name
        );
        pair.write_manifest(&format!("web{on}.yaml"), &text)
            .unwrap();
        serve(pod.netns(), SocketAddr::new(ip, 8080));
        let name = format!("shop/web{on}");
        pair.nodes[0].wait_for_service(&name, 1, PATIENCE).unwrap();
        asked.push((
            world.netns(),
            pair.on_node(0, Family::V4, node_port).unwrap(),
        ));
    }
    let outside = SocketAddr::new(WORLD[0].parse().unwrap(), 8080);
    serve(world.netns(), outside);
    asked.push((pods[0].netns(), outside));
    let answers: Vec<_> = thread::scope(|scope| {
        let all = asked
            .into_iter()
            .map(|(netns, target)| scope.spawn(move || ask(netns, target)));
        let all: Vec<_> = all.collect();
        all.into_iter().map(|it| it.join().unwrap()).collect()
    });
    assert_eq!(answers, [b"all"; 3]);
}
