//! Downloads that take long, and the server that they come from: on SIGTERM it finishes what it sends, as real ones
//! do. Every byte is compared; each download ends in exactly one of the outcomes that the client prints as JSON.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// Of the head of a request or an answer, in bytes.
const HEAD: usize = 4096;
/// Who answered.
const SERVER: &str = "\r\nServer: ";

#[derive(Debug, Parser)]
enum Task {
    Serve(Serve),
    Fetch(Fetch),
}

/// Answers `/` with its name, `/healthz`, and `/SEED/PIECES/BYTES/MILLISECONDS` with so many pieces of so many bytes, one
/// each so many milliseconds. Nobody but a probe is served before a probe has found it ready, and no new request after
/// SIGTERM: who asks then gets 503, which a client counts.
#[derive(Debug, Args)]
struct Serve {
    #[arg(long)]
    name: String,
    /// TCP, host order.
    #[arg(long)]
    port: u16,
    /// For so many milliseconds it tells probes that it is not ready.
    #[arg(long, default_value_t = 0)]
    warm_up: u64,
    /// No probe comes: it is ready without one.
    #[arg(long)]
    unprobed: bool,
}

#[derive(Debug, Clone, Args)]
struct Fetch {
    /// Whom to ask; of several, in turn.
    #[arg(long, required = true)]
    target: Vec<SocketAddr>,
    /// Downloads, all at once.
    #[arg(long)]
    count: u32,
    /// How long each takes at least.
    #[arg(long)]
    seconds: u32,
    /// Bytes of a piece, of which there are five a second.
    #[arg(long, default_value_t = 4096)]
    piece: u32,
    /// One that gets nothing for so many seconds has failed.
    #[arg(long, default_value_t = 10)]
    patience: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Warming,
    Ready,
    Draining,
}

#[tokio::main]
async fn main() -> Result<()> {
    match Task::parse() {
        Task::Serve(serve) => serve.run().await,
        Task::Fetch(fetch) => fetch.run().await,
    }
}

/// The byte of a body at this place: of a stream of SplitMix64, which begins far from that of the next seed.
fn byte(seed: u64, place: u64) -> u8 {
    let start = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
    let mut word = start.wrapping_add(place / 8).wrapping_add(1);
    word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (word ^ (word >> 31)).to_le_bytes()[(place % 8) as usize]
}

impl Serve {
    async fn run(self) -> Result<()> {
        let mut end = signal(SignalKind::terminate())?;
        let first = if self.unprobed {
            Stage::Ready
        } else {
            Stage::Warming
        };
        let (stage, _) = watch::channel(first);
        let stage = Arc::new(stage);
        let begin = Instant::now();
        let listener = listen(self.port).with_context(|| format!("listen on {}", self.port))?;
        println!("ready");
        // Whoever has a sender of it is sending.
        let (sending, mut sent) = mpsc::channel::<()>(1);
        let name: Arc<str> = self.name.into();
        let warm_up = Duration::from_millis(self.warm_up);
        let accept = async {
            loop {
                let (stream, _) = listener.accept().await.context("accept")?;
                let (stage, name, sending) = (stage.clone(), name.clone(), sending.clone());
                tokio::spawn(async move {
                    let is_warm = begin.elapsed() >= warm_up;
                    // Who goes away has counted that itself.
                    answer(stream, &stage, is_warm, &name).await.ok();
                    drop(sending);
                });
            }
        };
        let ended: Result<()> = tokio::select! {
            ended = accept => ended,
            _ = end.recv() => Ok(()),
        };
        ended?;
        stage.send_replace(Stage::Draining);
        // New ones are accepted until the last is finished, and told so.
        let late = async {
            while let Ok((stream, _)) = listener.accept().await {
                let (stage, name) = (stage.clone(), name.clone());
                tokio::spawn(async move { answer(stream, &stage, true, &name).await.ok() });
            }
        };
        drop(sending);
        tokio::select! {
            () = late => {}
            _ = sent.recv() => {}
        }
        Ok(())
    }
}

