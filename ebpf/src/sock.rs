//! The context of a socket-address hook as an address. All fields are read and written whole, as the
//! verifier demands.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie};
use aya_ebpf::programs::SockAddrContext;
use weir_common::way::Peer;
use weir_common::{Addr, Port, Protocol};
use weir_datapath::l3::Family;
use weir_datapath::socket::Address;

/// The address of a call on the hook of a family.
pub(crate) struct Sock {
    pub(crate) context: SockAddrContext,
    pub(crate) family: Family,
}

impl Address for Sock {
    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the context is valid for the run of the program.
        unsafe { bpf_get_socket_cookie(self.context.as_ptr()) }
    }

    #[inline(always)]
    fn protocol(&self) -> Protocol {
        // SAFETY: the context is valid for the run of the program.
        Protocol(unsafe { addr_of!((*self.context.sock_addr).protocol).read_volatile() } as u8)
    }

    #[inline(always)]
    fn network(&self) -> u64 {
        // SAFETY: the context is valid for the run of the program.
        unsafe { bpf_get_netns_cookie(self.context.as_ptr()) }
    }

    #[inline(always)]
    fn peer(&self) -> Peer {
        let context = self.context.sock_addr;
        // SAFETY: the context is valid for the run of the program. Addresses and port are in network
        // order in memory, the port in the first two of its four bytes.
        unsafe {
            let [p0, p1, _, _] = addr_of!((*context).user_port).read_volatile().to_ne_bytes();
            let addr = match self.family {
                Family::V4 => Addr::v4(addr_of!((*context).user_ip4).read_volatile().to_ne_bytes()),
                Family::V6 => {
                    let word = |i: usize| {
                        addr_of!((*context).user_ip6[i])
                            .read_volatile()
                            .to_ne_bytes()
                    };
                    let ([a, b, c, d], [e, f, g, h]) = (word(0), word(1));
                    let ([i, j, k, l], [m, n, o, p]) = (word(2), word(3));
                    Addr([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
                }
            };
            Peer {
                addr,
                port: Port([p0, p1]),
            }
        }
    }

    #[inline(always)]
    fn set_peer(&mut self, peer: &Peer) {
        let context = self.context.sock_addr;
        let [p0, p1] = peer.port.0;
        let octets = peer.addr.0;
        let word =
            |i: usize| u32::from_ne_bytes([octets[i], octets[i + 1], octets[i + 2], octets[i + 3]]);
        // SAFETY: the context is valid for the run of the program; the hooks of a family may write the
        // fields of that family.
        unsafe {
            addr_of_mut!((*context).user_port).write_volatile(u32::from_ne_bytes([p0, p1, 0, 0]));
            match self.family {
                Family::V4 => addr_of_mut!((*context).user_ip4).write_volatile(word(12)),
                Family::V6 => {
                    addr_of_mut!((*context).user_ip6[0]).write_volatile(word(0));
                    addr_of_mut!((*context).user_ip6[1]).write_volatile(word(4));
                    addr_of_mut!((*context).user_ip6[2]).write_volatile(word(8));
                    addr_of_mut!((*context).user_ip6[3]).write_volatile(word(12));
                }
            }
        }
    }
}
