//! The few bpf(2) commands that are needed beside the loader: batches of map rows, links that are
//! replaced in place, pins. Every `unsafe` of table access is here and in `mapped`.
//!
//! Structures follow `union bpf_attr` of include/uapi/linux/bpf.h; the kernel takes what is missing at
//! the end as zero.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const MAP_GET_NEXT_KEY: libc::c_long = 4;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_DETACH: libc::c_long = 9;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const MAP_UPDATE_BATCH: libc::c_long = 26;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_GET_FD_BY_ID: libc::c_long = 30;
const LINK_GET_NEXT_ID: libc::c_long = 31;
const LINK_DETACH: libc::c_long = 34;

/// `BPF_LINK_TYPE_CGROUP` and `BPF_LINK_TYPE_TCX`.
const CGROUP_LINK: u32 = 3;
const TCX_LINK: u32 = 11;
/// Programs that a hook is asked about; the kernel allows 64 on a cgroup, 63 on a device.
const MOST_ATTACHED: usize = 64;

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

impl AttachType {
    fn of(number: u32) -> Option<Self> {
        const ALL: [AttachType; 10] = [
            AttachType::CgroupInet4Connect,
            AttachType::CgroupInet6Connect,
            AttachType::CgroupUdp4Sendmsg,
            AttachType::CgroupUdp6Sendmsg,
            AttachType::CgroupUdp4Recvmsg,
            AttachType::CgroupUdp6Recvmsg,
            AttachType::CgroupInet4Getpeername,
            AttachType::CgroupInet6Getpeername,
            AttachType::TcxIngress,
            AttachType::TcxEgress,
        ];
        ALL.into_iter().find(|known| *known as u32 == number)
    }
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

/// What a link is, as the kernel says.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub(crate) struct LinkInfo {
    kind: u32,
    pub(crate) id: u32,
    pub(crate) program: u32,
    pad: u32,
    /// tcx: interface index, attach type. cgroup: its id in two halves, attach type.
    target: [u32; 4],
}

/// Where a link sits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Seat {
    /// A side of the device with this interface index.
    Device(u32, AttachType),
    /// The cgroup with this id, which is the inode number of its directory.
    Cgroup(u64, AttachType),
    /// The device or the cgroup is gone, or the link was detached.
    Nowhere,
    /// A hook that we have nothing to do with.
    Foreign,
}

impl LinkInfo {
    /// Where it sits.
    pub(crate) fn seat(&self) -> Seat {
        let [low, high, cgroup_type, _] = self.target;
        match self.kind {
            TCX_LINK if low == 0 => Seat::Nowhere,
            TCX_LINK => AttachType::of(high).map_or(Seat::Foreign, |side| Seat::Device(low, side)),
            CGROUP_LINK => match u64::from(low) | u64::from(high) << 32 {
                0 => Seat::Nowhere,
                id => {
                    AttachType::of(cgroup_type).map_or(Seat::Foreign, |hook| Seat::Cgroup(id, hook))
                }
            },
            _ => Seat::Foreign,
        }
    }
}

/// What a descriptor of bpf(2) stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    Map,
    Program,
    Link,
    Other,
}

/// A program at a hook, and the link that holds it: 0 for one that was attached without.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Attached {
    pub(crate) program: u32,
    pub(crate) link: u32,
}

/// What can carry programs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Carrier<'a> {
    /// By interface index.
    Device(u32),
    Cgroup(BorrowedFd<'a>),
}

