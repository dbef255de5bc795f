//! A server in this process, an upstream that behaves as told, and a client that speaks plain DNS.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::rdata::{CNAME, SOA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio_util::sync::CancellationToken;
use weir_dns::feed::SharedZone;
use weir_dns::hand_over::{FOLDER_MODE, Folder};
use weir_dns::listen::Listener;
use weir_dns::metrics::Metrics;
use weir_dns::resolve::Resolve;
use weir_dns::server;
use weir_dns::upstream::Upstream;
use weir_dns::zone::{
    Domain, EndpointSet, PortProtocol, ServiceKind, ServiceName, Zone, ZoneEndpoint, ZonePort,
    ZoneService,
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn domain() -> Domain {
    Domain::new("cluster.local").unwrap()
}

pub(crate) fn service(name: &str, kind: ServiceKind) -> Arc<ZoneService> {
    Arc::new(ZoneService {
        name: Arc::new(ServiceName::new("default", name)),
        kind,
    })
}

pub(crate) fn cluster_ip(name: &str, address: &str) -> Arc<ZoneService> {
    service(
        name,
        ServiceKind::ClusterIp {
            addresses: vec![address.parse().unwrap()],
            ports: vec![ZonePort {
                name: "http".into(),
                protocol: PortProtocol::Tcp,
                port: 80,
            }],
        },
    )
}

pub(crate) fn external(name: &str, target: &str) -> Arc<ZoneService> {
    service(
        name,
        ServiceKind::ExternalName {
            target: target.into(),
        },
    )
}

pub(crate) fn headless(name: &str, count: u16) -> Arc<ZoneService> {
    let endpoints = (0..count)
        .map(|n| ZoneEndpoint {
            address: [10, 1, (n >> 8) as u8, n as u8].into(),
            hostname: None,
        })
        .collect();
    service(
        name,
        ServiceKind::Headless {
            sets: vec![EndpointSet {
                ports: vec![],
                endpoints,
            }],
        },
    )
}

pub(crate) fn zone() -> Zone {
    let mut zone = Zone::new(domain(), 5, 1);
    zone.announce(&"default".into());
    for service in [
        cluster_ip("web", "10.96.0.20"),
        headless("few", 4),
        headless("many", 200),
        external("away", "www.example.com"),
        external("lost", "nx.example.com"),
        external("home", "web.default.svc.cluster.local"),
    ] {
        zone.upsert(service);
    }
    zone
}

/// An address that nobody has over UDP or TCP, with a port that the kernel gives to no client: a
/// port of its choice could be given to two sockets that both allow to share it.
pub(crate) fn free_address() -> SocketAddr {
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 20_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Test programs that run at once begin at different places.
    let start = std::process::id().wrapping_mul(7919);
    for _ in 0..COUNT {
        let next = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let address = SocketAddr::from(([127, 0, 0, 1], (FIRST + next) as u16));
        if std::net::UdpSocket::bind(address).is_ok()
            && std::net::TcpListener::bind(address).is_ok()
        {
            return address;
        }
    }
    panic!("no free port");
}

/// Where servers meet, as the agent makes it.
pub(crate) fn hand_over_folder() -> Arc<tempfile::TempDir> {
    let folder = tempfile::tempdir().unwrap();
    let mode = std::fs::Permissions::from_mode(FOLDER_MODE);
    std::fs::set_permissions(folder.path(), mode).unwrap();
    Arc::new(folder)
}

/// A running server.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) zone: SharedZone,
    pub(crate) metrics: Metrics,
    registry: Registry,
    /// Where it hands its sockets over.
    pub(crate) folder: Arc<tempfile::TempDir>,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    /// With the example zone, on a free port.
    pub(crate) fn start(upstream: &[SocketAddr]) -> Self {
        let server = Self::start_unsynced(free_address(), upstream);
        server.zone.store(Some(Arc::new(zone())));
        server
    }

    pub(crate) fn start_unsynced(address: SocketAddr, upstream: &[SocketAddr]) -> Self {
        let folder = hand_over_folder();
        Self::start_with(Listener::open(address).unwrap(), folder, upstream)
    }

    /// Without a zone.
    pub(crate) fn start_with(
        listener: Listener,
        folder: Arc<tempfile::TempDir>,
        upstream: &[SocketAddr],
    ) -> Self {
        let address = listener.address;
        let zone = SharedZone::default();
        let (metrics, registry) = Metrics::new(&domain());
        let upstream = Upstream::new(upstream).unwrap();
        let resolve = Resolve::new(domain(), zone.clone(), upstream, metrics.clone());
        let shutdown = CancellationToken::new();
        let meeting = Folder::new(folder.path());
        let server = server::Server::start(
            vec![listener],
            &meeting,
            None,
            &Arc::new(resolve),
            shutdown.clone(),
        );
        let task = tokio::spawn(server.unwrap().finish());
        Self {
            address,
            zone,
            metrics,
            registry,
            folder,
            shutdown,
            task,
        }
    }

    /// Questions that it has answered.
    pub(crate) fn answered(&self) -> u64 {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        text.lines()
            .filter(|line| line.starts_with("coredns_dns_responses_total{"))
            .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    }

    /// Tells it to end and waits until it has.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, self.task)
            .await
            .expect("the server ends")
            .unwrap();
    }
}

