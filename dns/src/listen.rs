//! The sockets that questions arrive on. They are opened with the privilege to do so, before it is
//! given up; a new process may open the same ones while the old still answers.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

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

impl Listener {
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
        Ok(Self { address, udp, tcp })
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
    // The next version of this process takes over without a gap.
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
