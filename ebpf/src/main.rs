//! The BPF object: attributes, adapters and maps around the decisions of `datapath`.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![allow(unreachable_pub, reason = "programs are reached by their ELF symbols")]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key by value is copied onto a stack of 512 bytes"
)]

mod cold;
mod events;
mod maps;
mod neighbours;
mod programs;
mod refusals;
mod skb;
mod sock;

/// The kernel's helpers that we call are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
