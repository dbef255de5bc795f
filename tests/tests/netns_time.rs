//! Ring 4: what the agent sweeps out of the kernel's tables, and what it leaves there. Nobody waits for that: a row's last packet
//! is set back, and a pod that goes has the tables swept at once.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use weir_agent::kernel::pin_path;
use weir_common::table::TABLES;
use weir_common::way::{Plan, Way, WayKey};
use weir_tests::netns::Netns;
use weir_tests::node::{Family, Node, NodeOptions};
use weir_tests::programs::clock;
use weir_tests::traffic::{PATIENCE, any, eventually, udp_socket};
use weir_tests::workloads::Workload;
use zerocopy::{FromBytes, IntoBytes, transmute};

const PORT: u16 = 9000;

/// A table of the node by its name, with rows of `N` bytes.
fn table<const N: usize>(node: &Node, name: &str) -> HashMap<MapData, [u8; 40], [u8; N]> {
    let table = TABLES.iter().find(|table| table.name == name).unwrap();
    let path = pin_path(&node.machine().bpffs().path().join("weir"), table);
    let data = MapData::from_pin(path).unwrap();
    let map = match name {
        "TCP_WAYS" => Map::HashMap(data),
        _ => Map::LruHashMap(data),
    };
    map.try_into().unwrap()
}

fn is_of(key: [u8; 40], port: u16) -> bool {
    let key: WayKey = transmute!(key);
    [key.source_port, key.destination_port].contains(&port.into())
}

/// How many rows there are of the conversation of a client's port: of plans, and of ways.
fn held(node: &Node, port: u16) -> [usize; 2] {
    let plans = ["TCP_PLANS", "OTHER_PLANS"].map(|name| {
        let table = table::<{ size_of::<Plan>() }>(node, name);
        table
            .keys()
            .filter(|key| is_of(*key.as_ref().unwrap(), port))
            .count()
    });
    let ways = ["TCP_WAYS", "OTHER_WAYS"].map(|name| {
        let table = table::<{ size_of::<Way>() }>(node, name);
        table
            .keys()
            .filter(|key| is_of(*key.as_ref().unwrap(), port))
            .count()
    });
    [plans.iter().sum(), ways.iter().sum()]
}

/// Sets back when the conversation of a client's port was seen last.
fn age(node: &Node, port: u16, by: Duration) {
    let seen = clock().saturating_sub(by.as_nanos() as u64);
    for name in ["TCP_PLANS", "OTHER_PLANS"] {
        change(
            &mut table::<{ size_of::<Plan>() }>(node, name),
            port,
            |plan: &mut Plan| {
                plan.way.seen.store(seen, Relaxed);
                plan.back.seen.store(seen, Relaxed);
            },
        );
    }
    for name in ["TCP_WAYS", "OTHER_WAYS"] {
        change(
            &mut table::<{ size_of::<Way>() }>(node, name),
            port,
            |way: &mut Way| {
                way.seen.store(seen, Relaxed);
            },
        );
    }
}

fn change<V: FromBytes + IntoBytes, const N: usize>(
    table: &mut HashMap<MapData, [u8; 40], [u8; N]>,
    port: u16,
    change: impl Fn(&mut V),
) {
    let rows: Vec<_> = table.iter().map(Result::unwrap).collect();
    for (key, row) in rows.into_iter().filter(|(key, _)| is_of(*key, port)) {
        let mut row = V::read_from_bytes(&row).unwrap();
        change(&mut row);
        let mut bytes = [0; N];
        bytes.copy_from_slice(row.as_mut_bytes());
        table.insert(key, bytes, 0).unwrap();
    }
}

/// What a client has done on its port, and what must not have been swept: rows of plans, and of ways.
struct Done {
    what: &'static str,
    port: u16,
    rows: [usize; 2],
    /// In seconds: for how long it is kept.
    kept: u64,
    _sockets: Vec<UdpSocket>,
    _streams: Vec<TcpStream>,
}

/// Datagrams that a client sends from a new socket, and how many of them are answered.
fn datagrams(client: &Netns, server: &UdpSocket, sent: u32, answered: u32) -> (u16, UdpSocket) {
    let target = server.local_addr().unwrap();
    let socket = udp_socket(client, any(target), PATIENCE).unwrap();
    for number in 0..sent {
        socket.send_to(b"ask", target).unwrap();
        let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
        if number < answered {
            server.send_to(b"answer", from).unwrap();
            socket.recv_from(&mut [0; 8]).unwrap();
        }
    }
    (socket.local_addr().unwrap().port(), socket)
}

