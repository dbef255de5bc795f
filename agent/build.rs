//! Builds the BPF object that `kernel::object` embeds.

use anyhow::Context as _;

fn main() -> anyhow::Result<()> {
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "weir-ebpf",
            root_dir: "../ebpf",
            ..Default::default()
        }],
        aya_build::Toolchain::Nightly,
    )
    .context("build the BPF object; `cargo xtask setup` installs what it needs")
}
