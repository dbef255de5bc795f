//! Addresses as words, and a hash of them.

use weir_common::Addr;
use weir_common::way::WayKey;

/// An address as two numbers that compare as its bytes do.
#[inline(always)]
pub const fn words(addr: &Addr) -> (u64, u64) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = addr.0;
    (
        u64::from_be_bytes([a, b, c, d, e, f, g, h]),
        u64::from_be_bytes([i, j, k, l, m, n, o, p]),
    )
}

/// Equality of addresses in two comparisons instead of a call.
#[inline(always)]
pub const fn same(a: &Addr, b: &Addr) -> bool {
    let (a, b) = (words(a), words(b));
    ((a.0 ^ b.0) | (a.1 ^ b.1)) == 0
}

/// Anything whose stack slot is aligned: types of bytes are not, and the compiler copies them in words
/// all the same, which the verifier refuses.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Aligned<T>(pub T);

/// A number whose every bit every bit has a say in (the first half of MurmurHash3's 32-bit finalizer).
#[inline(always)]
pub const fn mixed(number: u32) -> u32 {
    let half = number.wrapping_mul(0x85eb_ca6b);
    (half ^ half >> 13).wrapping_mul(0xc2b2_ae35)
}

/// A number that is the same whenever the sender, and what it asks, are: what a lost row held is found again by it.
/// The finalizer of MurmurHash3 (public domain) over the words of the key; nobody is kept from choosing ports so that
/// it comes out as they like, which gains them a backend or a port that they could have had anyway.
#[inline(always)]
pub fn hash(key: &WayKey) -> u32 {
    let [a, b, c, d, e] = *key.words();
    let mut sum = a ^ b.rotate_left(13) ^ c.rotate_left(29) ^ d.rotate_left(43) ^ e.rotate_left(7);
    sum = (sum ^ sum >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    sum = (sum ^ sum >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (sum ^ sum >> 33) as u32
}
