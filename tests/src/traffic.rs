//! Traffic that tests send themselves, from sockets in a pod's namespace. The test is in no cgroup of a
//! node, so no socket hook sees these sockets: what they send is decided packet by packet. What the hooks
//! are to see runs as a process (`Pod::command`, the program `weir-datagrams`).

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::Value;

use crate::netns::Netns;
use crate::node::Node;

/// How long an answer may take that is expected. Within a machine it takes microseconds.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How long something is waited for that should not come.
pub const SILENCE: Duration = Duration::from_millis(250);

/// What became of an attempt.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Answered by the pod of this name.
    By(String),
    Refused,
    Silence,
    Other(String),
}

impl From<io::Result<String>> for Answer {
    fn from(result: io::Result<String>) -> Self {
        match result {
            Ok(name) => Self::By(name),
            Err(e) => match e.kind() {
                ErrorKind::ConnectionRefused => Self::Refused,
                // A denied SYN is a timeout, a denied datagram a receive that would block for ever.
                ErrorKind::TimedOut | ErrorKind::WouldBlock => Self::Silence,
                _ => Self::Other(e.to_string()),
            },
        }
    }
}

/// An HTTP request on a new connection.
#[must_use]
pub fn ask_tcp(netns: &Netns, target: SocketAddr, patience: Duration) -> Answer {
    inside(netns, || Conversation::open(target, patience)?.ask()).into()
}

/// A datagram from a new socket.
#[must_use]
pub fn ask_udp(netns: &Netns, target: SocketAddr, patience: Duration) -> Answer {
    let asked = udp_socket(netns, any(target), patience).and_then(|socket| {
        socket.connect(target)?;
        exchange(&socket)
    });
    asked.into()
}

/// A TCP connection that stays open between requests.
#[derive(Debug)]
pub struct Conversation(TcpStream);

impl Conversation {
    /// Connects from the namespace of the caller's thread.
    ///
    /// # Errors
    /// Refused, or silence.
    pub fn open(target: SocketAddr, patience: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&target, patience)?;
        stream.set_read_timeout(Some(patience))?;
        Ok(Self(stream))
    }

    /// Connects from a namespace.
    ///
    /// # Errors
    /// Refused, or silence.
    pub fn open_in(netns: &Netns, target: SocketAddr, patience: Duration) -> io::Result<Self> {
        inside(netns, || Self::open(target, patience))
    }

    /// Who the other side is, as the socket knows it.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn peer(&self) -> io::Result<SocketAddr> {
        self.0.peer_addr()
    }

    /// One request; the answer is the name of the pod.
    ///
    /// # Errors
    /// No answer in time, or no HTTP.
    pub fn ask(&mut self) -> io::Result<String> {
        self.0.write_all(b"GET / HTTP/1.1\r\nHost: echo\r\n\r\n")?;
        let mut said = Vec::new();
        let mut buffer = [0; 2048];
        loop {
            let length = self.0.read(&mut buffer)?;
            if length == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            said.extend_from_slice(&buffer[..length]);
            let text = String::from_utf8_lossy(&said);
            // The body is one line: the name, a space and the client's address.
            if let Some((_, body)) = text.split_once("\r\n\r\n")
                && body.ends_with('\n')
            {
                return Ok(body.split(' ').next().unwrap_or_default().to_owned());
            }
        }
    }
}

/// A UDP socket that lives in a namespace.
///
/// # Errors
/// The address is not there, or taken.
pub fn udp_socket(netns: &Netns, local: SocketAddr, patience: Duration) -> io::Result<UdpSocket> {
    let socket = inside(netns, || UdpSocket::bind(local))?;
    socket.set_read_timeout(Some(patience))?;
    Ok(socket)
}

/// A datagram on a connected socket; the answer is the name of the pod.
///
/// # Errors
/// No answer in time.
pub fn exchange(socket: &UdpSocket) -> io::Result<String> {
    socket.send(b"ping")?;
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

/// Every address of the family of this one, any port.
#[must_use]
pub fn any(target: SocketAddr) -> SocketAddr {
    match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Is an ICMP echo answered?
///
/// # Errors
/// No socket for it to be had.
pub fn is_echoed(netns: &Netns, target: IpAddr, patience: Duration) -> Result<bool> {
    is_echoed_with(netns, target, 0, patience)
}

/// Is an ICMP echo that carries so many bytes answered, and does the answer carry them?
///
/// # Errors
/// As [`is_echoed`].
pub fn is_echoed_with(
    netns: &Netns,
    target: IpAddr,
    bytes: usize,
    patience: Duration,
) -> Result<bool> {
    // Who may open sockets for echoes is a setting of the namespace, for both families.
    netns.set_sysctl("net.ipv4.ping_group_range", "0 0")?;
    let (family, protocol, request) = match target {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128),
    };
    let socket: OwnedFd =
        netns.run(|| socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol))??;
    let wait = TimeVal::new(
        i64::try_from(patience.as_secs())?,
        i64::from(patience.subsec_micros()),
    );
    setsockopt(&socket, sockopt::ReceiveTimeout, &wait)?;
    connect(
        socket.as_raw_fd(),
        &SockaddrStorage::from(SocketAddr::new(target, 0)),
    )?;
    // Type, code, checksum, identifier and sequence; the kernel fills in checksum and identifier.
    let mut message = vec![request, 0, 0, 0, 0, 0, 0, 1];
    message.resize(8 + bytes, 7);
    let sent = send(
        socket.as_raw_fd(),
        &message,
        nix::sys::socket::MsgFlags::empty(),
    );
    sent.context("send an echo request")?;
    let mut buffer = vec![0; message.len() + 64];
    match recv(
        socket.as_raw_fd(),
        &mut buffer,
        nix::sys::socket::MsgFlags::empty(),
    ) {
        Ok(length) => Ok(length == message.len() && buffer[8..length] == message[8..]),
        Err(nix::errno::Errno::EAGAIN) => Ok(false),
        Err(other) => Err(other).context("receive an echo"),
    }
}

/// How many packets the node has dropped for a reason, exactly.
///
/// # Errors
/// The agent does not answer.
pub fn drops(node: &Node, reason: &str) -> Result<u64> {
    let answer = node.ask("drops")?;
    let totals = answer["totals"].as_array().context("drops have totals")?;
    let row = totals.iter().find(|row| row["reason"] == reason);
    Ok(row.map_or(0, |row| row["packets"].as_u64().unwrap_or_default()))
}

/// The explained drops of a reason, oldest first.
///
/// # Errors
/// The agent does not answer.
pub fn recent_drops(node: &Node, reason: &str) -> Result<Vec<Value>> {
    let answer = node.ask("drops")?;
    let recent = answer["recent"].as_array().cloned().unwrap_or_default();
    Ok(recent
        .into_iter()
        .filter(|row| row["reason"] == reason)
        .collect())
}

/// Asks until the answer is as wanted.
///
/// # Errors
/// It was not in time; the error shows the last answer.
pub fn eventually<T: std::fmt::Debug>(
    what: &str,
    within: Duration,
    mut ask: impl FnMut() -> T,
    is_so: impl Fn(&T) -> bool,
) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        let answer = ask();
        if is_so(&answer) {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("not within {within:?}: {what}; last: {answer:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn inside<T: Send>(netns: &Netns, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    netns
        .run(f)
        .unwrap_or_else(|e| Err(io::Error::other(e.to_string())))
}
