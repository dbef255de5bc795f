//! Ring 4: what the kernel makes of packets before and behind the programs: headers that are not where programs read,
//! segments that are merged, ones longer than an IP packet can say. Every byte is looked at.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::io::IoSliceMut;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recv, recvmsg, send,
    setsockopt, socket, sockopt,
};
use weir_tests::echoes::{bytes, datagrams_come_back, serve, stream_comes_back};
use weir_tests::netns::{End, Netns, link};
use weir_tests::node::{Family, Node, NodeOptions, Pod};
use weir_tests::tap::Cable;
use weir_tests::traffic::{PATIENCE, any, drops, eventually, is_echoed, recent_drops, udp_socket};
use weir_tests::workloads::Workload;

/// The node's ends of the uplink, and the world's.
const NODE: [&str; 2] = ["198.51.100.2/24", "2001:db8:1::2/64"];
const WORLD: [&str; 2] = ["198.51.100.1/24", "2001:db8:1::1/64"];
/// Where everybody echoes, and the node port that leads to a pod there.
const PORT: u16 = 9000;
const NODE_PORT: u16 = 30_090;
/// The same for runs of datagrams.
const RUNS: u16 = 9001;
const NODE_RUNS: u16 = 30_091;
const CLUSTER_IPS: [&str; 2] = ["10.96.0.90", "fd00:10:96::90"];
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// Bytes of datagrams: none, few, a whole packet, and fragments.
const SIZES: [usize; 5] = [0, 1, 1400, 1473, 5000];
/// Bytes of a segment, and of a run of segments that is one packet until it has to be several.
const SEGMENT: usize = 1200;
const RUN: usize = 50 * SEGMENT;

/// What the uplink of a node is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Uplink {
    Veth,
    /// One that delivers headers in pieces.
    Cable,
}

/// A node with an uplink, a pod behind a service and a node port, and what is beyond.
struct Site {
    cable: Option<Cable>,
    node: Node,
    world: Netns,
    server: Pod,
}

fn bare(address: &str) -> &str {
    address.split('/').next().unwrap()
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(bare(address).parse().unwrap(), port)
}

fn set_features(netns: &Netns, device: &str, features: &str) {
    let mut ethtool = netns.command("ethtool");
    ethtool
        .args(["-K", device])
        .args(features.split_whitespace());
    let output = ethtool.output().unwrap();
    assert!(output.status.success(), "{features}: {output:?}");
}

impl Site {
    fn new(name: &str, uplink: Uplink) -> Self {
        let mut node = Node::prepare(NodeOptions::named(name)).unwrap();
        let world = Netns::new("world").unwrap();
        let netns = node.machine().netns();
        let cable = match uplink {
            Uplink::Veth => {
                let end = |netns, addresses| End {
                    netns,
                    device: "eth0",
                    addresses,
                };
                link(end(netns, &NODE), end(&world, &WORLD)).unwrap();
                None
            }
            Uplink::Cable => {
                let cable = Cable::between((netns, "eth0"), (&world, "eth0")).unwrap();
                for (netns, addresses) in [(netns, NODE), (&world, WORLD)] {
                    raise(netns, &addresses);
                }
                Some(cable)
            }
        };
        netns.ip("route del default").unwrap();
        netns.ip("-6 route del default").unwrap();
        for (pods, (ours, theirs)) in node.options.pod_cidrs.iter().zip(NODE.iter().zip(WORLD)) {
            let via = bare(theirs).parse().unwrap();
            netns.add_route("default", via).unwrap();
            world.add_route(pods, bare(ours).parse().unwrap()).unwrap();
        }
        node.start_agent().unwrap();
        node.start_dns().unwrap();
        node.wait_ready().unwrap();
        let server = node.run_pod(Workload::named("shop", "server")).unwrap();
        let [v4, v6] = CLUSTER_IPS;
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: server, namespace: shop}}\nspec:\n  \
             type: NodePort\n  ipFamilyPolicy: RequireDualStack\n  ipFamilies: [IPv4, IPv6]\n  \
             clusterIP: {v4}\n  clusterIPs: ['{v4}', '{v6}']\n  \
             selector: {{app: server}}\n  ports:\n  \
             - {{name: t, port: 90, targetPort: {PORT}, nodePort: {NODE_PORT}, protocol: TCP}}\n  \
             - {{name: u, port: 90, targetPort: {PORT}, nodePort: {NODE_PORT}, protocol: UDP}}\n  \
             - {{name: r, port: 91, targetPort: {RUNS}, nodePort: {NODE_RUNS}, protocol: UDP}}\n"
        );
        node.write_manifest("server.yaml", &text).unwrap();
        node.wait_for_service("shop/server", 1, PATIENCE).unwrap();
        for netns in [server.netns(), &world, node.machine().netns()] {
            serve(netns, PORT).unwrap();
        }
        let site = Self {
            cable,
            node,
            world,
            server,
        };
        let is_there = || {
            let mut reached = NODE.iter().map(|ours| {
                let target = at(ours, NODE_PORT);
                let patience = Duration::from_millis(100);
                datagrams_come_back(&site.world, target, &[1], patience).is_ok()
            });
            reached.all(|is_reached| is_reached)
        };
        eventually("the node port is there", PATIENCE, is_there, |it| *it).unwrap();
        site
    }

    fn server(&self, family: Family) -> SocketAddr {
        (self.server.address(family).unwrap(), PORT).into()
    }

    /// Nothing was dropped but what hosts say to their neighbours.
    fn lost_none(&self) {
        for reason in weir_common::DropReason::ALL {
            let reason = reason.label();
            if ["martian", "not_for_pod"].contains(&reason) {
                continue;
            }
            let many = drops(&self.node, reason).unwrap();
            let recent = recent_drops(&self.node, reason).unwrap();
            assert_eq!(many, 0, "{reason}: {:?}", recent.first());
        }
    }
}

