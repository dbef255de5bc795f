//! Programs at their hooks: the links that hold them, and those that sit there without.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tracing::debug;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::objects::{info, link_by_id};
use super::{bpf, by_number, number, owned};

const PROG_DETACH: libc::c_long = 9;
const PROG_QUERY: libc::c_long = 16;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
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

/// Takes a link off its hook, whoever else holds it.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(LINK_DETACH, &mut by_number(number(link))).map(drop)
}

/// What a link is.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(link)
}

/// Does an error say something of this process, and so of every link?
fn is_of_us(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)
    )
}

/// Every link of the machine, whoever made it. Left out is one that cannot be read: it goes meanwhile (ENOENT), is not
/// whole yet (EAGAIN), or is of a kind that says nothing of itself, each in words of its own.
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
            Ok(info) => found.push(info),
            Err(error) if is_of_us(&error) => return Err(error),
            Err(error) => debug!(link = at.number, %error, "a link is left out"),
        }
    }
}
