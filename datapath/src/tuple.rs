//! The five values that name a conversation as one packet sees it, and the key that both of its
//! directions share.

use weir_common::flow::{FlowKey, Peer};
use weir_common::{Addr, Port, Protocol};

/// Source and destination of a packet. For ICMP echo the requester's port is the identifier and the
/// answerer's is 0, so that a request and a reply the same way are different conversations. Aligned so
/// that addresses are compared in words.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C, align(8))]
pub struct Tuple {
    pub source: Addr,
    pub destination: Addr,
    pub source_port: Port,
    pub destination_port: Port,
    pub protocol: Protocol,
    pub pad: [u8; 3],
}

/// Which end of a [`FlowKey`] a packet comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum End {
    Low,
    High,
}

/// A key whose stack slot is aligned.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C, align(8))]
pub struct AlignedKey(pub FlowKey);

/// Anything whose stack slot is aligned: types of bytes are not, and the compiler copies them in words
/// all the same, which the verifier refuses.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Aligned<T>(pub T);

impl Tuple {
    /// The other direction of the same conversation.
    pub fn reversed(&self) -> Self {
        let mut reversed = Self::default();
        reversed.set_reversed(self);
        reversed
    }

    /// Where the packet comes from.
    #[inline(always)]
    pub const fn source(&self) -> Peer {
        Peer {
            addr: self.source,
            port: self.source_port,
        }
    }

    /// Where the packet goes.
    #[inline(always)]
    pub const fn destination(&self) -> Peer {
        Peer {
            addr: self.destination,
            port: self.destination_port,
        }
    }

    /// Sends the packet elsewhere.
    #[inline(always)]
    pub const fn set_destination(&mut self, peer: &Peer) {
        self.destination = peer.addr;
        self.destination_port = peer.port;
    }

    /// The end of the key that the source is.
    #[inline(always)]
    pub fn end(&self) -> End {
        let (source, destination) = (words(&self.source), words(&self.destination));
        let ports = (
            u16::from(self.source_port),
            u16::from(self.destination_port),
        );
        let is_high = if source.0 != destination.0 {
            source.0 > destination.0
        } else if source.1 != destination.1 {
            source.1 > destination.1
        } else {
            ports.0 > ports.1
        };
        if is_high { End::High } else { End::Low }
    }

    /// Writes the key of both directions.
    #[inline(always)]
    pub fn write_key(&self, AlignedKey(key): &mut AlignedKey) {
        match self.end() {
            End::Low => {
                key.low = self.source();
                key.high = self.destination();
            }
            End::High => {
                key.low = self.destination();
                key.high = self.source();
            }
        }
        key.protocol = self.protocol;
        key.pad = [0; 3];
    }

    /// The key of both directions.
    pub fn key(&self) -> AlignedKey {
        let mut key = AlignedKey::default();
        self.write_key(&mut key);
        key
    }

    /// Makes this the other direction of a conversation.
    #[inline(always)]
    pub const fn set_reversed(&mut self, of: &Self) {
        self.source = of.destination;
        self.destination = of.source;
        self.source_port = of.destination_port;
        self.destination_port = of.source_port;
        self.protocol = of.protocol;
    }
}

/// Equality of addresses in two comparisons instead of a call.
#[inline(always)]
pub fn same(a: &Addr, b: &Addr) -> bool {
    let (a, b) = (words(a), words(b));
    ((a.0 ^ b.0) | (a.1 ^ b.1)) == 0
}

/// Equality of peers.
#[inline(always)]
pub fn same_peer(a: &Peer, b: &Peer) -> bool {
    same(&a.addr, &b.addr) && u16::from(a.port) == u16::from(b.port)
}

/// An address as two numbers that compare as its bytes do.
#[inline(always)]
pub const fn words(addr: &Addr) -> (u64, u64) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = addr.0;
    (
        u64::from_be_bytes([a, b, c, d, e, f, g, h]),
        u64::from_be_bytes([i, j, k, l, m, n, o, p]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_share_a_key_and_differ_in_their_end() {
        let tuple = Tuple {
            source: Addr::v4([10, 0, 0, 9]),
            destination: Addr::v4([10, 0, 0, 10]),
            source_port: Port::from(40_000),
            destination_port: Port::from(80),
            protocol: Protocol::TCP,
            pad: [0; 3],
        };
        for tuple in [
            tuple,
            Tuple {
                destination: tuple.source,
                ..tuple
            },
        ] {
            let back = tuple.reversed();
            assert_eq!(tuple.key(), back.key());
            assert_ne!(tuple.end(), back.end());
            let FlowKey { low, high, .. } = tuple.key().0;
            assert!(low < high, "{low:?} {high:?}");
        }
    }
}
