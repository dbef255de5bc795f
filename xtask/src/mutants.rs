//! `cargo xtask mutants`: which changes of `datapath` no test of the host notices. cargo-mutants makes the changes, in a copy of
//! the workspace that has no agent and no Kubernetes client: there a mutant is compiled and tested in seconds.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

use crate::build::cargo;
use crate::command::{self, step};
use crate::workspace::Workspace;

/// Tests of `datapath` on the host: one program, so that little is linked.
const TESTS: &[&str] = &[
    "bounds",
    "connections",
    "datapath",
    "documents",
    "established",
    "fragments",
    "hairpin",
    "handshakes",
    "neighbours",
    "node_ports",
    "properties",
    "refusals",
    "room",
    "shares",
    "sockets",
    "uplink",
];

/// And one that is asked before: it fails soonest.
const MODEL: &str = "model";

/// What of `weir-tests` they stand on: tables and packets in memory.
const PARTS: &[&str] = &[
    "bytes",
    "edges",
    "fragments",
    "frames",
    "mix",
    "model",
    "refusals",
    "stories",
    "tables",
    "world",
];

const MANIFEST: &str = r#"[package]
name = "weir-tests"
version.workspace = true
edition.workspace = true
publish.workspace = true

[lib]
test = false
doctest = false

[[test]]
name = "model"

[[test]]
name = "tables"

[dependencies]
fastrand.workspace = true
proptest.workspace = true
weir-common.workspace = true
weir-datapath.workspace = true
zerocopy.workspace = true
"#;

pub(crate) fn run(workspace: &Workspace, arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    crate::setup::cargo_mutants()?;
    let copy = workspace.target().join("mutants");
    step("copy what a mutant is tested with", || {
        write(workspace.root(), &copy)
    })?;
    let cargo = || {
        let mut cargo = cargo(workspace);
        cargo.current_dir(&copy).env_remove("CARGO_TARGET_DIR");
        cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
        cargo.env("CARGO_PROFILE_DEV_DEBUG", "false");
        cargo.env("RUST_BACKTRACE", "0");
        // `CI` turns it off, and a mutant takes ten seconds instead of one.
        cargo.env("CARGO_INCREMENTAL", "1");
        // What is random is the same each time.
        cargo.env("PROPTEST_RNG_SEED", "1");
        cargo.env("WEIR_MODEL_SEED", "2");
        cargo
    };
    let mut mutants = cargo();
    // What has just been built of it is used again.
    mutants.args(["mutants", "--package=weir-datapath", "--copy-target=true"]);
    if !arguments.iter().any(|argument| argument == "--list") {
        // By itself it would see only whether the changed package's own tests pass without a change.
        step("test what is not changed", || {
            command::run_quietly(cargo().args(["test", "--workspace"]))
        })?;
        mutants.args(["--baseline=skip", "--test-workspace=true", "--timeout=60"]);
    }
    let status = command::status(mutants.args(arguments))?;
    let code = status.code().unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).context("exit code")?))
}

/// Makes the copy anew, except for what was found in the one before (`mutants.out`).
fn write(root: &Path, copy: &Path) -> anyhow::Result<()> {
    for folder in ["common", "datapath", "tests", "docs"] {
        if copy.join(folder).exists() {
            fs::remove_dir_all(copy.join(folder)).context("remove the copy before")?;
        }
    }
    let manifest = fs::read_to_string(root.join("Cargo.toml")).context("read the workspace")?;
    put(&copy.join("Cargo.toml"), &workspace_of(&manifest))?;
    put(&copy.join("tests/Cargo.toml"), MANIFEST)?;
    put(&copy.join("tests/src/lib.rs"), &modules("pub mod", PARTS))?;
    put(
        &copy.join("tests/tests/tables/main.rs"),
        &modules("mod", TESTS),
    )?;
    for path in [
        "Cargo.lock",
        "LICENSE",
        "common",
        "datapath",
        "docs/datapath.md",
    ] {
        duplicate(&root.join(path), &copy.join(path))?;
    }
    let tests = root.join("tests");
    for part in PARTS {
        let from = tests.join("src").join(part);
        if from.is_dir() {
            duplicate(&from, &copy.join("tests/src").join(part))?;
        } else {
            let file = format!("src/{part}.rs");
            duplicate(&tests.join(&file), &copy.join("tests").join(&file))?;
        }
    }
    for test in TESTS {
        let (from, to) = (
            format!("tests/{test}.rs"),
            format!("tests/tables/{test}.rs"),
        );
        duplicate(&tests.join(from), &copy.join("tests").join(to))?;
    }
    let model = format!("tests/{MODEL}.rs");
    duplicate(&tests.join(&model), &copy.join("tests").join(&model))
}

/// The workspace with three members, and without profiles, which name packages that are not there.
fn workspace_of(manifest: &str) -> String {
    let mut lines = Vec::new();
    for line in manifest.lines() {
        if line.starts_with("[profile") {
            break;
        } else if line.starts_with("members = ") {
            lines.push(r#"members = ["common", "datapath", "tests"]"#);
        } else if !line.starts_with("default-members") {
            lines.push(line);
        }
    }
    lines.join("\n")
}

fn modules(word: &str, names: &[&str]) -> String {
    names
        .iter()
        .map(|name| format!("{word} {name};\n"))
        .collect()
}

fn put(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// A file, or a folder with all that is in it.
fn duplicate(from: &Path, to: &Path) -> anyhow::Result<()> {
    if !from.is_dir() {
        let text = fs::read_to_string(from).with_context(|| format!("read {}", from.display()))?;
        return put(to, &text);
    }
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let name = entry?.file_name();
        duplicate(&from.join(&name), &to.join(&name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_test_of_the_datapath_on_the_host_is_asked() -> anyhow::Result<()> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/tests");
        let mut named = Vec::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(name) = name.and_then(|name| name.strip_suffix(".rs")) else {
                continue;
            };
            // Of another ring.
            if name == "kernel" || name.starts_with("kernel_") || name.starts_with("netns_") {
                continue;
            }
            if fs::read_to_string(&path)?.contains("use weir_datapath::") {
                named.push(name.to_owned());
            }
        }
        named.sort_unstable();
        assert_eq!(named, TESTS);
        Ok(())
    }
}
