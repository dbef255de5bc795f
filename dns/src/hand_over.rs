//! One process gives its sockets to the next on the same host, so that an update loses no question.
//! Here are the two ends of the unix socket between them; who reads when is in `turn`.
//!
//! The next process gets the *same* sockets, not others beside them: what waits in the queue of a UDP
//! socket or of a TCP listener is closed with the last process that has it, so whoever ends takes
//! nothing along. (Why not steer with SO_REUSEPORT: decision 13.)

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use socket2::{Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::warn;

/// Processes that can offer the same sockets at once: two in an update, and room for crashes in it.
const PLACES: u32 = 8;
/// How long a process that offers its sockets may take to say so. One that is stopped never does.
const PATIENCE: Duration = Duration::from_secs(1);
/// Beside the sockets: who gives them. Another meaning needs another byte.
const FROM_READER: u8 = 1;
const FROM_HOLDER: u8 = 2;
/// What the next process says when it reads the sockets.
const READING: u8 = b'r';

/// Sockets that another process has too.
#[derive(Debug)]
pub struct Inherited {
    pub udp: UdpSocket,
    pub tcp: TcpListener,
    pub giver: Giver,
    /// Open until that process ends.
    pub link: UnixStream,
}

/// What a process that gives sockets away does with them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Giver {
    /// It answers.
    Reads,
    /// It only keeps them open: `hold`.
    Holds,
}

/// One of the names that sockets are offered under.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place(u32);

/// Whom to give sockets to, and to take them from: root, and these users.
#[derive(Clone, Debug)]
pub struct Trusted(pub Vec<u32>);

impl Trusted {
    fn includes(&self, uid: u32) -> bool {
        uid == 0 || self.0.contains(&uid)
    }

    /// Whether who has connected may have our sockets.
    pub fn check(&self, next: impl AsFd) -> io::Result<()> {
        let asker = peer_user(&next)?;
        match self.includes(asker) {
            true => Ok(()),
            false => Err(refused(format!("asked for by user {asker}"))),
        }
    }
}

/// The sockets on `address` of a process that answers there, or else of one that holds them; `None` if
/// nobody offers any.
pub fn take(address: SocketAddr, trusted: &Trusted) -> Option<Inherited> {
    take_except(address, None, trusted)
}

/// As [`take`], from everybody but the one at a place: ourselves.
pub fn take_except(
    address: SocketAddr,
    own: Option<Place>,
    trusted: &Trusted,
) -> Option<Inherited> {
    if cfg!(feature = "broken-close-first") || address.port() == 0 {
        return None;
    }
    let mut holder = None;
    for place in (0..PLACES).map(Place).filter(|it| Some(*it) != own) {
        match take_from(address, place, trusted) {
            Ok(inherited) if inherited.giver == Giver::Reads => return Some(inherited),
            Ok(inherited) => holder = holder.or(Some(inherited)),
            // Nobody is at this place.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) => warn!(%address, ?place, %error, "sockets not taken"),
        }
    }
    holder
}

fn take_from(address: SocketAddr, place: Place, trusted: &Trusted) -> io::Result<Inherited> {
    let link = UnixStream::connect_addr(&name(address, place)?)?;
    let owner = peer_user(&link)?;
    if !trusted.includes(owner) {
        return Err(refused(format!("they are offered by user {owner}")));
    }
    link.set_read_timeout(Some(PATIENCE))?;
    let (giver, udp, tcp) = receive(&link)?;
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
    link.set_read_timeout(None)?;
    Ok(Inherited {
        udp: udp.into(),
        tcp: tcp.into(),
        giver,
        link,
    })
}

/// Opens the place where the next process finds us. Later ones find another if we live on.
pub fn offer(address: SocketAddr) -> io::Result<(Place, UnixListener)> {
    let mut taken = io::Error::from(ErrorKind::AddrInUse);
    for place in (0..PLACES).map(Place) {
        match UnixListener::bind_addr(&name(address, place)?) {
            Ok(listener) => return Ok((place, listener)),
            Err(error) if error.kind() == ErrorKind::AddrInUse => taken = error,
            Err(error) => return Err(error),
        }
    }
    Err(taken)
}

/// Gives sockets to a process that asked and was checked.
pub fn give(
    next: impl AsFd,
    giver: Giver,
    udp: BorrowedFd<'_>,
    tcp: BorrowedFd<'_>,
) -> io::Result<()> {
    let giver = match giver {
        Giver::Reads => FROM_READER,
        Giver::Holds => FROM_HOLDER,
    };
    let sockets = [udp, tcp];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    if !message.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(io::Error::from(ErrorKind::OutOfMemory));
    }
    // One byte into an empty socket: it never waits.
    sendmsg(
        next,
        &[IoSlice::new(&[giver])],
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

/// Not by rustix: a process of another PID namespace has the pid 0 here, which its type cannot say, and what
/// comes out is an error (1.1.6).
fn peer_user(link: &impl AsFd) -> io::Result<u32> {
    Ok(getsockopt(link, PeerCredentials)?.uid())
}

fn receive(link: &UnixStream) -> io::Result<(Giver, OwnedFd, OwnedFd)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let mut giver = [0];
    let received = recvmsg(
        link,
        &mut [IoSliceMut::new(&mut giver)],
        &mut message,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Err(io::Error::from(ErrorKind::UnexpectedEof));
    }
    let giver = match giver {
        [FROM_READER] => Giver::Reads,
        [FROM_HOLDER] => Giver::Holds,
        other => return Err(refused(format!("a giver of an unknown kind, {other:?}"))),
    };
    let mut sockets = message.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    let mut sockets = sockets.next().into_iter().flatten();
    match (sockets.next(), sockets.next()) {
        (Some(udp), Some(tcp)) => Ok((giver, udp, tcp)),
        _ => Err(refused("without sockets")),
    }
}

/// In the abstract namespace, which is the network namespace's: two pods on the host's network share
/// it and no folder, and it leaves nothing behind.
fn name(address: SocketAddr, Place(number): Place) -> io::Result<UnixAddr> {
    UnixAddr::from_abstract_name(format!("weir-dns/{address}/{number}"))
}

fn refused(why: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, why.into())
}
