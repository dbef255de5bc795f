//! One process gives its sockets to the next on the same host, so that an update loses no question.
//! Here are the two ends of the unix socket between them; who reads when is in `turn`.
//!
//! The next process gets the *same* sockets, not others beside them: what waits in the queue of a UDP
//! socket or of a TCP listener is closed with the last process that has it, so whoever ends takes
//! nothing along. (Why not steer with SO_REUSEPORT: docs/decisions.)

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use socket2::{Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::debug;

/// Processes that can offer the same sockets at once: two in an update, and room for crashes in it.
const PLACES: u32 = 8;
/// How long a process that offers its sockets may take to say so. One that is stopped never does.
const PATIENCE: Duration = Duration::from_secs(1);
/// Beside the sockets: the version of this exchange.
const VERSION: u8 = 1;
/// What the next process says when it reads the sockets.
const READING: u8 = b'r';

/// The sockets of a process that still answers, and the way to hear when it does not any more.
#[derive(Debug)]
pub struct Inherited {
    pub udp: UdpSocket,
    pub tcp: TcpListener,
    pub before: UnixStream,
}

/// Whom to give sockets to, and to take them from: root, and these users.
#[derive(Clone, Debug)]
pub struct Trusted(pub Vec<u32>);

impl Trusted {
    fn includes(&self, uid: u32) -> bool {
        uid == 0 || self.0.contains(&uid)
    }

    /// Whether who has connected may have our sockets.
    pub fn check(&self, next: &tokio::net::UnixStream) -> io::Result<()> {
        let asker = next.peer_cred()?.uid();
        match self.includes(asker) {
            true => Ok(()),
            false => Err(refused(format!("asked for by user {asker}"))),
        }
    }
}

/// The sockets on `address` of a process that answers there; `None` if nobody offers any.
pub fn take(address: SocketAddr, trusted: &Trusted) -> Option<Inherited> {
    if cfg!(feature = "broken-close-first") || address.port() == 0 {
        return None;
    }
    (0..PLACES).find_map(|place| match take_from(address, place, trusted) {
        Ok(inherited) => Some(inherited),
        // Nobody is at this place.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => None,
        Err(error) => {
            debug!(%address, place, %error, "sockets not taken");
            None
        }
    })
}

fn take_from(address: SocketAddr, place: u32, trusted: &Trusted) -> io::Result<Inherited> {
    let before = UnixStream::connect_addr(&name(address, place)?)?;
    let owner = socket_peercred(&before)?.uid.as_raw();
    if !trusted.includes(owner) {
        return Err(refused(format!("they are offered by user {owner}")));
    }
    before.set_read_timeout(Some(PATIENCE))?;
    let (udp, tcp) = receive(&before)?;
    let (udp, tcp) = (Socket::from(udp), Socket::from(tcp));
    let is_on = |socket: &Socket| {
        let local = socket.local_addr().ok().and_then(|it| it.as_socket());
        local == Some(address)
    };
    if !is_on(&udp) || udp.r#type()? != Type::DGRAM || udp.peer_addr().is_ok() {
        return Err(refused("the first is no UDP socket of that address"));
    }
    if !is_on(&tcp) || tcp.r#type()? != Type::STREAM || !tcp.is_listener()? {
        return Err(refused("the second is no TCP listener of that address"));
    }
    before.set_nonblocking(true)?;
    Ok(Inherited {
        udp: udp.into(),
        tcp: tcp.into(),
        before,
    })
}

/// Opens the place where the next process finds us. Later ones find another if we live on.
pub fn offer(address: SocketAddr) -> io::Result<tokio::net::UnixListener> {
    let mut taken = io::Error::from(ErrorKind::AddrInUse);
    for place in 0..PLACES {
        match UnixListener::bind_addr(&name(address, place)?) {
            Ok(listener) => {
                listener.set_nonblocking(true)?;
                return tokio::net::UnixListener::from_std(listener);
            }
            Err(error) if error.kind() == ErrorKind::AddrInUse => taken = error,
            Err(error) => return Err(error),
        }
    }
    Err(taken)
}

/// Gives sockets to a process that asked and was checked.
pub fn give(
    next: &tokio::net::UnixStream,
    udp: BorrowedFd<'_>,
    tcp: BorrowedFd<'_>,
) -> io::Result<()> {
    let sockets = [udp, tcp];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    if !message.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(io::Error::from(ErrorKind::OutOfMemory));
    }
    // One byte into an empty socket: it never waits.
    sendmsg(
        next.as_fd(),
        &[IoSlice::new(&[VERSION])],
        &mut message,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Tells the process before us that we read.
pub async fn say_reading(before: &mut tokio::net::UnixStream) -> io::Result<()> {
    before.write_all(&[READING]).await
}

/// Waits until the next process reads; an error if it ended without.
pub async fn hear_reading(next: &mut tokio::net::UnixStream) -> io::Result<()> {
    match next.read_u8().await? {
        READING => Ok(()),
        _ => Err(io::Error::from(ErrorKind::InvalidData)),
    }
}

/// Waits until the process at the other end is gone.
pub async fn gone(other: &mut tokio::net::UnixStream) {
    let mut byte = [0];
    while matches!(other.read(&mut byte).await, Ok(1..)) {}
}

fn receive(before: &UnixStream) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let mut version = [0];
    let received = recvmsg(
        before,
        &mut [IoSliceMut::new(&mut version)],
        &mut message,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Err(io::Error::from(ErrorKind::UnexpectedEof));
    }
    if version != [VERSION] {
        return Err(refused(format!("version {version:?} of the exchange")));
    }
    let mut sockets = message.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    let mut sockets = sockets.next().into_iter().flatten();
    match (sockets.next(), sockets.next()) {
        (Some(udp), Some(tcp)) => Ok((udp, tcp)),
        _ => Err(refused("without sockets")),
    }
}

/// In the abstract namespace, which is the network namespace's: two pods on the host's network share
/// it and no folder, and it leaves nothing behind.
fn name(address: SocketAddr, place: u32) -> io::Result<UnixAddr> {
    UnixAddr::from_abstract_name(format!("weir-dns/{address}/{place}"))
}

fn refused(why: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, why.into())
}
