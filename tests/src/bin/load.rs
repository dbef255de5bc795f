//! A client that counts honestly: every attempt ends in exactly one of the outcomes that it prints as JSON.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

#[derive(Clone, Debug, Parser)]
struct Args {
    /// What to do at each tick.
    #[arg(long, value_enum)]
    kind: Kind,
    /// Whom to ask.
    #[arg(long)]
    target: SocketAddr,
    /// The name to look up, for `dns` and `dns-tcp`.
    #[arg(long, default_value = "kubernetes.default.svc.cluster.local.")]
    name: String,
    /// Attempts per second.
    #[arg(long)]
    rate: u32,
    /// How long, in seconds.
    #[arg(long)]
    seconds: f64,
    /// Others who are asked in turn.
    #[arg(long)]
    also: Vec<SocketAddr>,
    /// Ends earlier when nobody holds its stdin open any more.
    #[arg(long)]
    until_eof: bool,
    /// An attempt that takes longer has failed, in milliseconds.
    #[arg(long, default_value_t = 1000)]
    patience: u64,
    /// An attempt that failed is made once more after this many milliseconds, as a resolver would.
    #[arg(long)]
    retry_after: Option<u64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// Connect, ask, read the answer, close.
    Http,
    /// A datagram to an echo server, from a new socket.
    Udp,
    /// A question of type A, from a new socket.
    Dns,
    /// The same over a connection of its own.
    DnsTcp,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    if args.rate == 0 {
        bail!("--rate must be at least 1");
    }
    let mut ticks = interval(Duration::from_secs(1) / args.rate);
    // A late tick is made up for, so that the count stated is the count made.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let attempts = (f64::from(args.rate) * args.seconds).round() as u64;
    let start = Instant::now();
    let mut running = JoinSet::new();
    let mut outcomes: BTreeMap<String, u64> = BTreeMap::new();
    let mut slowest = Duration::ZERO;
    let mut failures: BTreeMap<u64, u64> = BTreeMap::new();
    let mut count = |ended: Result<(String, Duration), tokio::task::JoinError>| -> Result<()> {
        let (outcome, took) = ended.context("an attempt's task")?;
        if !outcome.starts_with("ok") {
            let began = start.elapsed().saturating_sub(took);
            *failures.entry(began.as_millis() as u64 / 10).or_default() += 1;
        }
        *outcomes.entry(outcome).or_default() += 1;
        slowest = slowest.max(took);
        Ok(())
    };
    let mut eof = pin!(async {
        match args.until_eof {
            true => {
                let read = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                tokio::task::spawn_blocking(read).await
            }
            false => std::future::pending().await,
        }
    });
    let mut attempted = 0;
    let targets: Vec<_> = [args.target].into_iter().chain(args.also.clone()).collect();
    for target in targets.iter().cycle() {
        if attempted == attempts {
            break;
        }
        tokio::select! {
            _ = ticks.tick() => {}
            _ = &mut eof => break,
        }
        attempted += 1;
        running.spawn(attempts_of_one(Args {
            target: *target,
            ..args.clone()
        }));
        while let Some(ended) = running.try_join_next() {
            count(ended)?;
        }
    }
    while let Some(ended) = running.join_next().await {
        count(ended)?;
    }
    println!(
        "{}",
        serde_json::json!({
            "attempted": attempted,
            "outcomes": outcomes,
            "slowest_ms": slowest.as_millis() as u64,
            "failures_by_hundredth": failures,
            "took_ms": start.elapsed().as_millis() as u64,
        })
    );
    // A thread may still read stdin: it is not waited for.
    std::process::exit(0)
}

async fn attempts_of_one(args: Args) -> (String, Duration) {
    let first = attempt(args.clone()).await;
    let Some(pause) = args.retry_after.filter(|_| first.0 != "ok") else {
        return first;
    };
    tokio::time::sleep(Duration::from_millis(pause)).await;
    let (second, took) = attempt(args).await;
    let outcome = match second.as_str() {
        "ok" => "ok after a retry".to_owned(),
        failed => format!("{failed}, twice"),
    };
    (outcome, took)
}

async fn attempt(args: Args) -> (String, Duration) {
    let start = Instant::now();
    let tried = timeout(Duration::from_millis(args.patience), async {
        match args.kind {
            Kind::Http => http(args.target).await,
            Kind::Udp => udp(args.target).await,
            Kind::Dns => dns(args.target, &args.name).await,
            Kind::DnsTcp => dns_tcp(args.target, &args.name).await,
        }
    })
    .await;
    let outcome = match tried {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => match error
            .downcast_ref::<std::io::Error>()
            .map(std::io::Error::kind)
        {
            Some(ErrorKind::ConnectionRefused) => "refused".to_owned(),
            Some(ErrorKind::ConnectionReset) => "reset".to_owned(),
            _ => format!("{error:#}"),
        },
        Err(_) => "timeout".to_owned(),
    };
    (outcome, start.elapsed())
}

async fn http(target: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect(target).await?;
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: echo\r\nConnection: close\r\n\r\n")
        .await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(if answer.starts_with(b"HTTP/1.1 200") {
        "ok"
    } else {
        "bad answer"
    }
    .to_owned())
}

async fn udp(target: SocketAddr) -> Result<String> {
    let socket = any_socket(target).await?;
    socket.connect(target).await?;
    socket.send(b"ping").await?;
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer).await?;
    Ok(if buffer[..length].ends_with(b" ping") {
        "ok"
    } else {
        "bad answer"
    }
    .to_owned())
}

async fn dns(target: SocketAddr, name: &str) -> Result<String> {
    let socket = any_socket(target).await?;
    socket.connect(target).await?;
    socket.send(&question(name)?).await?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).await?;
    judged(&buffer[..length])
}

async fn dns_tcp(target: SocketAddr, name: &str) -> Result<String> {
    let question = question(name)?;
    let mut message = u16::try_from(question.len())?.to_be_bytes().to_vec();
    message.extend(question);
    let mut stream = TcpStream::connect(target).await?;
    stream.write_all(&message).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    judged(&answer)
}

fn question(name: &str) -> Result<Vec<u8>> {
    let mut message = Message::new(std::process::id() as u16, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name)?, RecordType::A));
    Ok(message.to_vec()?)
}

fn judged(answer: &[u8]) -> Result<String> {
    let answer = Message::from_vec(answer)?;
    Ok(match answer.metadata.response_code {
        ResponseCode::NoError if !answer.answers.is_empty() => "ok".to_owned(),
        code => format!("{code:?}"),
    })
}

async fn any_socket(target: SocketAddr) -> std::io::Result<UdpSocket> {
    if target.is_ipv4() {
        UdpSocket::bind("0.0.0.0:0").await
    } else {
        UdpSocket::bind("[::]:0").await
    }
}
