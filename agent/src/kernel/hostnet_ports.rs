//! `HOSTNET_PORTS` at a start: new beside conversations that are older, where an agent that did not know the table has taken
//! it away meanwhile. Programs keep it otherwise.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering::Relaxed;

use weir_common::event::Hook;
use weir_common::limits;
use weir_common::service::PortBits;
use weir_common::way::{Plan, Way, WayKey, WayState};

use super::flows::each;
use super::load::Loaded;
use super::mapped::MappedRows;

/// Says which ports the conversations that are there lead to, before any program looks.
///
/// # Errors
/// A table is not pinned any more, or cannot be read or mapped.
pub(super) fn begin(loaded: &Loaded) -> io::Result<()> {
    if !loaded.is_created("HOSTNET_PORTS") {
        return Ok(());
    }
    let mut bits = [0; limits::HOSTNET_PORTS as usize];
    // Answers of backends in pods are among them: their ports cost what the node sends from the same one a look-up.
    let mut see = |key: WayKey, answers: &Way| {
        let theirs = WayState::OPENER | WayState::MASQUERADE;
        if key.hook == Hook::TO_NET && answers.state.load(Relaxed) & theirs == 0 {
            let (row, bit) = PortBits::place(key.source_port);
            bits[row as usize] |= bit;
        }
        Ok(())
    };
    for table in ["TCP_WAYS", "OTHER_WAYS"] {
        each(&loaded.table(table)?, |key, way: Way| see(key, &way))?;
    }
    for table in ["TCP_PLANS", "OTHER_PLANS"] {
        each(&loaded.table(table)?, |key, plan: Plan| {
            see(key, &plan.back)
        })?;
    }
    let table = loaded.table("HOSTNET_PORTS")?;
    let rows = MappedRows::writable(table.as_fd(), bits.len(), size_of::<PortBits>())?;
    for (at, bits) in bits.into_iter().enumerate().filter(|(_, bits)| *bits != 0) {
        rows.set(at, bits);
    }
    Ok(())
}
