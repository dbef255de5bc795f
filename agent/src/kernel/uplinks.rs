//! Programs on the node's uplinks.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};

use super::links::Links;
use super::sys::{AttachType, Seat};
use super::{Hook, Kernel};

/// What leaves the node and what comes into it meets: program, side.
pub(super) const NET_HOOKS: [(&str, AttachType); 2] = [
    ("weir_from_net", AttachType::TcxIngress),
    ("weir_to_net", AttachType::TcxEgress),
];
/// How the names of their pins begin; the interface index follows, since a bpffs takes no name with a dot.
const PREFIX: &str = "uplink-";

impl Kernel {
    /// Puts the programs on the uplinks, and takes them off every other device.
    ///
    /// # Errors
    /// The kernel refuses one; the others are done.
    pub fn settle_net_hooks(&self, uplinks: &BTreeMap<u32, String>) -> Result<()> {
        let placed = self.place_net_hooks(uplinks);
        for (name, index) in pinned(self.loaded.bpffs())? {
            if !uplinks.contains_key(&index) {
                for (_, side) in NET_HOOKS {
                    self.links.remove(&self.links.device_pin(&name, side))?;
                }
            }
        }
        placed
    }

    /// Puts the programs where they should be, in place of whatever is there.
    ///
    /// # Errors
    /// The kernel refuses one; the others are done.
    pub fn place_net_hooks(&self, uplinks: &BTreeMap<u32, String>) -> Result<()> {
        let mut first = Ok(());
        for (index, device) in uplinks {
            for (program, side) in NET_HOOKS {
                let placed = self.loaded.program(program).map_err(anyhow::Error::from);
                let placed = placed.and_then(|program| {
                    self.links
                        .place_on_device(program, &pin_name(*index), *index, side)?;
                    Ok(())
                });
                first = first.and(placed.with_context(|| format!("uplink {device}")));
            }
        }
        first
    }

    /// Every hook of an uplink.
    pub(super) fn net_hooks(&self, uplinks: &BTreeMap<u32, String>) -> Vec<Hook> {
        let hooks = uplinks.iter().flat_map(|(index, device)| {
            NET_HOOKS.map(|(program, side)| {
                let pin = self.links.device_pin(&pin_name(*index), side);
                let name = format!("{PREFIX}{device}{}", Links::suffix(side));
                let seat = Seat::Device(*index, side);
                self.hook(name, program, &pin, |info| info.seat() == seat)
            })
        });
        hooks.collect()
    }
}

impl Hook {
    /// Is it one of an uplink?
    pub fn is_of_uplink(name: &str) -> bool {
        name.starts_with(PREFIX)
    }
}

fn pin_name(index: u32) -> String {
    format!("{PREFIX}{index}")
}

/// The uplinks that are pinned: how their pins begin, and the interface index that the name says.
pub(super) fn pinned(bpffs: &Path) -> Result<BTreeMap<String, u32>> {
    let folder = Links::folder_in(bpffs);
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        entries => entries.with_context(|| format!("read {}", folder.display()))?,
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        for (_, side) in NET_HOOKS {
            if let Some(pin) = name.strip_suffix(Links::suffix(side))
                && let Some(index) = pin.strip_prefix(PREFIX).and_then(|it| it.parse().ok())
            {
                found.insert(pin.to_owned(), index);
            }
        }
    }
    Ok(found)
}