/// Gives a device its addresses, and takes it up.
fn raise(netns: &Netns, addresses: &[&str]) {
    netns
        .set_sysctl("net.ipv6.conf.eth0.accept_dad", "0")
        .unwrap();
    netns.ip("link set eth0 up").unwrap();
    for address in addresses {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        netns
            .ip(&format!("addr add {address} dev eth0 {nodad}"))
            .unwrap();
    }
}

/// Streams and datagrams of all sizes.
fn everything_comes_back(client: &Netns, target: SocketAddr) {
    stream_comes_back(client, target, 200_001, PATIENCE).unwrap();
    datagrams_come_back(client, target, &SIZES, PATIENCE).unwrap();
}

#[test]
fn what_comes_in_pieces_is_translated_and_delivered() {
    let site = Site::new("pieces", Uplink::Cable);
    let pod = site
        .node
        .run_pod(Workload::named("shop", "client"))
        .unwrap();
    let cable = site.cable.as_ref().unwrap();
    let each_family = || FAMILIES.into_iter().zip(NODE.iter().zip(WORLD));
    let merging = ["off", "on"].into_iter();
    for (merging, (family, (ours, theirs))) in
        merging.flat_map(|it| each_family().map(move |of| (it, of)))
    {
        let netns = site.node.machine().netns();
        set_features(netns, "eth0", &format!("gro {merging}"));
        for (client, target) in [
            (&site.world, at(ours, NODE_PORT)),
            (&site.world, site.server(family)),
            // Its answers come in pieces.
            (pod.netns(), at(theirs, PORT)),
        ] {
            let before = cable.arrived();
            everything_comes_back(client, target);
            let arrived = cable.arrived() - before;
            assert!(arrived > 70, "{arrived} frames for {target}");
        }
        let theirs = at(theirs, 0).ip();
        assert!(is_echoed(pod.netns(), theirs, PATIENCE).unwrap());
        let server = site.server(family).ip();
        assert!(is_echoed(&site.world, server, PATIENCE).unwrap());
    }
    site.lost_none();
}

