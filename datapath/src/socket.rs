//! What happens to the address that a program gives to a socket call, and to the one it gets back: the
//! service's on its side, a backend's on the wire. IPv4 addresses on IPv6 sockets need nothing special,
//! since a mapped address is how every table spells an IPv4 one.

use core::sync::atomic::Ordering::Relaxed;

use weir_common::counter::Counter;
use weir_common::service::{
    Affinity, BackendId, FrontendFlags, FrontendKey, Generation, PortBits, Scope, SocketKey,
    SocketPeer, SocketSide,
};
use weir_common::way::Peer;
use weir_common::{Addr, Port, Protocol};

use crate::service::{self, Asks, Candidates};
use crate::tables::Sockets;
use crate::words::{Aligned, same};

/// The address of a socket call.
pub trait Address {
    /// The kernel's cookie of the socket.
    fn cookie(&self) -> u64;
    fn protocol(&self) -> Protocol;
    /// The kernel's cookie of the network namespace that the socket is in.
    fn network(&self) -> u64;
    /// The other side as the call names it.
    fn peer(&self) -> Peer;
    /// Replaces the other side.
    fn set_peer(&mut self, peer: &Peer);
}

/// What happens to a call that names where to send.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Call {
    Proceed,
    /// `ECONNREFUSED`: the service has no backend.
    Refuse,
}

/// `connect` of TCP, and of UDP by the node's own processes: a backend for the life of the connection. When datagrams may go to it
/// no more, the agent ends such a socket of UDP.
#[inline(always)]
pub fn connect<A: Address, T: Sockets>(address: &mut A, tables: &T) -> Call {
    translate(address, tables, Lifetime::Connection)
}

/// `sendto` and `sendmsg` with an address: the socket keeps its backend while that is current.
#[inline(always)]
pub fn sendmsg<A: Address, T: Sockets>(address: &mut A, tables: &T) -> Call {
    translate(address, tables, Lifetime::Socket)
}

/// `recvfrom`, `recvmsg` and `getpeername`: the program sees the service that it spoke to.
#[inline(always)]
pub fn name<A: Address, T: Sockets>(address: &mut A, tables: &T) {
    let protocol = address.protocol();
    if protocol != Protocol::TCP && protocol != Protocol::UDP {
        return;
    }
    let peer = address.peer();
    if is_unused(tables, peer.port) {
        return;
    }
    let key = key(address, &peer, SocketSide::REVERSE);
    if let Some(service) = tables.socket(&key) {
        address.set_peer(&Peer {
            addr: service.addr,
            port: service.port,
        });
    }
}

/// How long a choice holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Lifetime {
    Connection,
    Socket,
}

