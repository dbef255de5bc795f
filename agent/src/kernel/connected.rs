//! Connected UDP sockets of the node's own processes, and their end. Programs translate such a socket once, when it is
//! connected, and it hears of no change any more. When datagrams go to its backend no more it is ended: its process gets
//! `ECONNABORTED` once, connects anew and has another backend. A socket that its process has connected to a backend's
//! address itself is nobody's business: programs keep those of a service in `CONNECTED`, where no pod writes. Who has departed is `apply`'s.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use libc::{ENOENT, EOPNOTSUPP, EPERM, EPROTONOSUPPORT, ESTALE, IPPROTO_UDP};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;
use weir_common::service::{BackendId, Generation, SocketPeer};

use super::map::Plain;
use super::netlink::request::Requests;
use super::sys;
use crate::apply::Departed;
use crate::compile::BackendAddr;

/// The sockets of a network namespace, and what programs remember of them.
#[derive(Debug)]
pub struct Connected {
    requests: Requests,
    sockets: OwnedFd,
    live: OwnedFd,
}

/// A socket, as the kernel asks to be told which.
#[derive(Debug)]
struct Socket {
    family: u8,
    id: SocketId,
}

/// Whether this kernel can end a connected UDP socket.
///
/// # Errors
/// `Unsupported`, with what it lacks; or the kernel does not say.
pub fn probe() -> io::Result<()> {
    open().map(drop)
}

fn open() -> io::Result<Requests> {
    let lacks = |error: io::Error, what: &str| match error.raw_os_error() {
        Some(ENOENT | EOPNOTSUPP | EPROTONOSUPPORT) => {
            let text = format!("{error}; use a kernel with {what}");
            io::Error::new(io::ErrorKind::Unsupported, text)
        }
        Some(EPERM) => {
            let text = format!("{error}; it needs CAP_NET_ADMIN");
            io::Error::new(error.kind(), text)
        }
        _ => error,
    };
    let diag = |error| lacks(error, "CONFIG_INET_DIAG and CONFIG_INET_UDP_DIAG");
    let requests = Requests::open(NETLINK_SOCK_DIAG).map_err(diag)?;
    // No socket is in none of the states, and none has port 0.
    let none = SocketId::new_v4();
    let dump = request(AF_INET, StateFlags::empty(), none.clone());
    requests.each(dump, |_| {}).map_err(diag)?;
    let socket = Socket {
        family: AF_INET,
        id: none,
    };
    end(&requests, &socket).map_err(|error| lacks(error, "CONFIG_INET_DIAG_DESTROY"))?;
    Ok(requests)
}

impl Connected {
    pub(super) fn open(sockets: OwnedFd, live: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            requests: open()?,
            sockets,
            live,
        })
    }

    /// Ends the sockets that programs have connected to one of these and to which no datagrams may go any more. Asks the
    /// kernel for the connected sockets of each family once, for those of one port if the backends have one. Returns how
    /// many it has ended. Takes a while: some microseconds for each socket that the kernel names.
    ///
    /// # Errors
    /// The kernel does not answer, or refuses to end one; the others are ended.
    pub fn end(&self, departed: &Departed) -> io::Result<usize> {
        let mut left = Vec::new();
        let mut failed = None;
        for family in families(departed) {
            let of_port = SocketId {
                destination_port: port(departed),
                ..SocketId::new_v4()
            };
            let dump = request(family, StateFlags::ESTABLISHED, of_port);
            let dumped = self.requests.each(dump, |answer| {
                let SockDiagMessage::InetResponse(it) = answer else {
                    return;
                };
                let id = it.header.socket_id;
                match self.has_left(&id, departed) {
                    Ok(true) => left.push(Socket { family, id }),
                    Ok(false) => {}
                    Err(error) => failed = Some(error),
                }
            });
            failed = match dumped {
                Ok(0) => failed,
                Ok(many) => Some(io::Error::other(format!("{many} sockets cannot be read"))),
                Err(error) => Some(error),
            };
        }
        let mut ended = 0;
        // The kernel looks by the ends: of sockets that share them it finds one, and the others when that is gone.
        loop {
            let before = ended;
            left.retain(|socket| match end(&self.requests, socket) {
                Ok(true) => {
                    ended += 1;
                    false
                }
                Ok(false) => true,
                Err(error) => {
                    failed = Some(error);
                    false
                }
            });
            if left.is_empty() || ended == before {
                break;
            }
        }
        failed.map_or(Ok(ended), Err)
    }

    /// Did a program connect it to a backend to which it would not connect it today?
    fn has_left(&self, id: &SocketId, departed: &Departed) -> io::Result<bool> {
        let backend = BackendAddr {
            addr: id.destination_address.into(),
            port: id.destination_port.into(),
        };
        if let Departed::These(these) = departed
            && !these.contains(&backend)
        {
            return Ok(false);
        }
        // Two words, the low one first; so has a machine of ours a long one.
        let cookie = u64::from_le_bytes(id.cookie);
        let kept = row::<u64, SocketPeer>(&self.sockets, &cookie)?;
        let is_it = |it: &SocketPeer| it.addr == backend.addr && it.port == backend.port;
        let Some(kept) = kept.filter(is_it) else {
            return Ok(false);
        };
        let now = row::<BackendId, Generation>(&self.live, &kept.backend)?.unwrap_or_default();
        Ok(!(now.is_usable() && now.is_same_backend(kept.generation)))
    }
}

