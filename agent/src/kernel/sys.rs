//! The few bpf(2) commands that are needed beside the loader: batches of map rows, links that are
//! replaced in place, pins. Every `unsafe` of table access is here.
//!
//! Structures follow `union bpf_attr` of include/uapi/linux/bpf.h; the kernel takes what is missing at
//! the end as zero.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_DELETE_ELEM: libc::c_long = 3;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const MAP_UPDATE_BATCH: libc::c_long = 26;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;

/// Where a program can sit (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(u32)]
pub(crate) enum AttachType {
    CgroupInet4Connect = 10,
    CgroupInet6Connect = 11,
    CgroupUdp4Sendmsg = 14,
    CgroupUdp6Sendmsg = 15,
    CgroupUdp4Recvmsg = 19,
    CgroupUdp6Recvmsg = 20,
    CgroupInet4Getpeername = 29,
    CgroupInet6Getpeername = 30,
    TcxIngress = 46,
    TcxEgress = 47,
}

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

/// What a link is, as the kernel says. The last two fields are those of a tcx link: interface index (0
/// once the device is gone) and attach type; of a cgroup link they are its cgroup's id.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub(crate) struct LinkInfo {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) program: u32,
    pad: u32,
    pub(crate) target: [u32; 2],
}

impl LinkInfo {
    /// The id of the cgroup that a cgroup link sits on; 0 once it is gone.
    pub(crate) fn cgroup(&self) -> u64 {
        u64::from(self.target[0]) | u64::from(self.target[1]) << 32
    }
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Elem {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
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

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Calls bpf(2). The attribute must be that of the command, and what it points to must live and be as
/// large as the command reads or writes.
fn bpf<A: IntoBytes + Immutable>(command: libc::c_long, attribute: &mut A) -> io::Result<i32> {
    // SAFETY: the attribute lives for the call and its size is given; that its pointers are right is
    // seen to by the functions below, which are all of the callers.
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

/// Reads one row of a map whose value has `value.len()` bytes (for a per-CPU map: times the possible
/// CPUs, each rounded up to 8).
pub(crate) fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<()> {
    let mut elem = Elem {
        map: number(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    bpf(MAP_LOOKUP_ELEM, &mut elem).map(drop)
}

/// Removes one row.
pub(crate) fn delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<()> {
    let mut elem = Elem {
        map: number(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: 0,
        flags: 0,
    };
    bpf(MAP_DELETE_ELEM, &mut elem).map(drop)
}

/// Writes `count` rows whose keys and values stand one behind the other. The error carries how many
/// were written before the one that failed.
pub(crate) fn update_batch(
    map: BorrowedFd<'_>,
    keys: &[u8],
    values: &[u8],
    count: u32,
) -> Result<(), (u32, io::Error)> {
    let mut batch = Batch {
        from: 0,
        to: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count,
        map: number(map),
        elem_flags: 0,
        flags: 0,
    };
    // The kernel writes back how many rows it did.
    bpf(MAP_UPDATE_BATCH, &mut batch)
        .map(drop)
        .map_err(|error| (batch.count.min(count), error))
}

/// Where a walk over a map stands.
#[derive(Debug)]
pub(crate) struct Cursor {
    at: Vec<u8>,
    next: Vec<u8>,
    started: bool,
}

impl Cursor {
    /// At the start of a map with keys of this size.
    pub(crate) fn new(key_size: usize) -> Self {
        // A hash keeps a bucket number of 4 bytes here, other maps a key.
        let size = key_size.max(4);
        Self {
            at: vec![0; size],
            next: vec![0; size],
            started: false,
        }
    }
}

/// Reads the next rows into `keys` and `values`, which have room for `count`. Returns how many there
/// were, and whether the walk is over.
pub(crate) fn lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> io::Result<(u32, bool)> {
    let mut batch = Batch {
        from: if cursor.started {
            cursor.at.as_ptr() as u64
        } else {
            0
        },
        to: cursor.next.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map: number(map),
        elem_flags: 0,
        flags: 0,
    };
    let ended = bpf(MAP_LOOKUP_BATCH, &mut batch);
    cursor.started = true;
    std::mem::swap(&mut cursor.at, &mut cursor.next);
    match ended {
        Ok(_) => Ok((batch.count, false)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok((batch.count, true)),
        Err(error) => Err(error),
    }
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

/// What a link is.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(link)
}

fn info<T: Default + IntoBytes + FromBytes>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attribute = Info {
        fd: number(object),
        len: size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attribute)?;
    Ok(info)
}

/// Attaches a program to a device, behind those that are there.
pub(crate) fn link_device(
    program: BorrowedFd<'_>,
    ifindex: u32,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    link(program, ifindex, attach_type)
}

/// Attaches a program to a cgroup and everything below it, beside others.
pub(crate) fn link_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    link(program, number(cgroup), attach_type)
}

fn link(program: BorrowedFd<'_>, target: u32, attach_type: AttachType) -> io::Result<OwnedFd> {
    let mut attribute = LinkCreate {
        program: number(program),
        target,
        attach_type: attach_type as u32,
        flags: 0,
    };
    bpf(LINK_CREATE, &mut attribute).map(owned)
}

/// Replaces the program of a link: each packet meets the old one or the new one, never none.
pub(crate) fn replace(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attribute = LinkUpdate {
        link: number(link),
        program: number(program),
        flags: 0,
        old_program: 0,
    };
    bpf(LINK_UPDATE, &mut attribute).map(drop)
}
