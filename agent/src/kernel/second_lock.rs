//! The second lock, outside of eBPF: what a pod's device sends without the mark of our program is
//! dropped by netfilter. It keeps pods closed when somebody else removes a program.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    socket,
};
use serde_json::{Value, json};
use weir_cni::attachment::DEVICE_PREFIX;
use weir_common::node::{PASSED_MARK, PASSED_MASK};

/// Our table, of the `inet` family.
const TABLE: &str = "weir";
/// Before connection tracking, which starts at -200.
const PRIORITY: i32 = -300;

/// How the lock was found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lock {
    Closed {
        /// Packets that it has dropped since it was closed.
        drops: u64,
    },
    /// There is none, or not the one that we put there.
    Open,
}

/// Sees to it that the rule is in place. One that is right is left alone, and so keeps counting; another
/// is replaced in one transaction. Returns what was found.
///
/// # Errors
/// nft is missing, or refuses.
pub fn close() -> Result<Lock> {
    let found = state()?;
    if found == Lock::Open && !cfg!(feature = "broken-open-first") {
        // `add` before `delete`: deleting what is not there would fail.
        let rules = format!(
            "add table inet {TABLE}\n\
             delete table inet {TABLE}\n\
             table inet {TABLE} {{\n\
               chain prerouting {{\n\
                 type filter hook prerouting priority {PRIORITY}; policy accept;\n\
                 iifname \"{DEVICE_PREFIX}*\" meta mark & {PASSED_MASK:#x} != {PASSED_MARK:#x} \
                   counter drop comment \"no weir program has passed it\"\n\
               }}\n\
             }}\n"
        );
        nft(&["-f", "-"], &rules)?;
    }
    Ok(found)
}

/// What is in place now: chain, match, mark, mask and verdict are compared.
///
/// # Errors
/// nft is missing.
pub fn state() -> Result<Lock> {
    let mut command = Command::new("nft");
    let said = command
        .args(["-j", "list", "table", "inet", TABLE])
        .output()
        .context("run nft: install the package nftables")?;
    if !said.status.success() {
        // It fails so when there is no such table.
        return Ok(Lock::Open);
    }
    let listed = serde_json::from_slice(&said.stdout).context("read what nft lists")?;
    Ok(read(&listed))
}

/// Takes the rule away. False when there was none.
///
/// # Errors
/// nft is missing, or refuses.
pub fn open() -> Result<bool> {
    let there = Command::new("nft")
        .args(["list", "table", "inet", TABLE])
        .output()
        .context("run nft: install the package nftables")?;
    if !there.status.success() {
        return Ok(false);
    }
    nft(
        &["-f", "-"],
        &format!("add table inet {TABLE}\ndelete table inet {TABLE}\n"),
    )?;
    Ok(true)
}

/// The number of the namespace's netfilter rules: another one after every change, whoever makes it.
/// Costs two system calls, so that the rules themselves need to be listed only after a change.
///
/// # Errors
/// The kernel does not answer.
pub fn generation() -> Result<u32> {
    // include/uapi/linux/netfilter/nfnetlink.h and nf_tables.h.
    const GET_GENERATION: u16 = 10 << 8 | 16;
    const REQUEST: u16 = 1;
    const HEADERS: usize = 20;
    const GENERATION: u16 = 1;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .context("open a netfilter socket")?;
    let fd = socket.as_raw_fd();
    bind(fd, &NetlinkAddr::new(0, 0)).context("bind the netfilter socket")?;
    let mut request = Vec::with_capacity(HEADERS);
    request.extend((HEADERS as u32).to_ne_bytes());
    request.extend(GET_GENERATION.to_ne_bytes());
    request.extend(REQUEST.to_ne_bytes());
    // Sequence number, port, and a header of family, version and resource that are all zero.
    request.extend([0; 12]);
    sendto(fd, &request, &NetlinkAddr::new(0, 0), MsgFlags::empty()).context("ask netfilter")?;
    let mut answer = [0; 256];
    let length = recv(fd, &mut answer, MsgFlags::empty()).context("hear from netfilter")?;
    let mut rest = answer.get(HEADERS..length).unwrap_or_default();
    while let [l0, l1, t0, t1, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        if let (GENERATION, Some(&[a, b, c, d])) = (u16::from_ne_bytes([t0, t1]), rest.get(4..8)) {
            return Ok(u32::from_be_bytes([a, b, c, d]));
        }
        rest = rest
            .get(length.max(4).next_multiple_of(4)..)
            .unwrap_or_default();
    }
    bail!("netfilter answers without a generation")
}