#[test]
fn what_a_pod_sends_in_pieces_is_translated_and_delivered() {
    let site = Site::new("pod-pieces", Uplink::Veth);
    let pod = site
        .node
        .run_pod(Workload::named("shop", "pieces"))
        .unwrap();
    // What the pod sends goes through the cable, and on by its device as it came there.
    let netns = pod.netns();
    let cable = Cable::between((netns, "near"), (netns, "far")).unwrap();
    let shown = netns.ip("-br link show dev eth0").unwrap();
    let mac = shown.split_whitespace().nth(2).unwrap();
    netns.ip(&format!("link set far address {mac}")).unwrap();
    for device in ["near", "far"] {
        netns.ip(&format!("link set {device} up")).unwrap();
    }
    for words in [
        "qdisc add dev near ingress",
        "filter add dev near parent ffff: protocol all u32 match u32 0 0 \
         action mirred egress redirect dev eth0",
    ] {
        let mut tc = netns.command("tc");
        let output = tc.args(words.split_whitespace()).output().unwrap();
        assert!(output.status.success(), "{words}: {output:?}");
    }
    for (family, gateway) in [("-4", "169.254.1.1"), ("-6", "fe80::1")] {
        let known = netns.ip(&format!("neigh show {gateway}")).unwrap();
        let mut words = known.split_whitespace().skip_while(|it| *it != "lladdr");
        let lladdr = words.nth(1).unwrap();
        for words in [
            format!("neigh add {gateway} lladdr {lladdr} dev far nud permanent"),
            format!("{family} route del default"),
            format!("{family} route add default via {gateway} dev far onlink"),
        ] {
            netns.ip(&words).unwrap();
        }
    }
    serve(netns, PORT).unwrap();
    for (number, family) in FAMILIES.into_iter().enumerate() {
        let own = (pod.address(family).unwrap(), PORT).into();
        for (client, target) in [
            (netns, site.server(family)),
            (netns, at(CLUSTER_IPS[number], 90)),
            (netns, at(WORLD[number], PORT)),
            (netns, at(NODE[number], NODE_PORT)),
            (site.server.netns(), own),
            (&site.world, own),
        ] {
            let before = cable.arrived();
            everything_comes_back(client, target);
            let arrived = cable.arrived() - before;
            assert!(arrived > 70, "{arrived} frames for {target}");
        }
        for target in [site.server(family), at(WORLD[number], 0)] {
            assert!(is_echoed(netns, target.ip(), PATIENCE).unwrap());
        }
    }
    site.lost_none();
}

/// `PACKET_HOST`.
const HOST: u8 = 0;

/// What the devices of a namespace receive, to be looked at afterwards.
struct Watched(OwnedFd);

impl Watched {
    fn new(netns: &Netns) -> Self {
        let watch = || {
            let (family, kind) = (AddressFamily::Packet, SockType::Raw);
            socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        };
        let watched = netns.run(watch).unwrap().unwrap();
        // For everything that comes until somebody looks.
        setsockopt(&watched, sockopt::RcvBufForce, &(64 << 20)).unwrap();
        Self(watched)
    }

    /// The length of the longest frame.
    fn longest(self) -> usize {
        let mut longest = 0;
        loop {
            let mut start = [0; 16];
            let mut start = [IoSliceMut::new(&mut start)];
            // Its whole length, however much of it there is room for. What was sent is there, too.
            let flags = MsgFlags::MSG_TRUNC | MsgFlags::MSG_DONTWAIT;
            match recvmsg::<LinkAddr>(self.0.as_raw_fd(), &mut start, None, flags) {
                Ok(frame) if frame.address.is_some_and(|it| it.pkttype() == HOST) => {
                    longest = frame.bytes.max(longest);
                }
                Ok(_) => {}
                Err(_) => return longest,
            }
        }
    }
}

/// Between whom packets go, who receives them, and whether an uplink is on the way.
struct Path<'a> {
    client: &'a Netns,
    /// The ports of streams, and of runs of datagrams.
    target: IpAddr,
    ports: [u16; 2],
    server: &'a Netns,
    is_forwarded: bool,
}

