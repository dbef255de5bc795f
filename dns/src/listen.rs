//! The sockets that questions arrive on: those of the process before, if it still answers, or new ones,
//! opened with the privilege to do so, before it is given up.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tracing::warn;

use crate::hand_over::{Folder, Giver};
use crate::metrics::Transport;

/// Room for a burst of questions, in bytes.
const RECEIVE_BUFFER: usize = 4 << 20;
const BACKLOG: i32 = 512;

/// UDP and TCP on one address.
#[derive(Debug)]
pub struct Listener {
    pub address: SocketAddr,
    pub udp: UdpSocket,
    pub tcp: TcpListener,
    pub origin: Origin,
}

/// Where sockets come from.
#[derive(Debug)]
pub enum Origin {
    /// We opened them, and nobody else has them.
    Opened,
    /// From this process, which answers until we do.
    Reader(UnixStream),
    /// From one that only kept them.
    Holder,
}

/// Why an address cannot be listened on; the text says what to do.
#[derive(Debug)]
pub struct ListenError {
    pub address: SocketAddr,
    pub transport: Transport,
    pub source: io::Error,
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, flag) = match self.transport {
            Transport::Udp => ("UDP", "-lnup"),
            Transport::Tcp => ("TCP", "-lntp"),
        };
        let (address, port) = (self.address, self.address.port());
        write!(f, "cannot listen on {transport} {address}: ")?;
        match self.source.kind() {
            io::ErrorKind::AddrInUse => write!(
                f,
                "another program has it. Stop that one (`ss {flag} 'sport = :{port}'` names it) or \
                 give another --listen"
            ),
            io::ErrorKind::PermissionDenied => write!(
                f,
                "port {port} needs root or CAP_NET_BIND_SERVICE. Grant it, or give a port from 1024 \
                 up"
            ),
            _ => write!(f, "{}", self.source),
        }
    }
}

impl std::error::Error for ListenError {}

impl ListenError {
    /// Whether this host lacks the address's family: IPv6 that was switched off when it was booted. One that is off
    /// by sysctl is none: the sockets wait for the address.
    fn is_for_want_of_family(&self) -> bool {
        matches!(
            Errno::from_io_error(&self.source),
            Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL)
        )
    }
}

/// Listens on every address whose family this host has. A family cannot come without a boot, so nobody waits
/// for it.
///
/// # Errors
/// Another reason than that, or not one of the addresses is left.
pub fn everywhere(
    addresses: &[SocketAddr],
    open: impl Fn(SocketAddr) -> Result<Listener, ListenError>,
) -> Result<Vec<Listener>, ListenError> {
    let (mut listeners, mut lacking) = (Vec::new(), Vec::new());
    for address in addresses {
        match open(*address) {
            Ok(listener) => listeners.push(listener),
            Err(error) if error.is_for_want_of_family() => lacking.push(error),
            Err(error) => return Err(error),
        }
    }
    if listeners.is_empty()
        && let Some(error) = lacking.pop()
    {
        return Err(error);
    }
    for ListenError {
        address, source, ..
    } in lacking
    {
        warn!(%address, error = %source, "this host lacks the family: nobody is answered there");
    }
    Ok(listeners)
}

impl Listener {
    /// The sockets of a process that answers there already, or new ones. Those of a version without a folder
    /// must be of one of these users.
    pub fn take_or_open(
        address: SocketAddr,
        folder: &Folder,
        users: &[u32],
    ) -> Result<Self, ListenError> {
        let Some(inherited) = folder.take_from_any(address, users) else {
            return Self::open(address);
        };
        Ok(Self {
            address,
            udp: inherited.udp,
            tcp: inherited.tcp,
            origin: match inherited.giver {
                Giver::Reads => Origin::Reader(inherited.link),
                Giver::Holds => Origin::Holder,
            },
        })
    }

    /// Opens both sockets.
    pub fn open(address: SocketAddr) -> Result<Self, ListenError> {
        let failed = |address, transport| {
            move |source| ListenError {
                address,
                transport,
                source,
            }
        };
        let udp: UdpSocket = open(address, Transport::Udp)
            .map_err(failed(address, Transport::Udp))?
            .into();
        let tcp = open(address, Transport::Tcp)
            .map_err(failed(address, Transport::Tcp))?
            .into();
        Ok(Self {
            address,
            udp,
            tcp,
            origin: Origin::Opened,
        })
    }
}

fn open(address: SocketAddr, transport: Transport) -> io::Result<Socket> {
    let (kind, protocol) = match transport {
        Transport::Udp => (Type::DGRAM, Protocol::UDP),
        Transport::Tcp => (Type::STREAM, Protocol::TCP),
    };
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv6() {
        // So that [::]:53 and 0.0.0.0:53 can both be listened on.
        socket.set_only_v6(true)?;
    }
    // For who can take nothing over: an older version, or where unix sockets are forbidden.
    socket.set_reuse_port(true)?;
    if let Transport::Tcp = transport {
        socket.set_reuse_address(true)?;
    }
    // The agent puts the address on a device, perhaps after we have started.
    match address {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    match transport {
        // The kernel gives what it may; less is not an error.
        Transport::Udp => socket.set_recv_buffer_size(RECEIVE_BUFFER)?,
        Transport::Tcp => socket.listen(BACKLOG)?,
    }
    Ok(socket)
}
