//! Sizes, transports, hostile clients, and one server taking over from another.

use std::collections::HashSet;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hickory_proto::rr::{DNSClass, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use crate::support::{Server, ask, ask_tcp, exchange, question, shown, until, with_edns, zone};

const WEB: &str = "web.default.svc.cluster.local";
const MANY: &str = "many.default.svc.cluster.local";

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_as_long_as_the_client_can_take() {
    let server = Server::start(&[]);
    for (payload, least, most) in [
        (None, 400, 512),
        (Some(100), 400, 512),
        (Some(512), 400, 512),
        (Some(1000), 900, 1000),
        (Some(4096), 1100, 1232),
    ] {
        let mut message = question(MANY, RecordType::A);
        if let Some(payload) = payload {
            message = with_edns(message, payload);
        }
        let (answer, length) = exchange(server.address, &message).await.unwrap();
        assert!(answer.metadata.truncation, "{payload:?}");
        assert!((least..=most).contains(&length), "{payload:?}: {length}");
        assert!(!answer.answers.is_empty(), "{payload:?}");
        assert_eq!(answer.edns.is_some(), payload.is_some(), "{payload:?}");
    }
    let answer = ask_tcp(server.address, &question(MANY, RecordType::A)).await;
    assert!(!answer.metadata.truncation);
    assert_eq!(answer.answers.len(), 200);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_ours_to_give_and_come_in_changing_order() {
    let server = Server::start(&[]);
    let mut orders = HashSet::new();
    for _ in 0..100 {
        let answer = ask(
            server.address,
            "few.default.svc.cluster.local",
            RecordType::A,
        )
        .await;
        assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
        assert_eq!(answer.answers.len(), 4);
        orders.insert(answer.answers[0].data.to_string());
    }
    assert_eq!(orders.len(), 4, "each is first at times");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_filter_holds_on_both_transports() {
    let server = Server::start(&[]);
    let chaos = {
        let mut message = question("version.bind", RecordType::TXT);
        message.queries[0].set_query_class(DNSClass::CH);
        message
    };
    let version = {
        let mut message = with_edns(question(WEB, RecordType::A), 1232);
        message.edns.as_mut().unwrap().set_version(1);
        message
    };
    for (message, expected) in [
        (question(WEB, RecordType::A), "NOERROR A=10.96.0.20"),
        (question(WEB, RecordType::ANY), "NOERROR HINFO="),
        (question("cluster.local", RecordType::AXFR), "REFUSED"),
        (chaos, "REFUSED"),
        (version, "BADVERS"),
    ] {
        let (answer, _) = exchange(server.address, &message).await.unwrap();
        assert!(shown(&answer).starts_with(expected), "{}", shown(&answer));
        let answer = ask_tcp(server.address, &message).await;
        assert!(shown(&answer).starts_with(expected), "{}", shown(&answer));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_garbage_leaves_the_server_well() {
    const PACKETS: usize = 20_000;
    let server = Server::start(&[]);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server.address).await.unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    let plain = with_edns(question(WEB, RecordType::A), 1232)
        .to_vec()
        .unwrap();
    let mut sink = [0; 2048];
    for n in 0..PACKETS {
        let bytes: Vec<u8> = match n % 2 {
            0 => (0..random.usize(0..600)).map(|_| random.u8(..)).collect(),
            _ => {
                let mut bytes = plain.clone();
                for _ in 0..random.usize(1..4) {
                    let place = random.usize(2..bytes.len());
                    bytes[place] = random.u8(..);
                }
                bytes
            }
        };
        // A full buffer is the flood's problem.
        if socket.send(&bytes).await.is_err() {
            tokio::task::yield_now().await;
        }
        while socket.try_recv(&mut sink).is_ok() {}
    }
    // The flood may still fill the socket's buffer, so a client asks again, as every client does.
    until("a good question is answered", async || {
        let message = question(WEB, RecordType::A);
        let answer = exchange(server.address, &message);
        match tokio::time::timeout(Duration::from_millis(500), answer).await {
            Ok(Some((answer, _))) => {
                assert_eq!(shown(&answer), "NOERROR A=10.96.0.20");
                true
            }
            _ => false,
        }
    })
    .await;
    assert_eq!(server.metrics.panics.get(), 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_dribbles_is_closed() {
    let server = Server::start(&[]);
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let started = Instant::now();
    stream.write_all(&[0]).await.unwrap();
    let mut byte = [0];
    let read = tokio::time::timeout(Duration::from_secs(8), stream.read(&mut byte)).await;
    assert!(matches!(read, Ok(Ok(0) | Err(_))), "{read:?}");
    assert!(
        started.elapsed() > Duration::from_secs(2),
        "not before its time"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_gets_twenty_connections_and_udp_still_answers() {
    let server = Server::start(&[]);
    let mut open = Vec::new();
    for _ in 0..40 {
        open.push(TcpStream::connect(server.address).await.unwrap());
    }
    until("twenty are refused", async || {
        server.metrics.connections_refused.get() == 20
    })
    .await;
    let answer = ask(server.address, WEB, RecordType::A).await;
    assert_eq!(shown(&answer), "NOERROR A=10.96.0.20");
    drop(open);
    // The places come back.
    until("a new connection is served", async || {
        let Ok(mut stream) = TcpStream::connect(server.address).await else {
            return false;
        };
        let bytes = question(WEB, RecordType::A).to_vec().unwrap();
        let mut message = (bytes.len() as u16).to_be_bytes().to_vec();
        message.extend(bytes);
        stream.write_all(&message).await.is_ok() && stream.read_u16().await.is_ok()
    })
    .await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_questions_share_a_connection() {
    let server = Server::start(&[]);
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for name in [WEB, MANY] {
        let bytes = question(name, RecordType::A).to_vec().unwrap();
        stream.write_u16(bytes.len() as u16).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let length = stream.read_u16().await.unwrap();
        let mut answer = vec![0; usize::from(length)];
        stream.read_exact(&mut answer).await.unwrap();
    }
    server.stop().await;
}

/// Asks without a pause while servers come and go on one address. UDP only: a kernel resets the
/// connections that wait in the queue of a listener that is closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_server_takes_over_without_a_lost_answer() {
    const TURNS: usize = 10;
    let mut server = Server::start(&[]);
    let address = server.address;
    let done = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let done = done.clone();
            tokio::spawn(async move {
                let (mut asked, mut lost) = (0, 0);
                while !done.load(Ordering::Relaxed) {
                    // A new socket each time, so that the kernel chooses a server anew.
                    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
                    socket.connect(address).await.unwrap();
                    let message = question(WEB, RecordType::A).to_vec().unwrap();
                    let mut buffer = [0; 512];
                    asked += 1;
                    let sent = socket.send(&message).await;
                    let answer = socket.recv(&mut buffer);
                    let answered = tokio::time::timeout(Duration::from_secs(2), answer).await;
                    if sent.is_err() || !matches!(answered, Ok(Ok(_))) {
                        lost += 1;
                    }
                }
                (asked, lost)
            })
        })
        .collect();
    for _ in 0..TURNS {
        let next = Server::start_unsynced(address, &[]);
        next.zone.store(Some(Arc::new(zone())));
        tokio::time::sleep(Duration::from_millis(30)).await;
        std::mem::replace(&mut server, next).stop().await;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    done.store(true, Ordering::Relaxed);
    let (mut asked, mut lost) = (0, 0);
    for client in clients {
        let (a, l) = client.await.unwrap();
        asked += a;
        lost += l;
    }
    println!("{asked} questions over {TURNS} takeovers, {lost} lost");
    assert!(asked > 1000, "only {asked} questions");
    assert_eq!(lost, 0, "of {asked}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dig_agrees() {
    let server = Server::start(&[]);
    let address = server.address;
    for (arguments, expected) in [
        (&["web.default.svc.cluster.local", "A"][..], "10.96.0.20"),
        (&["-x", "10.96.0.20"], "web.default.svc.cluster.local."),
        (&["dns-version.cluster.local", "TXT"], "\"1.1.0\""),
        (
            &["_http._tcp.web.default.svc.cluster.local", "SRV"],
            "0 100 80 web.default.svc.cluster.local.",
        ),
        (
            &["home.default.svc.cluster.local", "CNAME", "+tcp"],
            "web.default.svc.cluster.local.",
        ),
    ] {
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        let output = tokio::task::spawn_blocking(move || {
            Command::new("dig")
                .args([
                    &format!("@{}", address.ip()),
                    "-p",
                    &address.port().to_string(),
                ])
                .args(["+short", "+tries=1", "+time=2"])
                .args(arguments)
                .output()
                .expect("dig is needed: apt-get install bind9-dnsutils")
        })
        .await
        .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected);
    }
    server.stop().await;
}
