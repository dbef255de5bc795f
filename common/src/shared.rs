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
        ($name:ident, $int:ty) => {
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
            }

            impl Debug for $name {
                fn fmt(&self, f: &mut Formatter<'_>) -> Result {
                    self.load(Ordering::Relaxed).fmt(f)
                }
            }
        };
    }

    shared!(AtomicU32, u32);
    shared!(AtomicU64, u64);

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

        #[inline(always)]
        pub fn fetch_and(&self, value: u64, _: Ordering) {
            // SAFETY: the cell is valid and aligned.
            unsafe {
                asm!(
                    "lock *(u64 *)(r1 + 0) &= r2",
                    in("r1") self.0.get(),
                    in("r2") value,
                    options(nostack, preserves_flags),
                );
            }
        }
    }

    impl AtomicU32 {
        #[inline(always)]
        pub fn fetch_or(&self, value: u32, _: Ordering) {
            // SAFETY: the cell is valid and aligned.
            unsafe {
                asm!(
                    "lock *(u32 *)(r1 + 0) |= w2",
                    in("r1") self.0.get(),
                    in("r2") u64::from(value),
                    options(nostack, preserves_flags),
                );
            }
        }

        #[inline(always)]
        pub fn fetch_and(&self, value: u32, _: Ordering) {
            // SAFETY: the cell is valid and aligned.
            unsafe {
                asm!(
                    "lock *(u32 *)(r1 + 0) &= w2",
                    in("r1") self.0.get(),
                    in("r2") u64::from(value),
                    options(nostack, preserves_flags),
                );
            }
        }
    }
}
