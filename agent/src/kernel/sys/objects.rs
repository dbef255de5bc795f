//! What the kernel has of BPF, whatever it is: pinned, opened by a path or a number, and asked what it is.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{bpf, by_number, number, owned};

const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const LINK_GET_FD_BY_ID: libc::c_long = 30;

/// What a map is, as the kernel says.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub(crate) struct MapLayout {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
}

/// What a descriptor of bpf(2) stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    Map,
    Program,
    Link,
    Other,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Info {
    fd: u32,
    len: u32,
    info: u64,
}

/// Pins an object at a path of a bpffs.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attribute = Object {
        path: path.as_ptr() as u64,
        fd: number(object),
        flags: 0,
    };
    bpf(OBJ_PIN, &mut attribute).map(drop)
}

/// Opens what is pinned at a path.
pub(crate) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attribute = Object {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    bpf(OBJ_GET, &mut attribute).map(owned)
}

/// What a map is.
pub(crate) fn map_layout(map: BorrowedFd<'_>) -> io::Result<MapLayout> {
    info(map)
}

pub(super) fn info<T: Default + IntoBytes + FromBytes>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attribute = Info {
        fd: number(object),
        len: size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attribute)?;
    Ok(info)
}

/// What a descriptor stands for, by the name that the kernel gives it.
pub(crate) fn kind(object: BorrowedFd<'_>) -> io::Result<Kind> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))?;
    // `anon_inode:bpf-map`, `anon_inode:bpf-prog`, `anon_inode:bpf_link`.
    let name = name.to_string_lossy().replace('_', "-");
    Ok(if name.contains("bpf-map") {
        Kind::Map
    } else if name.contains("bpf-prog") {
        Kind::Program
    } else if name.contains("bpf-link") {
        Kind::Link
    } else {
        Kind::Other
    })
}

/// Opens a program by the kernel's number.
pub(crate) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    bpf(PROG_GET_FD_BY_ID, &mut by_number(id)).map(owned)
}

/// Opens a link by the kernel's number.
pub(crate) fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    bpf(LINK_GET_FD_BY_ID, &mut by_number(id)).map(owned)
}