pub(crate) fn question(name: &str, kind: RecordType) -> Message {
    let mut name = Name::from_ascii(name).unwrap();
    name.set_fqdn(true);
    let mut message = Message::query();
    message.metadata.id = fastrand::u16(..);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name, kind));
    message
}

pub(crate) fn with_edns(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    message.set_edns(edns);
    message
}

/// Asks once; the length of the answer comes with it.
pub(crate) async fn exchange(server: SocketAddr, message: &Message) -> Option<(Message, usize)> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(&message.to_vec().unwrap()).await.unwrap();
    let mut buffer = [0; 65_535];
    loop {
        let length = tokio::time::timeout(PATIENCE, socket.recv(&mut buffer))
            .await
            .ok()?
            .ok()?;
        let answer = Message::from_vec(&buffer[..length]).expect("an answer that can be read");
        if answer.metadata.id == message.metadata.id {
            assert_eq!(answer.metadata.message_type, MessageType::Response);
            return Some((answer, length));
        }
    }
}

pub(crate) async fn ask(server: SocketAddr, name: &str, kind: RecordType) -> Message {
    let message = with_edns(question(name, kind), 1232);
    let (answer, _) = exchange(server, &message).await.expect("an answer");
    answer
}

pub(crate) async fn ask_tcp(server: SocketAddr, message: &Message) -> Message {
    let mut stream = TcpStream::connect(server).await.unwrap();
    let bytes = message.to_vec().unwrap();
    stream.write_u16(bytes.len() as u16).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
    let length = stream.read_u16().await.unwrap();
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await.unwrap();
    Message::from_vec(&answer).unwrap()
}

/// The answer in words: code, then the sorted contents of the records, then what denies the rest.
pub(crate) fn shown(answer: &Message) -> String {
    let mut records: Vec<String> = answer
        .answers
        .iter()
        .map(|record| format!("{}={}", record.record_type(), record.data))
        .collect();
    records.sort();
    let code = match answer.metadata.response_code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::NotImp => "NOTIMP",
        ResponseCode::FormErr => "FORMERR",
        // One number for two meanings; the other is TSIG's.
        ResponseCode::BADVERS | ResponseCode::BADSIG => "BADVERS",
        other => panic!("unexpected {other:?}"),
    };
    let soa = answer
        .authorities
        .iter()
        .filter(|record| record.record_type() == RecordType::SOA)
        .map(|record| format!("soa:{}", record.name));
    std::iter::once(code.to_owned())
        .chain(records)
        .chain(soa)
        .collect::<Vec<_>>()
        .join(" ")
}

/// How the played upstream behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Manner {
    Prompt,
    /// Answers after this time.
    Slow(Duration),
    Silent,
}