#[inline(always)]
fn translate<A: Address, T: Sockets>(address: &mut A, tables: &T, lifetime: Lifetime) -> Call {
    let protocol = address.protocol();
    let asked = Aligned(address.peer());
    let asked = &asked.0;
    // Every pod has a loopback of its own, which is none of ours.
    if is_loopback(&asked.addr) && address.network() != tables.own_network() {
        return Call::Proceed;
    }
    let key_asked = FrontendKey {
        addr: asked.addr,
        port: asked.port,
        protocol,
        scope: Scope::INTERNAL,
        pad: [0; 4],
    };
    // The agent ends these when their backend takes no datagrams any more.
    let is_kept = lifetime == Lifetime::Connection
        && protocol == Protocol::UDP
        && !is_of_pod(address, tables);
    let Some(frontend) = service::frontend(tables, &key_asked, &asked.addr) else {
        if is_kept {
            tables.forget_connected(address.cookie());
        }
        return Call::Proceed;
    };
    let forward = key(address, asked, SocketSide::FORWARD);
    if lifetime == Lifetime::Socket
        && let Some(kept) = tables.socket(&forward)
        && service::is_current(tables, kept.backend, kept.generation, Asks::Anew)
    {
        let chosen = Aligned(Peer {
            addr: kept.addr,
            port: kept.port,
        });
        let chosen = &chosen.0;
        // Either row may be pushed out without the other, and another service may have given the same backend since.
        let reverse = key(address, chosen, SocketSide::REVERSE);
        let is_named = |row: SocketPeer| row.port == asked.port && same(&row.addr, &asked.addr);
        if !tables.socket(&reverse).is_some_and(is_named) {
            use_port(tables, chosen.port);
            tables.remember(&reverse, &row(asked, kept.backend, kept.generation));
        }
        tables.count(Counter::SocketTranslated);
        address.set_peer(chosen);
        return Call::Proceed;
    }
    let client = service::client_in(&frontend, address.network(), &asked.addr, protocol);
    let first = service::first(tables, &frontend, &client, tables.random());
    let mut candidates = Candidates::from(&frontend, first);
    let Some((backend, generation)) = candidates.next(tables) else {
        tables.count(Counter::SocketRefused);
        return Call::Refuse;
    };
    // A socket that is connected hears of no change any more, and a datagram shows nobody that its receiver is gone. What a pod
    // sends is translated packet by packet then, but questions for names, which are many and whose server stays.
    if lifetime == Lifetime::Connection
        && protocol == Protocol::UDP
        && is_of_pod(address, tables)
        && frontend.flags & FrontendFlags::OWN_DNS == 0
    {
        return Call::Proceed;
    }
    let chosen = Aligned(Peer {
        addr: backend.addr,
        port: backend.port,
    });
    let chosen = &chosen.0;
    let mut last = Affinity {
        backend: backend.id,
        generation,
        addr: backend.addr,
        port: backend.port,
        ..Affinity::default()
    };
    service::stick(tables, &frontend, &client, &mut last);
    let reverse = key(address, chosen, SocketSide::REVERSE);
    use_port(tables, chosen.port);
    tables.remember(&reverse, &row(asked, backend.id, generation));
    // Whose server stays needs no end.
    if is_kept && frontend.flags & FrontendFlags::OWN_DNS == 0 {
        tables.keep_connected(address.cookie(), &row(chosen, backend.id, generation));
    }
    if lifetime == Lifetime::Socket {
        tables.remember(&forward, &row(chosen, backend.id, generation));
    }
    tables.count(Counter::SocketTranslated);
    address.set_peer(chosen);
    Call::Proceed
}

/// Was no socket ever given a backend with this port?
#[inline(always)]
fn is_unused<T: Sockets>(tables: &T, port: Port) -> bool {
    let (row, bit) = PortBits::place(port);
    let row = tables.unused_ports(row);
    row.is_some_and(|row| row.has(bit))
}

/// Notes that a socket is given a backend with this port, before it has it.
#[inline(always)]
fn use_port<T: Sockets>(tables: &T, port: Port) {
    let (row, bit) = PortBits::place(port);
    if let Some(row) = tables.unused_ports(row)
        && row.has(bit)
    {
        row.0.fetch_and(!bit, Relaxed);
    }
}

/// Is the socket in another network namespace than the node's? Not, if that is unknown.
#[inline(always)]
fn is_of_pod<A: Address, T: Sockets>(address: &A, tables: &T) -> bool {
    let own = tables.own_network();
    own != 0 && address.network() != own
}

/// 127.0.0.0/8 (RFC 1122 section 3.2.1.3) and ::1 (RFC 4291 section 2.5.3).
#[inline(always)]
fn is_loopback(addr: &Addr) -> bool {
    const V6: Addr = Addr([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    if addr.is_v4() {
        addr.0[12] == 127
    } else {
        same(addr, &V6)
    }
}

#[inline(always)]
fn key<A: Address>(address: &A, peer: &Peer, side: SocketSide) -> SocketKey {
    SocketKey {
        cookie: address.cookie(),
        addr: peer.addr,
        port: peer.port,
        protocol: address.protocol(),
        side,
        pad: [0; 4],
    }
}

#[inline(always)]
fn row(peer: &Peer, backend: BackendId, generation: Generation) -> SocketPeer {
    SocketPeer {
        addr: peer.addr,
        port: peer.port,
        pad: 0,
        backend,
        generation,
    }
}