impl Site {
    /// Pod to pod, directly and through the service; between a pod and its node; to the world with the node's address, and
    /// from the world to the node port.
    fn paths<'a>(&'a self, pod: &'a Pod, number: usize) -> [Path<'a>; 6] {
        let pods = self.server(FAMILIES[number]).ip();
        let (server, node) = (self.server.netns(), self.node.machine().netns());
        let path = |client, target, ports, server, is_forwarded| Path {
            client,
            target,
            ports,
            server,
            is_forwarded,
        };
        let [service, ours, theirs] =
            [CLUSTER_IPS, NODE, WORLD].map(|all| bare(all[number]).parse().unwrap());
        let (direct, by_node) = ([PORT, RUNS], [NODE_PORT, NODE_RUNS]);
        [
            path(pod.netns(), pods, direct, server, false),
            path(pod.netns(), service, [90, 91], server, false),
            path(pod.netns(), ours, direct, node, false),
            path(node, pods, direct, server, false),
            path(pod.netns(), theirs, direct, &self.world, true),
            path(&self.world, ours, by_node, server, true),
        ]
    }

    /// Every device that packets of a pod and of the server pass, with its namespace.
    fn devices<'a>(&'a self, pod: &'a Pod) -> Vec<(&'a Netns, String)> {
        let node = self.node.machine().netns();
        let mut devices = vec![
            (&self.world, "eth0".to_owned()),
            (node, "eth0".to_owned()),
            (pod.netns(), "eth0".to_owned()),
            (self.server.netns(), "eth0".to_owned()),
        ];
        let shown = node.ip("-br link show type veth").unwrap();
        let names = shown.lines().filter_map(|line| line.split('@').next());
        let of_pods = names.filter(|name| name.starts_with("weir"));
        devices.extend(of_pods.map(|name| (node, name.to_owned())));
        assert_eq!(devices.len(), 6, "{shown}");
        devices
    }
}