/// With room for seconds of connections: a server that waits for a busy core must not lose any.
fn listen(port: u16) -> std::io::Result<TcpListener> {
    const BACKLOG: u32 = 4096;
    let socket = TcpSocket::new_v6()?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv6Addr::UNSPECIFIED, port).into())?;
    socket.listen(BACKLOG)
}

async fn answer(
    mut stream: TcpStream,
    stage: &watch::Sender<Stage>,
    is_warm: bool,
    name: &str,
) -> Result<()> {
    let (head, _) = head(&mut stream).await?;
    let path = head.split(' ').nth(1).context("a request has a path")?;
    let now = *stage.borrow();
    if path == "/healthz" && is_warm && now == Stage::Warming {
        stage.send_replace(Stage::Ready);
    }
    let now = *stage.borrow();
    if now != Stage::Ready {
        let why = format!("{now:?}");
        let length = why.len();
        let said = format!(
            "HTTP/1.1 503 {why}{SERVER}{name}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{why}"
        );
        return finish(stream, said.as_bytes()).await;
    }
    let length = |bytes: u64| {
        format!(
            "HTTP/1.1 200 OK{SERVER}{name}\r\nConnection: close\r\nContent-Length: {bytes}\r\n\r\n"
        )
    };
    let numbers: Option<Vec<u64>> = path.split('/').skip(1).map(|n| n.parse().ok()).collect();
    let Some(&[seed, pieces, bytes, millis]) = numbers.as_deref() else {
        let said = length(name.len() as u64) + name;
        return finish(stream, said.as_bytes()).await;
    };
    stream.set_nodelay(true)?;
    stream.write_all(length(pieces * bytes).as_bytes()).await?;
    let mut ticks = interval(Duration::from_millis(millis.max(1)));
    // A late piece is made up for, so that it takes as long as it should.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for piece in 0..pieces {
        ticks.tick().await;
        let places = piece * bytes..(piece + 1) * bytes;
        let piece: Vec<u8> = places.map(|place| byte(seed, place)).collect();
        stream.write_all(&piece).await?;
    }
    finish(stream, b"").await
}

/// The last bytes of an answer. A socket that is closed before the other end has closed would take them back.
async fn finish(mut stream: TcpStream, last: &[u8]) -> Result<()> {
    stream.write_all(last).await?;
    stream.shutdown().await?;
    tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    Ok(())
}

/// The head of a request or an answer, and what came of the body.
async fn head(stream: &mut TcpStream) -> Result<(String, Vec<u8>)> {
    const END: &[u8] = b"\r\n\r\n";
    let mut read = Vec::new();
    loop {
        if let Some(end) = read.windows(END.len()).position(|it| it == END) {
            let body = read.split_off(end + END.len());
            return Ok((String::from_utf8(read)?, body));
        }
        if read.len() > HEAD {
            bail!("a long head");
        }
        if stream.read_buf(&mut read).await? == 0 {
            bail!("ended in the head");
        }
    }
}

/// What became of one.
struct Ended {
    target: SocketAddr,
    /// Nobody, if it did not begin.
    server: String,
    outcome: String,
    bytes: u64,
    took: Duration,
}

impl Fetch {
    /// Between two pieces, in milliseconds.
    const EVERY: u32 = 200;

