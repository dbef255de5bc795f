//! Builds the BPF object that `kernel::object` embeds.

use anyhow::Context as _;

fn main() -> anyhow::Result<()> {
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "weir-ebpf",
            root_dir: "../ebpf",
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(include_str!("../ebpf/TOOLCHAIN").trim()),
    )
    .context("build the BPF object; `cargo xtask setup` installs what it needs")
}
