//! Builds the BPF object that `kernel::object` embeds.

use anyhow::Context as _;

fn main() -> anyhow::Result<()> {
    let features: &[&str] = match std::env::var_os("CARGO_FEATURE_OTHER_LAYOUT") {
        Some(_) => &["other-layout"],
        None => &[],
    };
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "weir-ebpf",
            root_dir: "../ebpf",
            features,
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(include_str!("../ebpf/TOOLCHAIN").trim()),
    )
    .context("build the BPF object; `cargo xtask setup` installs what it needs")
}
