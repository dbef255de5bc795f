//! Programs at the socket calls of a cgroup.

use aya_ebpf::helpers::generated::bpf_set_retval;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use weir_common::node::Features;
use weir_datapath::l3::Family;
use weir_datapath::socket::{Call, connect, name, sendmsg};

use crate::maps::{self, Maps};
use crate::sock::Sock;

const ECONNREFUSED: i32 = 111;

#[cgroup_sock_addr(connect4)]
pub fn weir_connect4(context: SockAddrContext) -> i32 {
    let family = Family::V4;
    answer(connect(&mut Sock { context, family }, &Maps))
}

#[cgroup_sock_addr(connect6)]
pub fn weir_connect6(context: SockAddrContext) -> i32 {
    let family = Family::V6;
    answer(connect(&mut Sock { context, family }, &Maps))
}

#[cgroup_sock_addr(sendmsg4)]
pub fn weir_sendmsg4(context: SockAddrContext) -> i32 {
    let family = Family::V4;
    answer(sendmsg(&mut Sock { context, family }, &Maps))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn weir_sendmsg6(context: SockAddrContext) -> i32 {
    let family = Family::V6;
    answer(sendmsg(&mut Sock { context, family }, &Maps))
}

#[cgroup_sock_addr(recvmsg4)]
pub fn weir_recvmsg4(context: SockAddrContext) -> i32 {
    let family = Family::V4;
    name(&mut Sock { context, family }, &Maps);
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
pub fn weir_recvmsg6(context: SockAddrContext) -> i32 {
    let family = Family::V6;
    name(&mut Sock { context, family }, &Maps);
    ALLOW
}

#[cgroup_sock_addr(getpeername4)]
pub fn weir_getpeer4(context: SockAddrContext) -> i32 {
    let family = Family::V4;
    name(&mut Sock { context, family }, &Maps);
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
pub fn weir_getpeer6(context: SockAddrContext) -> i32 {
    let family = Family::V6;
    name(&mut Sock { context, family }, &Maps);
    ALLOW
}

const ALLOW: i32 = 1;
const DENY: i32 = 0;

#[inline(always)]
fn answer(call: Call) -> i32 {
    match call {
        Call::Proceed => ALLOW,
        Call::Refuse => {
            if maps::node().features & Features::SAYS_WHY != 0 {
                // SAFETY: a helper without pointers; where it fails the call ends in EPERM.
                unsafe { bpf_set_retval(-ECONNREFUSED) };
            }
            DENY
        }
    }
}
