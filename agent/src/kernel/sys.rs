//! The few bpf(2) commands that are needed beside the loader, by what they are about. Every `unsafe` of table access
//! is here and in `mapped`.
//!
//! Structures follow `union bpf_attr` of include/uapi/linux/bpf.h; the kernel takes what is missing at
//! the end as zero.

mod links;
mod maps;
mod objects;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use zerocopy::{Immutable, IntoBytes};

pub(crate) use self::links::{
    AttachType, Carrier, LinkInfo, Seat, attached, detach_link, detach_program, link, link_info,
    links, replace,
};
pub(crate) use self::maps::{
    Cursor, delete, insert, lookup, lookup_batch, next_key, update, update_batch,
};
pub(crate) use self::objects::{
    Kind, MapLayout, kind, link_by_id, map_layout, open_pinned, pin, program_by_id,
};

/// One number, or a number and the one behind it.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Number {
    number: u32,
    next: u32,
    flags: u32,
}

/// Calls bpf(2). The attribute must be that of the command, and what it points to must live and be as
/// large as the command reads or writes.
fn bpf<A: IntoBytes + Immutable>(command: libc::c_long, attribute: &mut A) -> io::Result<i32> {
    // SAFETY: the attribute lives for the call and its size is given; that its pointers are right is
    // seen to by the functions of this folder's files, which are all of the callers.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attribute),
            size_of::<A>(),
        )
    };
    if returned < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(returned as i32)
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn by_number(number: u32) -> Number {
    Number {
        number,
        next: 0,
        flags: 0,
    }
}
