//! Ring 4: one pod floods, and nobody else loses anything.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::channel;
use std::thread::sleep;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, Map, MapData};
use weir_agent::kernel::pin_path;
use weir_common::share::{self, Share};
use weir_common::table::TABLES;
use weir_common::way::{Way, WayKey};
use weir_tests::load::Load;
use weir_tests::netns::{End, Netns, link};
use weir_tests::node::{Family, Node, NodeOptions, Pod, binary};
use weir_tests::process::{Launch, Process};
use weir_tests::traffic::{Conversation, PATIENCE, drops, recent_drops};
use weir_tests::workloads::{Transport, Workload};
use zerocopy::FromBytes as _;

const NODE: &str = "198.51.100.2";
const WORLD: &str = "198.51.100.1";
/// Datagrams per second of the one who floods.
const RATE: u32 = 50_000;
const ESTABLISHED: usize = 500;
/// Where an answer takes its time, as a server of names does that has to ask others.
const SLOW: u16 = 8083;
const DELAY: Duration = Duration::from_millis(1_200);

/// Every flood lasts so long. `WEIR_FLOOD_SECONDS=60` for the minute of the target.
fn seconds() -> u32 {
    let said = std::env::var("WEIR_FLOOD_SECONDS").ok();
    said.and_then(|text| text.parse().ok()).unwrap_or(6)
}

/// Answers every datagram as `weir-echo` does, but late. Ends with the process.
fn answer_late(world: &Netns) {
    let socket = world
        .run(|| UdpSocket::bind(("0.0.0.0", SLOW)))
        .unwrap()
        .unwrap();
    let answers = socket.try_clone().unwrap();
    let (tell, told) = channel::<(Instant, Vec<u8>, SocketAddr)>();
    std::thread::spawn(move || {
        for (due, bytes, peer) in told {
            sleep(due.saturating_duration_since(Instant::now()));
            // Whoever asked may be gone.
            answers.send_to(&bytes, peer).ok();
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 1_500];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let due = Instant::now() + DELAY;
            let answer = [b"late ", &buffer[..length]].concat();
            tell.send((due, answer, peer)).ok();
        }
    });
}

/// Counts packets that arrive in a namespace with a source of another network than the node's.
fn count_strangers(world: &Netns) {
    let rules = format!(
        "table inet seen {{ chain in {{ type filter hook prerouting priority -300; \
         iifname node ip saddr != {{ {NODE}, {WORLD} }} counter\n}}\n}}"
    );
    let status = world.command("nft").arg(rules).status().unwrap();
    assert!(status.success(), "nft: {status}");
}

