//! A node as agents before the shared blocks left it: two links of tcx for each device, pinned by its name. What an
//! agent makes of them is not here.

use std::path::Path;

use anyhow::{Context, Result};
use aya::EbpfLoader;
use aya::programs::links::FdLink;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use weir_agent::kernel::object::OBJECT;
use weir_agent::kernel::pin_path;
use weir_common::node::NodeConfig;
use weir_common::table::TABLES;
use zerocopy::IntoBytes;

/// The two sides, as those agents named their pins.
pub const SIDES: [(&str, TcAttachType); 2] =
    [("in", TcAttachType::Ingress), ("out", TcAttachType::Egress)];

/// Attaches programs of ours to both sides of a device of this thread's namespace and pins the links. The names are
/// those of the device and of its pins, which differ for an uplink.
///
/// # Errors
/// Not root, or a kernel without tcx.
pub fn attach(pins: &Path, device: &str, pin: &str, programs: [&str; 2]) -> Result<()> {
    let folder = pins.join("links");
    std::fs::create_dir_all(&folder).context("make the folder of links")?;
    let mut loader = EbpfLoader::new();
    let config = NodeConfig::default();
    loader.override_global("NODE", config.as_bytes(), true);
    for table in TABLES {
        loader.map_pin_path(table.name, pin_path(pins, table));
    }
    let mut ebpf = loader.load(OBJECT).context("load the object")?;
    for ((suffix, side), name) in SIDES.into_iter().zip(programs) {
        let program = ebpf.program_mut(name).context("no such program")?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load().context("load a program")?;
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let link = program.attach_with_options(device, side, options)?;
        let link: FdLink = program.take_link(link)?.try_into()?;
        link.pin(folder.join(format!("{pin}-{suffix}")))
            .context("pin a link")?;
    }
    Ok(())
}
