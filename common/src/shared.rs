//! Integers that several CPUs change at once, in rows that programs and user space share. On the host
//! they are the atomics of `core`; for the BPF target `core` has none of 32 bits and no operation that
//! reads and writes, so this is the part of them that programs use. The only `unsafe` of this crate.

#[cfg(not(target_arch = "bpf"))]
pub use core::sync::atomic::{AtomicU32, AtomicU64};

#[cfg(target_arch = "bpf")]
pub use bpf::{AtomicU32, AtomicU64};

#[cfg(target_arch = "bpf")]
#[allow(unsafe_code, reason = "the instructions behind the safe operations")]
mod bpf {
    use core::arch::asm;
    use core::cell::UnsafeCell;
    use core::fmt::{Debug, Formatter, Result};
    use core::sync::atomic::Ordering;

    use zerocopy::{FromBytes, IntoBytes, KnownLayout};

    macro_rules! shared {
        ($name:ident, $int:ty, $or:literal, $and:literal) => {
            /// An integer in shared memory. Every operation is relaxed, whatever it is asked for.
            #[derive(Default, FromBytes, IntoBytes, KnownLayout)]
            #[repr(transparent)]
            pub struct $name(UnsafeCell<$int>);

            // SAFETY: every access is one instruction on an aligned word.
            unsafe impl Sync for $name {}

            impl $name {
                #[inline(always)]
                pub const fn new(value: $int) -> Self {
                    Self(UnsafeCell::new(value))
                }

                #[inline(always)]
                pub fn load(&self, _: Ordering) -> $int {
                    // SAFETY: the cell is valid and aligned.
                    unsafe { self.0.get().read_volatile() }
                }

                #[inline(always)]
                pub fn store(&self, value: $int, _: Ordering) {
                    // SAFETY: the cell is valid and aligned.
                    unsafe { self.0.get().write_volatile(value) }
                }

                #[inline(always)]
                pub fn fetch_or(&self, value: $int, _: Ordering) {
                    self.change::<true>(value);
                }

                #[inline(always)]
                pub fn fetch_and(&self, value: $int, _: Ordering) {
                    self.change::<false>(value);
                }

                #[inline(always)]
                fn change<const OR: bool>(&self, value: $int) {
                    let (cell, value) = (self.0.get(), u64::from(value));
                    // SAFETY: the cell is valid and aligned.
                    unsafe {
                        if OR {
                            asm!($or, in("r1") cell, in("r2") value, options(nostack, preserves_flags));
                        } else {
                            asm!($and, in("r1") cell, in("r2") value, options(nostack, preserves_flags));
                        }
                    }
                }
            }

            impl Debug for $name {
                fn fmt(&self, f: &mut Formatter<'_>) -> Result {
                    self.load(Ordering::Relaxed).fmt(f)
                }
            }
        };
    }

    shared!(
        AtomicU32,
        u32,
        "lock *(u32 *)(r1 + 0) |= w2",
        "lock *(u32 *)(r1 + 0) &= w2"
    );
    shared!(
        AtomicU64,
        u64,
        "lock *(u64 *)(r1 + 0) |= r2",
        "lock *(u64 *)(r1 + 0) &= r2"
    );

    impl AtomicU64 {
        #[inline(always)]
        pub fn fetch_add(&self, value: u64, _: Ordering) {
            // SAFETY: the cell is valid and aligned.
            unsafe {
                asm!(
                    "lock *(u64 *)({cell} + 0) += {value}",
                    cell = in(reg) self.0.get(),
                    value = in(reg) value,
                    options(nostack, preserves_flags),
                );
            }
        }
    }
}
