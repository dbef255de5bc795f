//! What the programs of user space allocate with (docs/decisions/0020-an-allocator-of-our-own-choice.md). It is here
//! because user space has no unsafe code but here and in the agent's `kernel`.

use core::alloc::{GlobalAlloc, Layout};

use dlmalloc::GlobalDlmalloc;

/// `dlmalloc`, never inlined: the image packed with it inlined was 375 kB larger than the one before.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allocator;

#[allow(unsafe_code, reason = "the trait is unsafe, and passed on")]
// SAFETY: each call is passed on as it came, and each answer as it is.
unsafe impl GlobalAlloc for Allocator {
    #[inline(never)]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that it asks for.
        unsafe { GlobalDlmalloc.alloc(layout) }
    }

    #[inline(never)]
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { GlobalDlmalloc.dealloc(at, layout) }
    }

    #[inline(never)]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { GlobalDlmalloc.alloc_zeroed(layout) }
    }

    #[inline(never)]
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        unsafe { GlobalDlmalloc.realloc(at, layout, size) }
    }
}