/// Raises what a device takes in one packet: `IFLA_GSO_MAX_SIZE` and `IFLA_GRO_MAX_SIZE` above 64 KiB, and the same for IPv4.
/// iproute2 knows the latter since 6.3, so the message is made here.
fn take_more(netns: &Netns, device: &str, most: u32) {
    const KINDS: [u16; 4] = [41, 58, 63, 64];
    let index = netns
        .run(|| nix::net::if_::if_nametoindex(device))
        .unwrap()
        .unwrap();
    let mut message = Vec::new();
    let length = 32 + 8 * KINDS.len() as u32;
    // RTM_NEWLINK, a request that is to be acknowledged.
    message.extend(length.to_ne_bytes());
    message.extend(16_u16.to_ne_bytes());
    message.extend(5_u16.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([0; 4]);
    message.extend(index.to_ne_bytes());
    message.extend([0; 8]);
    for kind in KINDS {
        message.extend(8_u16.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(most.to_ne_bytes());
    }
    let ask = || {
        let (family, kind) = (AddressFamily::Netlink, SockType::Raw);
        let netlink = socket(
            family,
            kind,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        send(netlink.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut answer = [0; 64];
        recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let [_, _, _, _, kind, _, ..] = answer;
        let errno = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
        nix::Result::Ok((kind, errno))
    };
    // NLMSG_ERROR, and none.
    assert_eq!(netns.run(ask).unwrap().unwrap(), (2, 0), "{device}");
}

impl Path<'_> {
    /// Sends so many bytes there and back, and returns the length of the longest frame on each way.
    fn stream(&self, length: usize) -> [usize; 2] {
        let watched = [self.server, self.client].map(Watched::new);
        let target = SocketAddr::new(self.target, self.ports[0]);
        stream_comes_back(self.client, target, length, PATIENCE).unwrap();
        let longest = watched.map(Watched::longest);
        println!("TCP, {target}: {longest:?} bytes in one frame");
        longest
    }

    /// Sends until segments of both directions have been longer than that: a sender makes them as long as it thinks fast enough.
    fn has_grown(&self, least: usize) {
        let mut longest = [0; 2];
        for _ in 0..5 {
            for (longest, now) in longest.iter_mut().zip(self.stream(4 << 20)) {
                *longest = now.max(*longest);
            }
            if longest.iter().all(|longest| *longest > least) {
                return;
            }
        }
        panic!("{}: {longest:?}, not {least}", self.target);
    }

    /// Sends a run of datagrams with one call there, and one back; returns the most that was received with one call.
    fn run(&self, received: Received) -> usize {
        let target = SocketAddr::new(self.target, self.ports[1]);
        let open = |netns, local| {
            // The socket of the run before may still be going.
            let bind = || udp_socket(netns, local, PATIENCE);
            let is_taken = |it: &std::io::Result<UdpSocket>| {
                it.as_ref()
                    .is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse)
            };
            let socket = eventually("the port is free", PATIENCE, bind, |it| !is_taken(it));
            let socket = socket.unwrap().unwrap();
            setsockopt(&socket, sockopt::UdpGsoSegment, &(SEGMENT as i32)).unwrap();
            // A list of datagrams counts as much more than what is in them.
            setsockopt(&socket, sockopt::RcvBufForce, &(4 << 20)).unwrap();
            if received == Received::AtOnce {
                setsockopt(&socket, sockopt::UdpGroSegment, &true).unwrap();
            }
            socket
        };
        // The node has several addresses, and would answer with another.
        let is_own = self.ports[1] == RUNS;
        let own = if is_own { target } else { any(target) };
        let server = open(self.server, SocketAddr::new(own.ip(), RUNS));
        let client = open(self.client, any(target));
        let sent = bytes(RUN);
        client.send_to(&sent, target).unwrap();
        let (there, from) = take_run(&server, &sent);
        server.send_to(&sent, from).unwrap();
        let (back, from) = take_run(&client, &sent);
        assert_eq!(from, target);
        there.min(back)
    }
}

/// How a socket takes a run of datagrams.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Received {
    AtOnce,
    OneByOne,
}

/// Receives a run, and returns the most that came with one call, and from where.
fn take_run(socket: &UdpSocket, expected: &[u8]) -> (usize, SocketAddr) {
    let (mut run, mut most, mut buffer) = (Vec::new(), 0, vec![0; 1 << 16]);
    loop {
        let received = socket.recv_from(&mut buffer);
        let (length, from) = received.unwrap_or_else(|e| panic!("{e} after {}", run.len()));
        run.extend_from_slice(&buffer[..length]);
        most = most.max(length);
        if run.len() >= expected.len() {
            assert!(run == expected, "{} bytes came wrong", run.len());
            return (most, from);
        }
    }
}

#[test]
fn runs_of_datagrams_pass_in_one_piece() {
    let site = Site::new("runs", Uplink::Veth);
    let pod = site
        .node
        .run_pod(Workload::named("shop", "client"))
        .unwrap();
    for number in 0..2 {
        for path in site.paths(&pod, number) {
            assert_eq!(path.run(Received::OneByOne), SEGMENT, "{}", path.target);
            assert_eq!(path.run(Received::AtOnce), RUN, "{}", path.target);
        }
    }
    // A node whose devices leave it everything: behind the programs segments are made of what they changed, and their sums.
    let node = site.node.machine().netns();
    let devices = site.devices(&pod);
    for (netns, device) in &devices {
        if netns.name() == node.name() {
            set_features(netns, device, "tx off");
        }
    }
    for number in 0..2 {
        for path in site.paths(&pod, number) {
            path.run(Received::OneByOne);
            path.stream(500_001);
        }
    }
    // Whoever sends makes datagrams of a run, with their sums, and the device that receives them a list.
    for (netns, device) in &devices {
        let features = "tx off tx-udp-segmentation off gro on rx-gro-list on";
        set_features(netns, device, features);
    }
    for number in 0..2 {
        for path in site.paths(&pod, number) {
            let watched = Watched::new(node);
            for received in [Received::OneByOne, Received::AtOnce] {
                path.run(received);
            }
            let longest = watched.longest();
            println!("UDP, {}: {longest} bytes in one frame", path.target);
            assert!(longest > 10 * SEGMENT, "{longest}");
            path.stream(500_001);
        }
    }
    site.lost_none();
}

#[test]
fn a_segment_may_be_longer_than_an_ip_packet_can_say() {
    let site = Site::new("large", Uplink::Veth);
    let pod = site
        .node
        .run_pod(Workload::named("shop", "client"))
        .unwrap();
    for number in 0..2 {
        for path in site.paths(&pod, number) {
            path.has_grown(20_000);
        }
    }
    for (netns, device) in site.devices(&pod) {
        take_more(netns, &device, 150_000);
    }
    for number in 0..2 {
        for path in site.paths(&pod, number) {
            // The kernel (6.18) forwards none of IPv6: it counts the extension header that says the length, finds the
            // segments too big for the MTU, and says so to the sender, whether our programs are there or not.
            if path.is_forwarded && path.target.is_ipv6() {
                continue;
            }
            path.has_grown(66_000);
        }
    }
    site.lost_none();
}