    async fn run(self) -> Result<()> {
        let (begun, mut beginnings) = mpsc::channel(self.count.max(1) as usize);
        let mut running = JoinSet::new();
        let base = u64::from(std::process::id()) << 32;
        for (n, target) in (0..self.count).zip(self.target.iter().cycle()) {
            let (of_one, target, begun) = (self.clone(), *target, begun.clone());
            running.spawn(async move { of_one.download(target, base + u64::from(n), begun).await });
            // A server's queue is not what is looked at here.
            sleep(Duration::from_millis(2)).await;
        }
        drop(begun);
        // One that ended without a beginning has given its sender back.
        let mut count = 0;
        while beginnings.recv().await.is_some() {
            count += 1;
        }
        println!("{}", serde_json::json!({ "begun": count }));
        std::io::stdout().flush()?;

        let mut outcomes: BTreeMap<String, u64> = BTreeMap::new();
        let mut served: BTreeMap<SocketAddr, BTreeMap<String, u64>> = BTreeMap::new();
        let mut bytes = 0;
        let mut shortest: Option<Duration> = None;
        while let Some(ended) = running.join_next().await {
            let ended = ended.context("a download's task")?;
            if ended.outcome == "ok" {
                shortest = Some(shortest.map_or(ended.took, |it| it.min(ended.took)));
            } else {
                let after = ended.took.as_millis();
                eprintln!(
                    "{}, {}: {} after {after} ms",
                    ended.target, ended.server, ended.outcome
                );
            }
            *outcomes.entry(ended.outcome).or_default() += 1;
            let of_target = served.entry(ended.target).or_default();
            *of_target.entry(ended.server).or_default() += 1;
            bytes += ended.bytes;
        }
        let said = serde_json::json!({
            "attempted": self.count,
            "outcomes": outcomes,
            "served": served,
            "bytes": bytes,
            "shortest_ms": shortest.unwrap_or_default().as_millis() as u64,
        });
        println!("{said}");
        Ok(())
    }

    async fn download(self, target: SocketAddr, seed: u64, begun: mpsc::Sender<()>) -> Ended {
        let start = Instant::now();
        let mut ended = Ended {
            target,
            server: "nobody".to_owned(),
            outcome: String::new(),
            bytes: 0,
            took: Duration::ZERO,
        };
        let outcome = self.all_of_it(seed, begun, &mut ended).await;
        ended.outcome = match outcome {
            Ok(()) => "ok".to_owned(),
            Err(error) => match error
                .downcast_ref::<std::io::Error>()
                .map(std::io::Error::kind)
            {
                Some(ErrorKind::ConnectionRefused) => "refused".to_owned(),
                Some(ErrorKind::ConnectionReset) => "reset".to_owned(),
                _ => format!("{error:#}"),
            },
        };
        ended.took = start.elapsed();
        ended
    }

    async fn all_of_it(self, seed: u64, begun: mpsc::Sender<()>, ended: &mut Ended) -> Result<()> {
        let patience = Duration::from_secs(self.patience);
        let silent = |_| anyhow!("silence");
        let pieces = u64::from(self.seconds * 1000 / Self::EVERY) + 1;
        let all = pieces * u64::from(self.piece);
        let asked = async {
            let mut stream = TcpStream::connect(ended.target).await?;
            let (piece, every) = (self.piece, Self::EVERY);
            let request = format!(
                "GET /{seed}/{pieces}/{piece}/{every} HTTP/1.1\r\nHost: depot\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).await?;
            let (head, body) = head(&mut stream).await?;
            anyhow::Ok((stream, head, body))
        };
        let (mut stream, head, mut body) = timeout(patience, asked).await.map_err(silent)??;
        let server = head
            .split_once(SERVER)
            .and_then(|(_, it)| it.lines().next());
        server.unwrap_or("somebody").clone_into(&mut ended.server);
        if !head.starts_with("HTTP/1.1 200 ") {
            bail!("{}", head.lines().next().unwrap_or_default());
        }
        let mut begun = Some(begun);
        loop {
            for got in body.drain(..) {
                if ended.bytes == all || got != byte(seed, ended.bytes) {
                    bail!("a wrong byte");
                }
                ended.bytes += 1;
            }
            if ended.bytes > 0
                && let Some(begun) = begun.take()
            {
                // It has room for all.
                begun.send(()).await.ok();
            }
            let read = stream.read_buf(&mut body);
            if timeout(patience, read).await.map_err(silent)?? == 0 {
                break;
            }
        }
        match ended.bytes == all {
            true => Ok(()),
            false => bail!("ended early"),
        }
    }
}