/// A connection of which both ends have heard a word.
fn connection(client: &Netns, listener: &TcpListener) -> (u16, [TcpStream; 2]) {
    let target = listener.local_addr().unwrap();
    let connect = || TcpStream::connect_timeout(&target, PATIENCE);
    let mut stream = client.run(connect).unwrap().unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    for it in [&stream, &accepted] {
        it.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    stream.write_all(b"ask").unwrap();
    accepted.read_exact(&mut [0; 3]).unwrap();
    accepted.write_all(b"answer").unwrap();
    stream.read_exact(&mut [0; 6]).unwrap();
    (stream.local_addr().unwrap().port(), [stream, accepted])
}

/// Everything that there is patience for, once.
fn everything(client: &Netns, server: &Netns, address: std::net::IpAddr) -> Vec<Done> {
    let at = SocketAddr::new(address, PORT);
    let udp = udp_socket(server, at, PATIENCE).unwrap();
    let listener = server.run(|| TcpListener::bind(at)).unwrap().unwrap();
    let mut all = Vec::new();
    for (what, sent, answered, rows, kept) in [
        ("a question and its answer", 1, 1, [1, 0], 30),
        ("a question", 1, 0, [1, 0], 30),
        ("answered datagrams", 4, 4, [0, 2], 120),
        ("datagrams", 4, 0, [0, 2], 30),
    ] {
        let (port, socket) = datagrams(client, &udp, sent, answered);
        all.push(Done {
            what,
            port,
            rows,
            kept,
            _sockets: vec![socket],
            _streams: Vec::new(),
        });
    }
    for (what, kept) in [
        ("a connection", 3 * 3_600),
        ("a connection that one side has closed", 3_600),
        ("a connection that was reset", 30),
    ] {
        let (port, [stream, mut accepted]) = connection(client, &listener);
        let mut streams = Vec::new();
        match kept {
            3_600 => {
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!(accepted.read(&mut [0; 8]).unwrap(), 0);
                accepted.write_all(b"more").unwrap();
                streams.extend([stream, accepted]);
            }
            30 => {
                // What it has not read is lost with it.
                stream.set_nonblocking(true).unwrap();
                accepted.write_all(b"unread").unwrap();
                let ask = || stream.peek(&mut [0; 8]).unwrap_or(0);
                eventually("it is there", PATIENCE, ask, |length| *length == 6).unwrap();
                drop(stream);
                accepted.read(&mut [0; 8]).unwrap_err();
            }
            _ => streams.extend([stream, accepted]),
        }
        all.push(Done {
            what,
            port,
            rows: [0, 2],
            kept,
            _sockets: Vec::new(),
            _streams: streams,
        });
    }
    all
}

#[test]
fn what_was_silent_for_too_long_is_swept_and_nothing_else() {
    let node = Node::start(NodeOptions::named("time")).unwrap();
    let run = |name| node.run_pod(Workload::named("shop", name)).unwrap();
    let (client, server, goes) = (run("client"), run("server"), run("goes"));
    let mut goes = Some(goes);
    let up = Duration::from_nanos(clock());
    for (number, family) in [Family::V4, Family::V6].into_iter().enumerate() {
        let address = server.address(family).unwrap();
        let [young, old] = [(); 2].map(|()| everything(client.netns(), server.netns(), address));
        for done in young.iter().chain(&old) {
            assert_eq!(
                held(&node, done.port),
                done.rows,
                "{family:?}: {}",
                done.what
            );
        }
        for done in &young {
            age(&node, done.port, Duration::from_secs(done.kept * 5 / 6));
        }
        // A machine that is not up for so long has no such rows.
        let old: Vec<_> = old
            .into_iter()
            .filter(|done| Duration::from_secs(done.kept + 5) < up)
            .collect();
        assert!(old.len() >= 4, "this machine is up for {up:?} only");
        for done in &old {
            age(&node, done.port, Duration::from_secs(done.kept + 2));
        }
        let pod = goes.take().unwrap_or_else(|| run(["goes", "next"][number]));
        node.delete_pod(pod).unwrap();
        for done in &old {
            let rows = || held(&node, done.port);
            let is_gone = |rows: &[usize; 2]| *rows == [0, 0];
            eventually(done.what, PATIENCE, rows, is_gone).unwrap();
        }
        for done in &young {
            assert_eq!(
                held(&node, done.port),
                done.rows,
                "{family:?}: {}",
                done.what
            );
        }
    }
}
