//! Names that upstream servers know, and upstream servers that fail.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hickory_proto::rr::RecordType;

use crate::support::{
    Manner, PlayedUpstream, Server, ask, ask_tcp, free_address, question, shown, zone,
};

#[tokio::test(flavor = "multi_thread")]
async fn what_upstream_says_is_passed_on() {
    let upstream = PlayedUpstream::start(Manner::Prompt).await;
    let server = Server::start(&[upstream.address]);
    use RecordType::{A, AAAA, MX};
    for (name, kind, expected) in [
        ("www.example.com", A, "NOERROR A=192.0.2.1"),
        ("WWW.Example.com", A, "NOERROR A=192.0.2.1"),
        ("www.example.com", AAAA, "NOERROR soa:example.com."),
        ("www.example.com", MX, "NOERROR soa:example.com."),
        ("nx.example.com", A, "NXDOMAIN soa:example.com."),
        (
            "alias.example.com",
            A,
            "NOERROR A=192.0.2.1 CNAME=www.example.com.",
        ),
        ("refused.example.com", A, "REFUSED"),
        // Twice: the second comes from the cache.
        ("nx.example.com", A, "NXDOMAIN soa:example.com."),
        ("www.example.com", A, "NOERROR A=192.0.2.1"),
        // An ExternalName brings the end of its chain along.
        (
            "away.default.svc.cluster.local",
            A,
            "NOERROR A=192.0.2.1 CNAME=www.example.com.",
        ),
        (
            "away.default.svc.cluster.local",
            AAAA,
            "NOERROR CNAME=www.example.com. soa:example.com.",
        ),
        (
            "lost.default.svc.cluster.local",
            A,
            "NXDOMAIN CNAME=nx.example.com. soa:example.com.",
        ),
        (
            "home.default.svc.cluster.local",
            A,
            "NOERROR A=10.96.0.20 CNAME=web.default.svc.cluster.local.",
        ),
    ] {
        let answer = ask(server.address, name, kind).await;
        assert_eq!(shown(&answer), expected, "{name} {kind}");
        let asked = answer.queries[0].name().to_string();
        assert_eq!(
            asked.trim_end_matches('.'),
            name,
            "the spelling of the question"
        );
        if expected.starts_with("NOERROR A=") && !expected.contains("CNAME") {
            assert!(answer.answers[0].name.eq_case(answer.queries[0].name()));
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_asked_for_once() {
    let upstream = PlayedUpstream::start(Manner::Prompt).await;
    let server = Server::start(&[upstream.address]);
    for _ in 0..50 {
        ask(server.address, "www.example.com", RecordType::A).await;
    }
    assert_eq!(upstream.udp_questions.load(Ordering::Relaxed), 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_answer_is_asked_for_over_tcp_and_handed_on_in_full() {
    let upstream = PlayedUpstream::start(Manner::Prompt).await;
    let server = Server::start(&[upstream.address]);
    let message = question("big.example.com", RecordType::A);
    let answer = ask_tcp(server.address, &message).await;
    assert_eq!(answer.answers.len(), 100);
    assert!(!answer.metadata.truncation);
    assert_eq!(upstream.tcp_questions.load(Ordering::Relaxed), 1);
    // 100 records do not fit in a datagram, and the cache does not hide that.
    let answer = ask(server.address, "big.example.com", RecordType::A).await;
    assert!(answer.metadata.truncation);
    assert_eq!(upstream.tcp_questions.load(Ordering::Relaxed), 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_upstream_is_servfail_within_two_seconds_and_no_cluster_name_waits() {
    let upstream = PlayedUpstream::start(Manner::Silent).await;
    let server = Server::start(&[upstream.address]);
    let address = server.address;
    let started = Instant::now();
    let dead = tokio::spawn(async move {
        let answer = ask(address, "www.example.com", RecordType::A).await;
        (shown(&answer), started.elapsed())
    });
    let mut slowest = Duration::ZERO;
    for _ in 0..300 {
        let asked = Instant::now();
        let answer = ask(address, "web.default.svc.cluster.local", RecordType::A).await;
        assert_eq!(shown(&answer), "NOERROR A=10.96.0.20");
        slowest = slowest.max(asked.elapsed());
    }
    assert!(
        !dead.is_finished(),
        "the cluster names were answered meanwhile"
    );
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    let (answer, took) = dead.await.unwrap();
    assert_eq!(answer, "SERVFAIL");
    assert!(took < Duration::from_millis(2200), "{took:?}");

    // It returns, and answers are there at once.
    let back = upstream.address;
    drop(upstream);
    tokio::task::yield_now().await;
    let mut upstream = None;
    for _ in 0..100 {
        // The aborted tasks give the port back when they are dropped.
        if std::net::UdpSocket::bind(back).is_ok() && std::net::TcpListener::bind(back).is_ok() {
            upstream = Some(PlayedUpstream::start_at(back, Manner::Prompt).await);
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(upstream.is_some(), "the port is free again");
    let answer = ask(address, "www.example.com", RecordType::A).await;
    assert_eq!(shown(&answer), "NOERROR A=192.0.2.1");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_upstreams_is_enough() {
    let dead = PlayedUpstream::start(Manner::Silent).await;
    let alive = PlayedUpstream::start(Manner::Prompt).await;
    let server = Server::start(&[dead.address, alive.address]);
    for n in 0..20 {
        let answer = ask(
            server.address,
            &format!("any-{n}.example.com"),
            RecordType::A,
        )
        .await;
        assert_eq!(shown(&answer), "NOERROR A=192.0.2.7", "question {n}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_upstream_cannot_pile_up_questions() {
    let upstream = PlayedUpstream::start(Manner::Slow(Duration::from_secs(5))).await;
    let server = Server::start(&[upstream.address]);
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server.address).await.unwrap();
    let mut buffer = [0; 1500];
    let mut rejected = 0;
    for n in 0..1500 {
        let message = question(&format!("any-{n}.example.com"), RecordType::A);
        socket.send(&message.to_vec().unwrap()).await.unwrap();
        if n % 50 == 49 {
            // Room for the server: this is about its bound, not about the socket's buffer.
            let answer = ask(
                server.address,
                "web.default.svc.cluster.local",
                RecordType::A,
            )
            .await;
            assert_eq!(shown(&answer), "NOERROR A=10.96.0.20", "after {n}");
            while socket.try_recv(&mut buffer).is_ok() {
                rejected += 1;
            }
        }
    }
    let counted = server.metrics.rejects.get();
    assert!(
        counted > 0,
        "{rejected} answers came, none for lack of room"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_upstream_other_names_fail_at_once() {
    let server = Server::start(&[]);
    let started = Instant::now();
    let answer = ask(server.address, "www.example.com", RecordType::A).await;
    assert_eq!(shown(&answer), "SERVFAIL");
    assert!(started.elapsed() < Duration::from_secs(1));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn until_synced_cluster_names_are_servfail_and_others_work() {
    let upstream = PlayedUpstream::start(Manner::Prompt).await;
    let server = Server::start_unsynced(free_address(), &[upstream.address]);
    for (name, kind, before, after) in [
        (
            "web.default.svc.cluster.local",
            RecordType::A,
            "SERVFAIL",
            "NOERROR A=10.96.0.20",
        ),
        (
            "none.default.svc.cluster.local",
            RecordType::A,
            "SERVFAIL",
            "NXDOMAIN soa:cluster.local.",
        ),
        (
            "20.0.96.10.in-addr.arpa",
            RecordType::PTR,
            "SERVFAIL",
            "NOERROR PTR=web.default.svc.cluster.local.",
        ),
        (
            "www.example.com",
            RecordType::A,
            "NOERROR A=192.0.2.1",
            "NOERROR A=192.0.2.1",
        ),
    ] {
        server.zone.store(None);
        assert_eq!(
            shown(&ask(server.address, name, kind).await),
            before,
            "{name}"
        );
        server.zone.store(Some(Arc::new(zone())));
        assert_eq!(
            shown(&ask(server.address, name, kind).await),
            after,
            "{name}"
        );
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_under_way_are_answered_before_the_end() {
    let upstream = PlayedUpstream::start(Manner::Slow(Duration::from_millis(400))).await;
    let server = Server::start(&[upstream.address]);
    let address = server.address;
    let asked = tokio::spawn(async move { ask(address, "www.example.com", RecordType::A).await });
    crate::support::until("the question is upstream", async || {
        upstream.udp_questions.load(Ordering::Relaxed) > 0
    })
    .await;
    server.stop().await;
    assert_eq!(shown(&asked.await.unwrap()), "NOERROR A=192.0.2.1");
}