/// Sees to it that the lock stays closed, until the future is dropped, and tells every state found. Looks
/// at the rules only when some have changed.
pub async fn keep(every: Duration, mut found: impl FnMut(Result<Lock>)) {
    let mut seen = None;
    let mut tick = tokio::time::interval(every);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let before = seen;
        let looked = tokio::task::spawn_blocking(move || {
            let now = generation()?;
            if before == Some(now) {
                return Ok((before, None));
            }
            let lock = close()?;
            // Closing it is a change itself: the next look sees whether it held.
            Ok((Some(now), Some(lock)))
        });
        match looked.await.context("look at the second lock").flatten() {
            Ok((generation, lock)) => {
                seen = generation;
                if let Some(lock) = lock {
                    found(Ok(lock));
                }
            }
            Err(error) => {
                seen = None;
                found(Err(error));
            }
        }
    }
}

/// Exactly one chain with exactly our rule.
fn read(listed: &Value) -> Lock {
    let objects = || listed["nftables"].as_array().into_iter().flatten();
    let mut chains = objects().filter_map(|object| object.get("chain"));
    let (Some(chain), None) = (chains.next(), chains.next()) else {
        return Lock::Open;
    };
    let is_hooked = chain["type"] == "filter"
        && chain["hook"] == "prerouting"
        && chain["prio"] == PRIORITY
        && chain["policy"] == "accept";
    let mut rules = objects().filter_map(|object| object.get("rule"));
    let (Some(rule), None) = (rules.next(), rules.next()) else {
        return Lock::Open;
    };
    let parts = rule["expr"].as_array().map(Vec::as_slice);
    let Some([device, mark, counter, verdict]) = parts else {
        return Lock::Open;
    };
    let is_ours = *device
        == json!({"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": format!("{DEVICE_PREFIX}*")}})
        && *mark
            == json!({"match": {"op": "!=", "left": {"&": [{"meta": {"key": "mark"}}, PASSED_MASK]}, "right": PASSED_MARK}})
        && *verdict == json!({"drop": null});
    match counter["counter"]["packets"].as_u64() {
        Some(drops) if is_hooked && is_ours => Lock::Closed { drops },
        _ => Lock::Open,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What nft 1.0.6 lists of our table.
    fn listed() -> Value {
        json!({"nftables": [
            {"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
            {"table": {"family": "inet", "name": "weir", "handle": 1}},
            {"chain": {"family": "inet", "table": "weir", "name": "prerouting", "handle": 1,
                "type": "filter", "hook": "prerouting", "prio": -300, "policy": "accept"}},
            {"rule": {"family": "inet", "table": "weir", "chain": "prerouting", "handle": 2,
                "comment": "x", "expr": [
                {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "weir*"}},
                {"match": {"op": "!=", "left": {"&": [{"meta": {"key": "mark"}}, 3840]},
                    "right": 3584}},
                {"counter": {"packets": 7, "bytes": 0}},
                {"drop": null}]}}]})
    }

    #[test]
    fn the_lock_is_closed_only_by_exactly_our_rule() {
        assert_eq!(read(&listed()), Lock::Closed { drops: 7 });
        let rule = |part: usize, to: Value| ("/nftables/3/rule/expr", part, to);
        for (list, part, to) in [
            rule(
                0,
                json!({"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "x*"}}),
            ),
            rule(
                1,
                json!({"match": {"op": "!=", "left": {"&": [{"meta": {"key": "mark"}}, 255]}, "right": 3584}}),
            ),
            rule(
                1,
                json!({"match": {"op": "!=", "left": {"&": [{"meta": {"key": "mark"}}, 3840]}, "right": 1}}),
            ),
            rule(3, json!({"accept": null})),
            (
                "/nftables",
                2,
                json!({"chain": {"name": "prerouting", "type": "filter", "hook": "input",
                "prio": -300, "policy": "accept"}}),
            ),
            ("/nftables", 3, json!({})),
        ] {
            let mut other = listed();
            other.pointer_mut(list).unwrap()[part] = to.clone();
            assert_eq!(read(&other), Lock::Open, "{to}");
        }
    }

    #[test]
    fn a_rule_before_ours_is_not_ours() {
        let mut other = listed();
        let accept = json!({"rule": {"expr": [{"accept": null}]}});
        other["nftables"].as_array_mut().unwrap().insert(3, accept);
        assert_eq!(read(&other), Lock::Open);
    }
}
