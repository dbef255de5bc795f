//! The rows of an array in our own address space: read without a call for each (`docs/decisions/0017`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Of a map that user space can map (`BPF_F_MMAPABLE` of include/uapi/linux/bpf.h).
pub(super) const MMAPABLE: u32 = 1 << 10;

/// All of them, for as long as this lasts.
#[derive(Debug)]
pub(super) struct MappedRows {
    start: NonNull<libc::c_void>,
    length: usize,
    is_writable: bool,
}

// SAFETY: the memory is the kernel's, which others write, too; each access of ours is one of a whole word.
unsafe impl Send for MappedRows {}
// SAFETY: as above.
unsafe impl Sync for MappedRows {}

impl MappedRows {
    /// Maps an array made with [`MMAPABLE`], to be read.
    ///
    /// # Errors
    /// It is of another kind, has fewer rows, or there is no room.
    pub(super) fn new(map: BorrowedFd<'_>, rows: usize, value_size: usize) -> io::Result<Self> {
        Self::map(map, rows, value_size, libc::PROT_READ)
    }

    /// The same, to be added to ([`Self::add`]).
    ///
    /// # Errors
    /// As there.
    pub(super) fn writable(
        map: BorrowedFd<'_>,
        rows: usize,
        value_size: usize,
    ) -> io::Result<Self> {
        Self::map(map, rows, value_size, libc::PROT_READ | libc::PROT_WRITE)
    }

    fn map(
        map: BorrowedFd<'_>,
        rows: usize,
        value_size: usize,
        access: libc::c_int,
    ) -> io::Result<Self> {
        let is_writable = access & libc::PROT_WRITE != 0;
        let length = rows * Self::stride(value_size);
        // SAFETY: a new mapping, at a place that the kernel chooses; checked below.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                access,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => Ok(Self {
                start,
                length,
                is_writable,
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Bytes from one row to the next: the kernel keeps every row at a multiple of eight.
    pub(super) fn stride(value_size: usize) -> usize {
        value_size.next_multiple_of(8)
    }

    /// Eight bytes, from the start on; as they are now, while others write. `None` behind the end.
    pub(super) fn word(&self, index: usize) -> Option<u64> {
        if index >= self.length / 8 {
            return None;
        }
        let words = self.start.as_ptr().cast::<u64>();
        // SAFETY: within the mapping, which begins with a page and lives as long as we do.
        Some(unsafe { words.add(index).read_volatile() })
    }

    /// Adds to eight bytes, wrapping around, whatever others do to them in the same moment. Nothing is added behind the
    /// end, or to what is not [`Self::writable`].
    pub(super) fn add(&self, index: usize, value: u64) {
        if let Some(word) = self.writable_word(index) {
            word.fetch_add(value, Ordering::Relaxed);
        }
    }

    /// Makes eight bytes something else, within the same bounds.
    pub(super) fn set(&self, index: usize, value: u64) {
        if let Some(word) = self.writable_word(index) {
            word.store(value, Ordering::Relaxed);
        }
    }

    fn writable_word(&self, index: usize) -> Option<&AtomicU64> {
        if !self.is_writable || index >= self.length / 8 {
            return None;
        }
        let words = self.start.as_ptr().cast::<u64>();
        // SAFETY: within the mapping, as above, and writable; whoever else writes there does so with one instruction.
        Some(unsafe { AtomicU64::from_ptr(words.add(index)) })
    }
}

impl Drop for MappedRows {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody has a reference into it.
        unsafe { libc::munmap(self.start.as_ptr(), self.length) };
    }
}