/// The families of sockets that may lead there: one of IPv6 may lead to an IPv4 address.
fn families(departed: &Departed) -> impl Iterator<Item = u8> {
    let is_v4 = match departed {
        Departed::These(these) => these.iter().any(|it| it.addr.is_v4()),
        Departed::Any => true,
    };
    is_v4.then_some(AF_INET).into_iter().chain([AF_INET6])
}

/// The port that all have, in host order; 0 if there is no such.
fn port(departed: &Departed) -> u16 {
    let Departed::These(these) = departed else {
        return 0;
    };
    let ports: BTreeSet<u16> = these.iter().map(|it| it.port.into()).collect();
    match (ports.first(), ports.len()) {
        (Some(port), 1) => *port,
        _ => 0,
    }
}

fn request(family: u8, states: StateFlags, socket_id: SocketId) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: IPPROTO_UDP as u8,
        extensions: ExtensionFlags::empty(),
        states,
        socket_id,
    })
}

/// False if there is no such socket (any more).
fn end(requests: &Requests, socket: &Socket) -> io::Result<bool> {
    let which = request(socket.family, StateFlags::empty(), socket.id.clone());
    match requests.ask(SockDiagDestroy::new(which), 0) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(ENOENT | ESTALE)) => Ok(false),
        Err(error) => Err(error),
    }
}

fn row<K: Plain, V: Plain>(map: &OwnedFd, key: &K) -> io::Result<Option<V>> {
    let mut value = V::new_zeroed();
    match sys::lookup(map.as_fd(), key.as_bytes(), value.as_mut_bytes()) {
        Ok(()) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn as_few_sockets_are_asked_for_as_can_be() {
        // Backends; then the families of sockets that may lead there, and the port that all of these have.
        let (v4, v6) = ("10.0.0.1", "fd00::1");
        type Case<'a> = (&'a [(&'a str, u16)], &'a [u8], u16);
        let cases: [Case<'_>; 4] = [
            (&[(v4, 53)], &[AF_INET, AF_INET6], 53),
            (&[(v6, 53)], &[AF_INET6], 53),
            (&[(v4, 53), (v6, 53)], &[AF_INET, AF_INET6], 53),
            (&[(v6, 53), (v6, 54)], &[AF_INET6], 0),
        ];
        for (backends, of, expected) in cases {
            let backends = backends.iter().map(|(addr, port)| BackendAddr {
                addr: addr.parse::<IpAddr>().unwrap().into(),
                port: (*port).into(),
            });
            let these = Departed::These(backends.collect());
            assert_eq!(families(&these).collect::<Vec<_>>(), of, "{these:?}");
            assert_eq!(port(&these), expected, "{these:?}");
        }
        let any = Departed::Any;
        assert_eq!(families(&any).collect::<Vec<_>>(), [AF_INET, AF_INET6]);
        assert_eq!(port(&any), 0);
    }
}
