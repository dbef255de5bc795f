//! The agent's local socket, asked without starting `weir`: for tests that ask hundreds of times.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::node::Node;

/// What `weir <what> -o json` would be told.
///
/// # Errors
/// The agent does not answer.
pub fn ask(node: &Node, what: &str) -> Result<Value> {
    let socket = node.machine().dir().join("run/admin.sock");
    let mut stream = UnixStream::connect(socket).context("connect to the agent")?;
    // Without chunks, and closed behind the answer.
    write!(stream, "GET /v1/{what} HTTP/1.0\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    match said.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains(" 200 ") => Ok(serde_json::from_str(body)?),
        _ => bail!("the agent said {said:?}"),
    }
}

/// How many packets the node has dropped, exactly, by reason.
///
/// # Errors
/// The agent does not answer.
pub fn dropped(node: &Node) -> Result<BTreeMap<String, u64>> {
    let answer = ask(node, "drops")?;
    let totals = answer["totals"].as_array().context("drops have totals")?;
    let row = |row: &Value| {
        let reason = row["reason"].as_str().context("a reason")?;
        let packets = row["packets"].as_u64().context("a count")?;
        Ok((reason.to_owned(), packets))
    };
    totals.iter().map(row).collect()
}
