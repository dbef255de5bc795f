//! What the programs of user space allocate with (docs/decisions/0020-an-allocator-of-our-own-choice.md). It is here
//! because user space has no unsafe code but here and in the agent's `kernel`.

extern crate std;

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dlmalloc::Dlmalloc;

/// A heap of this many bytes is taken in huge pages from there on: an agent of a large cluster looks things up all over it,
/// and who walks page tables for each is half as fast, in a virtual machine less than that. A small program takes none: the
/// first byte of a huge page costs the kernel as much as two hundred small pages.
const SMALL: usize = 16 << 20;
const HUGE_PAGE: usize = 2 << 20;

static HEAP: Mutex<Dlmalloc<Pages>> = Mutex::new(Dlmalloc::new_with_allocator(Pages {
    taken: AtomicUsize::new(0),
}));

/// `dlmalloc`, never inlined: the image packed with it inlined was 375 kB larger than the one before.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allocator;

fn heap() -> MutexGuard<'static, Dlmalloc<Pages>> {
    HEAP.lock().unwrap_or_else(PoisonError::into_inner)
}

#[allow(unsafe_code, reason = "the trait is unsafe, and passed on")]
// SAFETY: each call is passed on as it came, and each answer as it is.
unsafe impl GlobalAlloc for Allocator {
    #[inline(never)]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that it asks for.
        unsafe { heap().malloc(layout.size(), layout.align()) }
    }

    #[inline(never)]
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { heap().free(at, layout.size(), layout.align()) }
    }

    #[inline(never)]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { heap().calloc(layout.size(), layout.align()) }
    }

    #[inline(never)]
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        unsafe { heap().realloc(at, layout.size(), layout.align(), size) }
    }
}

/// Where the heap has its memory from: the kernel.
struct Pages {
    /// How many bytes the heap has.
    taken: AtomicUsize,
}

impl Pages {
    fn given_back(&self, size: usize) {
        self.taken.fetch_sub(size, Ordering::Relaxed);
    }
}

#[allow(
    unsafe_code,
    reason = "the trait is unsafe, and so are the kernel's calls"
)]
// SAFETY: all that is handed out was mapped here, writable and for nobody else, and stays until it is handed back.
unsafe impl dlmalloc::Allocator for Pages {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let is_large = self.taken.load(Ordering::Relaxed) >= SMALL;
        let Some(size) = (match is_large {
            true => size.checked_next_multiple_of(HUGE_PAGE),
            false => Some(size),
        }) else {
            return (null_mut(), 0, 0);
        };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping touches nothing that is there.
        let at = unsafe { libc::mmap(null_mut(), size, access, kind, -1, 0) };
        if at == libc::MAP_FAILED {
            return (null_mut(), 0, 0);
        }
        if is_large {
            // Advice only: a kernel without huge pages goes on with small ones.
            // SAFETY: it is the mapping just made.
            unsafe { libc::madvise(at, size, libc::MADV_HUGEPAGE) };
        }
        self.taken.fetch_add(size, Ordering::Relaxed);
        (at.cast(), size, 0)
    }

    fn remap(&self, at: *mut u8, before: usize, size: usize, can_move: bool) -> *mut u8 {
        let flags = if can_move { libc::MREMAP_MAYMOVE } else { 0 };
        // SAFETY: the heap hands over a mapping of `alloc`.
        let at = unsafe { libc::mremap(at.cast(), before, size, flags) };
        if at == libc::MAP_FAILED {
            return null_mut();
        }
        self.taken.fetch_add(size, Ordering::Relaxed);
        self.given_back(before);
        at.cast()
    }

    fn free_part(&self, at: *mut u8, before: usize, size: usize) -> bool {
        // SAFETY: as above, and nothing of the part that goes is in use.
        let is_gone = unsafe { libc::munmap(at.add(size).cast(), before - size) } == 0;
        if is_gone {
            self.given_back(before - size);
        }
        is_gone
    }

    fn free(&self, at: *mut u8, size: usize) -> bool {
        // SAFETY: as above.
        let is_gone = unsafe { libc::munmap(at.cast(), size) } == 0;
        if is_gone {
            self.given_back(size);
        }
        is_gone
    }

    fn can_release_part(&self, _flags: u32) -> bool {
        true
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        // The least that any kernel has: all that is asked for are multiples of 64 KiB.
        4096
    }
}
