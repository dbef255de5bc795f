//! The Rust side: host components, a nightly with its source for the BPF target, the BPF linker,
//! cargo-deny.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::command::{printed, run, step};

const LINKER: &str = "0.13.0";
const DENY: &str = "0.20.2";
const MUTANTS: &str = "27.1.0";

/// A nightly compiler and the LLVM it was built with, which bpf-linker has to share: the linker
/// reads the compiler's bitcode.
pub(crate) struct Nightly {
    /// Major version.
    pub(crate) llvm: u32,
}

/// Formatter and lints for the toolchain that runs us; rustup's minimal profile has neither.
pub(crate) fn host_components() -> anyhow::Result<()> {
    let sysroot = sysroot(&[])?;
    for (component, program) in [("rustfmt", "cargo-fmt"), ("clippy", "cargo-clippy")] {
        if !sysroot.join("bin").join(program).exists() {
            step(&format!("rustup component add {component}"), || {
                run(Command::new("rustup").args(["component", "add", component]))
            })?;
        }
    }
    Ok(())
}

/// The standard library for another target than the machine's own.
pub(crate) fn target(target: &str) -> anyhow::Result<()> {
    let installed = sysroot(&[])?.join("lib/rustlib").join(target).join("lib");
    if installed.exists() {
        return Ok(());
    }
    step(&format!("rustup target add {target}"), || {
        run(Command::new("rustup").args(["target", "add", target]))
    })
}

/// The toolchain that compiles BPF programs. It has a date: a nightly of another day may have another LLVM,
/// for which Debian has no packages, or another opinion on our lints.
pub(crate) fn bpf_toolchain() -> &'static str {
    include_str!("../../../ebpf/TOOLCHAIN").trim()
}

/// The nightly of our date, with what compiling for BPF takes.
pub(crate) fn nightly() -> anyhow::Result<Nightly> {
    let name = bpf_toolchain();
    let installed = printed(Command::new("rustup").args(["toolchain", "list"]))
        .context("run `rustup toolchain list`: Weir is built with rustup, https://rustup.rs")?;
    if !installed.lines().any(|line| line.starts_with(name)) {
        step(&format!("rustup toolchain install {name}"), || {
            let mut rustup = Command::new("rustup");
            rustup.args(["toolchain", "install", name, "--profile", "minimal"]);
            run(rustup.args(["--component", "rust-src", "--component", "clippy"]))
        })?;
    }
    let sysroot = sysroot(&["run", name])?;
    let parts = [
        (
            "rust-src",
            sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs"),
        ),
        ("clippy", sysroot.join("bin/cargo-clippy")),
    ];
    for (component, proof) in parts {
        if !proof.exists() {
            step(
                &format!("rustup component add {component} for {name}"),
                || {
                    let mut rustup = Command::new("rustup");
                    run(rustup.args(["component", "add", component, "--toolchain", name]))
                },
            )?;
        }
    }
    let version = printed(Command::new(sysroot.join("bin/rustc")).arg("-vV"))
        .context("run the nightly rustc")?;
    let llvm = llvm_major(&version)
        .with_context(|| format!("no LLVM version in what `rustc -vV` says:\n{version}"))?;
    Ok(Nightly { llvm })
}

/// The BPF linker that fits a nightly.
pub(crate) struct Linker {
    llvm: u32,
}

impl Linker {
    pub(crate) fn matching(nightly: &Nightly) -> anyhow::Result<Self> {
        let llvm = nightly.llvm;
        if !(21..=23).contains(&llvm) {
            bail!(
                "{} is built with LLVM {llvm}, and bpf-linker {LINKER} knows LLVM 21 to 23: name \
                 another date in ebpf/TOOLCHAIN",
                bpf_toolchain()
            );
        }
        Ok(Self { llvm })
    }