impl Carrier<'_> {
    fn number(self) -> u32 {
        match self {
            Self::Device(index) => index,
            Self::Cgroup(folder) => number(folder),
        }
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

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Query {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    pad: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Detach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

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

/// Writes one row.
pub(crate) fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut elem = Elem {
        map: number(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        flags: 0,
    };
    bpf(MAP_UPDATE_ELEM, &mut elem).map(drop)
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
    // The kernel writes back how many rows it did, unless it fails before the first: then the count is
    // as it was.
    bpf(MAP_UPDATE_BATCH, &mut batch)
        .map(drop)
        .map_err(|error| (if batch.count < count { batch.count } else { 0 }, error))
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
/// were, and whether the walk is over. ENOSPC when a bucket of a hash holds more; the walk stays where it
/// is then.
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
    let is_over = match bpf(MAP_LOOKUP_BATCH, &mut batch) {
        Ok(_) => false,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    cursor.started = true;
    std::mem::swap(&mut cursor.at, &mut cursor.next);
    Ok((batch.count, is_over))
}

/// Puts the key behind this one, or the first, into `next`. False at the end.
pub(crate) fn next_key(
    map: BorrowedFd<'_>,
    key: Option<&[u8]>,
    next: &mut [u8],
) -> io::Result<bool> {
    let mut elem = Elem {
        map: number(map),
        pad: 0,
        key: key.map_or(0, |key| key.as_ptr() as u64),
        value: next.as_mut_ptr() as u64,
        flags: 0,
    };
    match bpf(MAP_GET_NEXT_KEY, &mut elem) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
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

/// Attaches a program to a cgroup, beside others, for it and everything below it.
pub(crate) fn link(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    let mut attribute = LinkCreate {
        program: number(program),
        target: number(cgroup),
        attach_type: attach_type as u32,
        flags: 0,
    };
    bpf(LINK_CREATE, &mut attribute).map(owned)
}

/// What is attached at a hook itself, in the order in which it runs. A cgroup does not tell its links.
pub(crate) fn attached(carrier: Carrier<'_>, attach_type: AttachType) -> io::Result<Vec<Attached>> {
    let (mut programs, mut links) = ([0u32; MOST_ATTACHED], [0u32; MOST_ATTACHED]);
    let mut query = Query {
        target: carrier.number(),
        attach_type: attach_type as u32,
        query_flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr() as u64,
        count: MOST_ATTACHED as u32,
        pad: 0,
        program_flags: 0,
        links: match carrier {
            Carrier::Device(_) => links.as_mut_ptr() as u64,
            Carrier::Cgroup(_) => 0,
        },
        link_flags: 0,
        revision: 0,
    };
    match bpf(PROG_QUERY, &mut query) {
        // A device that never had a program.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
        other => other?,
    };
    Ok(programs
        .into_iter()
        .zip(links)
        .take(query.count as usize)
        .map(|(program, link)| Attached { program, link })
        .collect())
}

/// Takes a program off a hook where it sits without a link.
pub(crate) fn detach_program(
    program: BorrowedFd<'_>,
    carrier: Carrier<'_>,
    attach_type: AttachType,
) -> io::Result<()> {
    let mut attribute = Detach {
        target: carrier.number(),
        program: number(program),
        attach_type: attach_type as u32,
        flags: 0,
    };
    bpf(PROG_DETACH, &mut attribute).map(drop)
}

/// Opens a program by the kernel's number.
pub(crate) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    bpf(PROG_GET_FD_BY_ID, &mut by_number(id)).map(owned)
}

/// Opens a link by the kernel's number.
pub(crate) fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    bpf(LINK_GET_FD_BY_ID, &mut by_number(id)).map(owned)
}

/// Takes a link off its hook, whoever else holds it.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(LINK_DETACH, &mut by_number(number(link))).map(drop)
}

/// Every link of the machine, whoever made it. One that goes meanwhile is left out.
pub(crate) fn links() -> io::Result<Vec<LinkInfo>> {
    let mut found = Vec::new();
    let mut at = by_number(0);
    loop {
        match bpf(LINK_GET_NEXT_ID, &mut at) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
            other => other?,
        };
        at.number = at.next;
        match link_by_id(at.number).and_then(|link| link_info(link.as_fd())) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            info => found.push(info?),
        }
    }
}

fn by_number(number: u32) -> Number {
    Number {
        number,
        next: 0,
        flags: 0,
    }
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
