//! `UNUSED_PORTS` at a start: which ports of backends no socket was given. Programs keep it from then on.

use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result};
use aya::programs::loaded_programs;
use weir_common::limits;
use weir_common::service::UnusedPorts;

use super::SOCKET_HOOKS;
use super::links::Links;
use super::load::Loaded;
use super::mapped::MappedRows;
use super::sys;

/// Before the socket hooks are placed: says that no port was used where that is known, and that each may have been
/// beside sockets of programs that note none.
pub(super) fn begin(loaded: &Loaded, links: &Links) -> Result<()> {
    let is_new = loaded.is_created("SOCKETS") && loaded.is_created("UNUSED_PORTS");
    if !is_new && are_noted(loaded, links)? {
        return Ok(());
    }
    let rows = limits::UNUSED_PORTS as usize;
    let table = loaded.table("UNUSED_PORTS")?;
    let ports = MappedRows::writable(table.as_fd(), rows, size_of::<UnusedPorts>())
        .context("map UNUSED_PORTS")?;
    let row = if is_new { u64::MAX } else { 0 };
    (0..rows).for_each(|at| ports.set(at, row));
    Ok(())
}

/// Do the programs at the socket hooks, which an earlier agent has placed, use our table?
fn are_noted(loaded: &Loaded, links: &Links) -> Result<bool> {
    let ours = sys::map_layout(loaded.table("UNUSED_PORTS")?.as_fd())?.id;
    let uses_ours = |id| {
        loaded_programs().flatten().any(|program| {
            let uses = || program.map_ids().ok().flatten();
            program.id() == id && uses().is_some_and(|maps| maps.contains(&ours))
        })
    };
    let mut hooks = SOCKET_HOOKS.iter();
    Ok(hooks.all(|(name, _)| {
        let link = links.info(&links.pin(name));
        link.is_ok_and(|link| uses_ours(link.program))
    }))
}