    pub(crate) fn is_installed(&self) -> bool {
        let version = printed(Command::new("bpf-linker").arg("--version"));
        if version.as_deref().map(str::trim) != Some(&format!("bpf-linker {LINKER}")) {
            return false;
        }
        // Same version, other LLVM: what an updated nightly leaves behind.
        let libraries =
            printed(Command::new("sh").args(["-c", "ldd \"$(command -v bpf-linker)\""]));
        match libraries.as_deref().and_then(linked_llvm) {
            Some(llvm) => llvm == self.llvm,
            // Linked statically; its maker chose the LLVM.
            None => true,
        }
    }

    pub(crate) fn install(&self) -> anyhow::Result<()> {
        let llvm = self.llvm;
        let prefix = format!("/usr/lib/llvm-{llvm}");
        let mut cargo = Command::new("cargo");
        cargo.args([
            "install",
            "bpf-linker",
            "--version",
            LINKER,
            "--locked",
            "--force",
            "--quiet",
        ]);
        cargo.args([
            "--no-default-features",
            "--features",
            &format!("llvm-{llvm}"),
        ]);
        cargo.env("LLVM_PREFIX", &prefix);
        cargo.env(format!("LLVM_SYS_{llvm}1_PREFIX"), &prefix);
        run(&mut cargo)?;
        if !self.is_installed() {
            bail!(
                "bpf-linker {LINKER} was installed but another one comes first on PATH; \
                 put ~/.cargo/bin in front"
            );
        }
        Ok(())
    }
}

/// Brings cargo-deny, which only `check` uses and which takes minutes to compile: neither `demo`
/// nor `build` should wait for it.
pub(crate) fn cargo_deny() -> anyhow::Result<()> {
    cargo_program("deny", DENY)
}

/// Brings cargo-mutants, which only `mutants` uses.
pub(crate) fn cargo_mutants() -> anyhow::Result<()> {
    cargo_program("mutants", MUTANTS)
}

/// A command of cargo's that it does not come with.
fn cargo_program(command: &str, version: &str) -> anyhow::Result<()> {
    if printed(Command::new("cargo").args([command, "--version"])).is_some() {
        return Ok(());
    }
    let name = format!("cargo-{command}");
    step(&format!("install {name} (compiles it: minutes)"), || {
        let mut cargo = Command::new("cargo");
        // It runs for seconds; compiling it optimised would cost more than it could ever save.
        cargo
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_RELEASE_LTO", "off");
        cargo.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        run(cargo.args([
            "install",
            &name,
            "--version",
            version,
            "--locked",
            "--quiet",
        ]))
    })
}

fn sysroot(through: &[&str]) -> anyhow::Result<PathBuf> {
    let words: Vec<_> = through
        .iter()
        .copied()
        .chain(["rustc", "--print", "sysroot"])
        .collect();
    let (program, arguments) = match through {
        [] => ("rustc", &words[1..]),
        _ => ("rustup", &words[..]),
    };
    let path = printed(Command::new(program).args(arguments))
        .with_context(|| format!("run `{program} {}`", arguments.join(" ")))?;
    Ok(Path::new(path.trim()).to_path_buf())
}

fn llvm_major(version: &str) -> Option<u32> {
    let version = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.parse().ok()
}

fn linked_llvm(libraries: &str) -> Option<u32> {
    let after = libraries.split("libLLVM").nth(1)?;
    // `libLLVM.so.22.1` since LLVM 18, `libLLVM-17.so.1` before.
    let digits: String = after
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_of_a_compiler_is_its_major_version() {
        let version = "rustc 1.97.0-nightly\nrelease: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        assert_eq!(llvm_major(version), Some(22));
        assert_eq!(llvm_major("rustc 1.97.0-nightly\n"), None);
    }

    #[test]
    fn the_llvm_of_a_linker_is_the_library_it_loads() {
        let cases = [
            (
                "\tlibLLVM.so.22.1 => /usr/lib/llvm-22/lib/libLLVM.so.22.1 (0x7f)\n",
                Some(22),
            ),
            (
                "\tlibLLVM-17.so.1 => /lib/libLLVM-17.so.1 (0x7f)\n",
                Some(17),
            ),
            ("\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n", None),
        ];
        for (libraries, expected) in cases {
            assert_eq!(linked_llvm(libraries), expected, "{libraries}");
        }
    }
}
