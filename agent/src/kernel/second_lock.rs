//! The second lock, outside of eBPF: what a pod's device sends without the mark of our program is
//! dropped by netfilter. It keeps pods closed when somebody else removes a program.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use weir_cni::attachment::DEVICE_PREFIX;
use weir_common::node::{PASSED_MARK, PASSED_MASK};

/// Our table, of the `inet` family.
const TABLE: &str = "weir";

/// Puts the rule in place, in one transaction with the removal of an older one.
///
/// # Errors
/// nft is missing, or refuses.
pub fn close() -> Result<()> {
    // `add` before `delete`: deleting what is not there would fail.
    let rules = format!(
        "add table inet {TABLE}\n\
         delete table inet {TABLE}\n\
         table inet {TABLE} {{\n\
           chain prerouting {{\n\
             type filter hook prerouting priority -300; policy accept;\n\
             iifname \"{DEVICE_PREFIX}*\" meta mark & {PASSED_MASK:#x} != {PASSED_MARK:#x} \
               counter drop comment \"no weir program has passed it\"\n\
           }}\n\
         }}\n"
    );
    nft(&["-f", "-"], &rules).map(drop)
}

/// Is the rule there?
///
/// # Errors
/// nft is missing.
pub fn is_closed() -> Result<bool> {
    let mut command = Command::new("nft");
    let said = command
        .args(["list", "chain", "inet", TABLE, "prerouting"])
        .output();
    let said = said.context("run nft: install the package nftables")?;
    Ok(said.status.success() && String::from_utf8_lossy(&said.stdout).contains(DEVICE_PREFIX))
}

/// Takes the rule away.
///
/// # Errors
/// nft is missing, or refuses.
pub fn open() -> Result<()> {
    nft(
        &["-f", "-"],
        &format!("add table inet {TABLE}\ndelete table inet {TABLE}\n"),
    )
    .map(drop)
}

fn nft(args: &[&str], input: &str) -> Result<String> {
    let mut child = Command::new("nft")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("run nft: install the package nftables")?;
    child
        .stdin
        .take()
        .context("nft has a standard input")?
        .write_all(input.as_bytes())
        .context("give nft its rules")?;
    let said = child.wait_with_output().context("wait for nft")?;
    if !said.status.success() {
        bail!(
            "nft refuses the second lock: {}",
            String::from_utf8_lossy(&said.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&said.stdout).into_owned())
}
