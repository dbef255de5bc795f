//! `UNUSED_PORTS` at a start: which ports of backends no socket was given. Programs keep it from then on.

use std::io;
use std::os::fd::AsFd as _;

use weir_common::limits;
use weir_common::service::PortBits;

use super::SOCKET_HOOKS;
use super::links::Links;
use super::load::Loaded;
use super::mapped::MappedRows;

/// The rows behind those of ports: the kernel's number of the program at each socket hook that keeps the table.
const KEEPERS: usize = limits::UNUSED_PORTS as usize;

const _: () = assert!(SOCKET_HOOKS.len() == limits::SOCKET_HOOKS as usize);

/// The table in our own address space.
#[derive(Debug)]
pub(super) struct Ports(MappedRows);

impl Ports {
    /// Before the socket hooks are placed: says that no port was used where that is known, and that each may have been
    /// beside sockets of programs that note none.
    ///
    /// # Errors
    /// The table is not pinned any more, or cannot be mapped.
    pub(super) fn begin(loaded: &Loaded, links: &Links) -> io::Result<Self> {
        let table = loaded.table("UNUSED_PORTS")?;
        let rows = KEEPERS + SOCKET_HOOKS.len();
        let ports = Self(MappedRows::writable(
            table.as_fd(),
            rows,
            size_of::<PortBits>(),
        )?);
        let is_new = loaded.is_created("SOCKETS") && loaded.is_created("UNUSED_PORTS");
        if is_new || !ports.is_kept(links) {
            let row = if is_new { u64::MAX } else { 0 };
            (0..KEEPERS).for_each(|at| ports.0.set(at, row));
        }
        Ok(ports)
    }

    /// Once they are placed.
    ///
    /// # Errors
    /// The kernel does not tell a program's number.
    pub(super) fn note_keepers(&self, loaded: &Loaded) -> io::Result<()> {
        for (at, (program, _)) in SOCKET_HOOKS.iter().enumerate() {
            let number = loaded.program_id(program)?;
            self.0.set(KEEPERS + at, number.into());
        }
        Ok(())
    }

    /// Are the programs at the socket hooks those that the last agent with this table has placed? Another one knows nothing of
    /// it. Their maps would say so, too, but that is told only to who may administer the whole machine.
    fn is_kept(&self, links: &Links) -> bool {
        SOCKET_HOOKS.iter().enumerate().all(|(at, (program, _))| {
            let link = links.info(&links.pin(program));
            let keeper = self.0.word(KEEPERS + at);
            link.is_ok_and(|link| keeper == Some(link.program.into()))
        })
    }
}
