//! The two ends of a measured exchange: a blocking server, and a client that times each transaction. Both
//! are pinned to one CPU, so that a round trip is the sum of all work on the path.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// What one transaction is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Transaction {
    /// One byte each way on an open connection.
    TcpRr,
    /// Connect, one byte each way, close.
    TcpCrr,
    /// One byte each way on a connected datagram socket.
    UdpRr,
    /// `connect()` of a datagram socket and nothing else.
    UdpConnect,
}

/// The distribution of one run, in nanoseconds.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Latency {
    pub(crate) p01: u64,
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    pub(crate) count: usize,
}

/// Serves TCP and UDP on a port until it is ended: every byte is answered by one, which tells who answered.
pub(crate) fn serve(port: u16, cpu: usize, answer: u8) -> Result<()> {
    pin(cpu)?;
    let udp = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).context("bind UDP")?;
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, peer)) = udp.recv_from(&mut buffer) {
            buffer[..length].fill(answer);
            if udp.send_to(&buffer[..length], peer).is_err() {
                break;
            }
        }
    });
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("bind TCP")?;
    println!("ready");
    for stream in listener.incoming() {
        respond(stream.context("accept")?, answer);
    }
    Ok(())
}

/// Answers until the client closes; one that breaks off is the client's to report.
fn respond(mut stream: TcpStream, answer: u8) {
    let mut buffer = [0; 64];
    if stream.set_nodelay(true).is_err() {
        return;
    }
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        buffer[..length].fill(answer);
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// Where a client connects, and who has to answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Destination {
    pub(crate) address: SocketAddr,
    /// What the server meant answers with.
    pub(crate) answer: u8,
}

/// Runs transactions and returns their distribution. The first tenth is warm-up.
///
/// # Errors
/// Nobody answers, or another server than the one that is meant.
pub(crate) fn measure(
    what: Transaction,
    target: Destination,
    count: usize,
    cpu: usize,
) -> Result<Latency> {
    pin(cpu)?;
    let warm_up = count / 10;
    let mut nanos = Vec::with_capacity(count);
    let mut once = transaction(what, target)?;
    for i in 0..warm_up + count {
        let start = Instant::now();
        once()?;
        if i >= warm_up {
            nanos.push(start.elapsed().as_nanos() as u64);
        }
    }
    nanos.sort_unstable();
    if nanos.len() < 100 {
        bail!("{} transactions are too few for percentiles", nanos.len());
    }
    let at = |percent: usize| nanos[nanos.len() * percent / 100];
    Ok(Latency {
        p01: at(1),
        p50: at(50),
        p99: at(99),
        count: nanos.len(),
    })
}

/// What is sent. No server answers with it.
const QUESTION: u8 = 0;

type Once = Box<dyn FnMut() -> Result<()>>;

fn transaction(what: Transaction, target: Destination) -> Result<Once> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let Destination {
        address: target,
        answer,
    } = target;
    let local: SocketAddr = if target.is_ipv4() {
        SocketAddr::from(([0, 0, 0, 0], 0))
    } else {
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
    };
    let is_right = move |byte: u8| {
        if byte == answer {
            return Ok(());
        }
        bail!("{target} was answered by server {byte} and not by {answer}")
    };
    let exchange = move |stream: &mut TcpStream| -> Result<()> {
        let mut byte = [QUESTION];
        stream.write_all(&byte).context("send")?;
        stream.read_exact(&mut byte).context("receive")?;
        is_right(byte[0])
    };
    Ok(match what {
        Transaction::TcpRr => {
            let mut stream = TcpStream::connect(target).context("connect")?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Box::new(move || exchange(&mut stream))
        }
        Transaction::TcpCrr => Box::new(move || {
            let mut stream = TcpStream::connect(target).context("connect")?;
            stream.set_read_timeout(Some(PATIENCE))?;
            exchange(&mut stream)
        }),
        Transaction::UdpRr => {
            let socket = UdpSocket::bind(local)?;
            socket.connect(target)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Box::new(move || {
                let mut byte = [QUESTION];
                socket.send(&byte).context("send")?;
                socket.recv(&mut byte).context("receive")?;
                is_right(byte[0])
            })
        }
        Transaction::UdpConnect => {
            let socket = UdpSocket::bind(local)?;
            Box::new(move || socket.connect(target).context("connect"))
        }
    })
}

/// Keeps this thread on one CPU.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).context("name the CPU")?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("pin to CPU {cpu}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_another_server_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                respond(stream.unwrap(), 3);
            }
        });
        for what in [Transaction::TcpRr, Transaction::TcpCrr] {
            let ask = |answer| transaction(what, Destination { address, answer }).unwrap()();
            ask(3).unwrap();
            let said = ask(4).unwrap_err().to_string();
            assert!(said.contains("by server 3 and not by 4"), "{said}");
        }
    }
}