fn strangers(world: &Netns) -> u64 {
    let output = world
        .command("nft")
        .args(["list", "table", "inet", "seen"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, count) = text.split_once("counter packets ").unwrap();
    count.split(' ').next().unwrap().parse().unwrap()
}

/// Packets that the kernel had no room for between a device and its stack, of all namespaces (`/proc/net/softnet_stat`, the second number
/// of each CPU): what is lost there no program of ours has seen.
fn overflowed() -> u64 {
    let text = std::fs::read_to_string("/proc/net/softnet_stat").unwrap();
    let dropped = text.lines().map(|line| line.split_whitespace().nth(1));
    dropped
        .map(|number| u64::from_str_radix(number.unwrap(), 16).unwrap())
        .sum()
}

/// Datagrams that the sockets of a namespace had no room for (`/proc/net/snmp`, `RcvbufErrors`): they have come as far as they were sent.
fn unread(netns: &Netns) -> u64 {
    let text = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"));
    let text = text.unwrap().unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let names = lines.next().unwrap().split(' ');
    let mut columns = names.zip(lines.next().unwrap().split(' '));
    let (_, number) = columns.find(|(name, _)| *name == "RcvbufErrors").unwrap();
    number.parse().unwrap()
}

/// What the metric says about each pod.
fn limited(node: &Node) -> Vec<(String, u64)> {
    let page = node.metrics().unwrap();
    let lines = page
        .lines()
        .filter_map(|line| line.strip_prefix("weir_pod_limited_total{"));
    lines
        .map(|line| {
            let (labels, count) = line.split_once("} ").unwrap();
            (labels.to_owned(), count.parse().unwrap())
        })
        .collect()
}

/// Rows of connections that a pod has opened: as programs count them, and as they are.
fn shares(node: &Node, pod: &Pod) -> (i64, usize) {
    let pinned = |name| {
        let table = TABLES.iter().find(|table| table.name == name).unwrap();
        let path = pin_path(&node.machine().bpffs().path().join("weir"), table);
        MapData::from_pin(path).unwrap()
    };
    let endpoints = node.ask("endpoints").unwrap();
    let endpoints = endpoints.as_array().unwrap();
    let row = endpoints
        .iter()
        .find(|row| row["pod"] == format!("shop/{}", pod.workload.name));
    let ifindex = row.unwrap()["ifindex"].as_u64().unwrap() as u32;
    let map: Array<MapData, [u8; size_of::<Share>()]> =
        Map::Array(pinned("SHARES")).try_into().unwrap();
    let share = Share::read_from_bytes(&map.get(&share::row(ifindex), 0).unwrap()).unwrap();
    let map: HashMap<MapData, [u8; size_of::<WayKey>()], [u8; size_of::<Way>()]> =
        Map::HashMap(pinned("TCP_WAYS")).try_into().unwrap();
    let ways = map
        .iter()
        .map(|row| Way::read_from_bytes(&row.unwrap().1).unwrap());
    let held = ways.filter(|way| way.owner == ifindex).count();
    (share.rows.load(Relaxed) as i64, held)
}

#[test]
fn a_pod_that_floods_harms_itself_alone() {
    let overflowed_before = overflowed();
    let options = NodeOptions::named("flood");
    let mut node = Node::prepare(options).unwrap();
    let world = Netns::new("world").unwrap();
    let netns = node.machine().netns();
    let (here, there) = (format!("{NODE}/24"), format!("{WORLD}/24"));
    link(
        End {
            netns,
            device: "eth0",
            addresses: &[&here],
        },
        End {
            netns: &world,
            device: "node",
            addresses: &[&there],
        },
    )
    .unwrap();
    netns.ip("route del default").unwrap();
    netns.add_route("default", WORLD.parse().unwrap()).unwrap();
    // What goes to nobody ends here, in silence.
    world.ip("route add blackhole 203.0.113.0/24").unwrap();
    count_strangers(&world);
    answer_late(&world);
    let server = |port: &str, transport: &str| -> Process {
        let mut server = Launch::new("server", binary("weir-echo"))
            .in_netns(&world)
            .args(["--name", "world", transport, port])
            .log_to(&node.machine().dir().join(format!("world{port}.log")))
            .spawn()
            .unwrap();
        server.wait_for_log("ready", PATIENCE).unwrap();
        server
    };
    let _servers = [server("8080", "--tcp"), server("8081", "--udp")];
    node.start_agent().unwrap();
    node.start_dns().unwrap();
    node.wait_ready().unwrap();
    let pod = |name: &str| -> Pod {
        let pod = Workload::named("shop", name)
            .port(Transport::Tcp, 8080)
            .port(Transport::Udp, 8081);
        node.run_pod(pod).unwrap()
    };
    let [noisy, quiet, busy, backend] = ["noisy", "quiet", "busy", "backend"].map(pod);
    node.write_manifest("service.yaml", &service(&backend))
        .unwrap();
    node.wait_for_service("shop/backend", 1, PATIENCE).unwrap();

    let to_world = |port: u16| SocketAddr::new(WORLD.parse().unwrap(), port);
    let backend_ip = backend.address(Family::V4).unwrap();
    let mut conversations: Vec<Conversation> = (0..ESTABLISHED)
        .map(|n| {
            let target = if n % 2 == 0 {
                to_world(8080)
            } else {
                SocketAddr::new(backend_ip, 8080)
            };
            let from = if n % 4 < 2 { &quiet } else { &busy };
            let mut it = Conversation::open_in(from.netns(), target, PATIENCE).unwrap();
            it.ask().unwrap();
            it
        })
        .collect();
    let seconds = seconds();
    let mut lost = Vec::new();
    for (kind, target, targets, open) in [
        ("many", "203.0.113.0:9", 251, 8080),
        ("one", "198.51.100.1:8081", 1, 8080),
        ("a service", "10.96.0.77:8081", 1, 8080),
    ] {
        // A SYN that the machine's own queues had no room for (`overflowed`) is sent again within this patience. Anything
        // later than this says that one was lost elsewhere.
        const LATE: u64 = 1_000;
        let loads: Vec<Load> = [
            format!(
                "http --target {} --rate 100 --patience 3500",
                to_world(open)
            ),
            "http --target 10.96.0.77:80 --rate 50 --patience 3500".to_owned(),
            format!("udp --target {} --rate 25", to_world(8081)),
            format!("udp --target {} --rate 25 --patience 1900", to_world(SLOW)),
        ]
        .into_iter()
        .map(|words| Load::start(&quiet, &format!("--kind {words} --seconds {seconds}")).unwrap())
        .collect();
        let flood = binary("weir-flood").display().to_string();
        let mut flood = noisy.command(&flood);
        flood.args([
            "--from",
            &noisy.address(Family::V4).unwrap().to_string(),
            "--target",
            target,
        ]);
        flood.args([
            "--targets",
            &targets.to_string(),
            "--rate",
            &RATE.to_string(),
        ]);
        flood.args(["--seconds", &seconds.to_string()]);
        let before = drops(&node, "pod_limit").unwrap();
        let overflowed_at_first = overflowed();
        let flood = flood.stdout(std::process::Stdio::piped()).spawn().unwrap();
        // Half of the connections talk, the others are silent until the end.
        let end = Instant::now() + Duration::from_secs(seconds.into());
        while Instant::now() < end {
            for (n, conversation) in conversations
                .iter_mut()
                .enumerate()
                .filter(|(n, _)| n % 4 < 2)
            {
                if let Err(error) = conversation.ask() {
                    lost.push(format!("{kind}, busy {n}: {error}"));
                }
            }
            sleep(Duration::from_millis(200));
        }
        let said = flood.wait_with_output().unwrap();
        println!(
            "{kind}: {}",
            String::from_utf8_lossy(&said.stdout).replace('\n', " ")
        );
        assert!(said.status.success(), "{said:?}");
        for (n, load) in loads.into_iter().enumerate() {
            let tally = load.finish().unwrap();
            println!(
                "  {} of {}, slowest {} ms",
                tally.succeeded(),
                tally.attempted,
                tally.slowest_ms
            );
            let is_connections = n < 2;
            let is_late = is_connections && tally.slowest_ms >= LATE;
            let is_excused = overflowed() > overflowed_at_first;
            if tally.succeeded() != tally.attempted || (is_late && !is_excused) {
                lost.push(format!("{kind}: {tally:?}"));
            }
        }
        let refused = drops(&node, "pod_limit").unwrap() - before;
        println!("  {refused} refused");
        assert!(
            refused > u64::from(RATE) / 4 * u64::from(seconds),
            "{kind}: {refused}"
        );
    }
    for (n, conversation) in conversations.iter_mut().enumerate() {
        if let Err(error) = conversation.ask() {
            lost.push(format!("{n}: {error}"));
        }
    }
    let queues = overflowed() - overflowed_before;
    let unread = unread(&world);
    println!(
        "packets that the machine's own queues had no room for: {queues}, and sockets: {unread}"
    );
    assert_eq!(
        lost,
        Vec::<String>::new(),
        "beside {queues} from full queues and {unread} from full sockets"
    );
    assert_eq!(strangers(&world), 0, "left with a pod's address");
    let limited = limited(&node);
    assert_eq!(limited.len(), 1, "{limited:?}");
    assert!(
        limited[0].0.contains("pod=\"noisy\"") && limited[0].1 > 0,
        "{limited:?}"
    );
    // What each has open is counted exactly, after some thousands have come and gone.
    for (pod, at_least) in [(&noisy, 0), (&quiet, ESTABLISHED), (&busy, ESTABLISHED)] {
        let (counted, held) = shares(&node, pod);
        assert_eq!(counted, held as i64);
        assert!(held >= at_least, "{held}");
    }
    assert!(!recent_drops(&node, "pod_limit").unwrap().is_empty());
    for reason in [
        "pod_limit",
        "no_nat_port",
        "no_flow",
        "table_full",
        "nat_collision",
    ] {
        let recent = recent_drops(&node, reason).unwrap();
        println!("{reason}: {} explained", recent.len());
        let is_others =
            |end: &serde_json::Value| end["name"] == "shop/quiet" || end["name"] == "shop/busy";
        let of_others = recent
            .iter()
            .find(|row| is_others(&row["source"]) || is_others(&row["destination"]));
        assert!(of_others.is_none(), "{reason}: {of_others:?}");
    }
}

fn service(backend: &Pod) -> String {
    format!(
        "kind: Service
apiVersion: v1
metadata: {{name: backend, namespace: shop}}
spec:
  clusterIP: 10.96.0.77
  clusterIPs: [10.96.0.77]
  ports:
  - {{name: http, port: 80, protocol: TCP}}
  - {{name: echo, port: 8081, protocol: UDP}}
---
kind: EndpointSlice
apiVersion: discovery.k8s.io/v1
metadata: {{name: backend, namespace: shop, labels: {{kubernetes.io/service-name: backend}}}}
addressType: IPv4
ports:
- {{name: http, port: 8080, protocol: TCP}}
- {{name: echo, port: 8081, protocol: UDP}}
endpoints:
- {{addresses: ['{}'], conditions: {{ready: true}}}}
",
        backend.address(Family::V4).unwrap()
    )
}