/// An upstream that knows a few names of example.com.
pub(crate) struct PlayedUpstream {
    pub(crate) address: SocketAddr,
    pub(crate) udp_questions: Arc<AtomicUsize>,
    pub(crate) tcp_questions: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for PlayedUpstream {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl PlayedUpstream {
    pub(crate) async fn start(manner: Manner) -> Self {
        Self::start_at(free_address(), manner).await
    }

    pub(crate) async fn start_at(address: SocketAddr, manner: Manner) -> Self {
        let socket = Arc::new(UdpSocket::bind(address).await.unwrap());
        let address = socket.local_addr().unwrap();
        let listener = TcpListener::bind(address).await.unwrap();
        let udp_questions = Arc::new(AtomicUsize::new(0));
        let tcp_questions = Arc::new(AtomicUsize::new(0));
        let counter = udp_questions.clone();
        let udp = tokio::spawn(async move {
            let mut buffer = [0; 4096];
            loop {
                let Ok((length, client)) = socket.recv_from(&mut buffer).await else {
                    continue;
                };
                counter.fetch_add(1, Ordering::Relaxed);
                let question = Message::from_vec(&buffer[..length]).unwrap();
                let socket = socket.clone();
                tokio::spawn(async move {
                    if !pause(manner).await {
                        return;
                    }
                    let mut answer = example_com(&question);
                    if answer.answers.len() > 20 {
                        answer.answers.clear();
                        answer.metadata.truncation = true;
                    }
                    socket
                        .send_to(&answer.to_vec().unwrap(), client)
                        .await
                        .unwrap();
                });
            }
        });
        let counter = tcp_questions.clone();
        let tcp = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let counter = counter.clone();
                tokio::spawn(async move {
                    while let Ok(length) = stream.read_u16().await {
                        let mut bytes = vec![0; usize::from(length)];
                        stream.read_exact(&mut bytes).await.unwrap();
                        counter.fetch_add(1, Ordering::Relaxed);
                        if !pause(manner).await {
                            return;
                        }
                        let answer = example_com(&Message::from_vec(&bytes).unwrap());
                        let answer = answer.to_vec().unwrap();
                        stream.write_u16(answer.len() as u16).await.unwrap();
                        stream.write_all(&answer).await.unwrap();
                    }
                });
            }
        });
        Self {
            address,
            udp_questions,
            tcp_questions,
            tasks: vec![udp, tcp],
        }
    }
}

async fn pause(manner: Manner) -> bool {
    match manner {
        Manner::Prompt => true,
        Manner::Slow(time) => {
            tokio::time::sleep(time).await;
            true
        }
        Manner::Silent => false,
    }
}

fn example_com(question: &Message) -> Message {
    let query = question.queries[0].clone();
    let name = query.name().clone();
    let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
    answer.metadata.recursion_available = true;
    answer.add_query(query.clone());
    let text = name.to_lowercase().to_string();
    let address = |name: &Name, last: u8| {
        Record::from_rdata(
            name.clone(),
            60,
            RData::A(std::net::Ipv4Addr::new(192, 0, 2, last).into()),
        )
    };
    let zone = Name::from_ascii("example.com.").unwrap();
    let soa = Record::from_rdata(
        zone.clone(),
        60,
        RData::SOA(SOA::new(zone.clone(), zone.clone(), 1, 2, 3, 4, 60)),
    );
    match (text.as_str(), query.query_type()) {
        ("www.example.com.", RecordType::A) => {
            answer.add_answer(address(&name, 1));
        }
        ("www.example.com." | "big.example.com.", _) if query.query_type() != RecordType::A => {
            answer.add_authority(soa);
        }
        ("big.example.com.", RecordType::A) => {
            answer.add_answers((0..100).map(|n| address(&name, n)));
        }
        ("alias.example.com.", RecordType::A) => {
            let target = Name::from_ascii("www.example.com.").unwrap();
            answer.add_answer(Record::from_rdata(
                name,
                60,
                RData::CNAME(CNAME(target.clone())),
            ));
            answer.add_answer(address(&target, 1));
        }
        ("refused.example.com.", _) => {
            answer.metadata.response_code = ResponseCode::Refused;
        }
        (text, RecordType::A) if text.starts_with("any-") => {
            answer.add_answer(address(&name, 7));
        }
        _ => {
            answer.metadata.response_code = ResponseCode::NXDomain;
            answer.add_authority(soa);
        }
    }
    answer
}

/// Waits until it is so, or panics with what was waited for.
pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(tokio::time::Instant::now() < end, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
