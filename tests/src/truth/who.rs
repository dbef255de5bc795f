//! What a person says about a situation, to be held against the oracle: who reaches the pod `a` of `x`, or whom it reaches.

use anyhow::{Context as _, Result, bail};
use weir_common::Protocol;

use super::objects::everybody;

/// Which of the questions between `xa` and the others is meant, and with whom it is answered.
#[derive(Debug, PartialEq)]
pub(super) struct Claim {
    /// Does `xa` ask?
    pub(super) asks: bool,
    pub(super) protocol: Protocol,
    /// Host order.
    pub(super) port: u16,
    /// One family only: 4 or 6.
    pub(super) family: Option<u8>,
    pub(super) who: Vec<String>,
}

/// Reads `<t80 xb y* n2 | >u81 *`: who reaches `xa` at TCP 80, whom it reaches at UDP 81. `y*` are the pods of `y`, `*` is everybody;
/// `<4t80` is about IPv4 only. What always is allowed need not be said: itself and its own node, which is `n1`.
///
/// # Errors
/// It is none.
pub(super) fn claims(text: &str) -> Result<Vec<Claim>> {
    text.split('|').map(|it| claim(it.trim())).collect()
}

fn claim(text: &str) -> Result<Claim> {
    let mut words = text.split_whitespace();
    let first = words.next().context("an empty claim")?;
    let (asks, rest) = match first.split_at_checked(1) {
        Some(("<", rest)) => (false, rest),
        Some((">", rest)) => (true, rest),
        _ => bail!("{first:?} has no direction"),
    };
    let (family, rest) = match rest.as_bytes().first() {
        Some(digit @ (b'4' | b'6')) => (Some(digit - b'0'), &rest[1..]),
        _ => (None, rest),
    };
    let (protocol, port) = rest.split_at_checked(1).context("no protocol")?;
    let protocol = match protocol {
        "t" => Protocol::TCP,
        "u" => Protocol::UDP,
        "s" => Protocol::SCTP,
        other => bail!("{other:?} is no protocol"),
    };
    let mut who = vec!["xa".to_owned(), "n1".to_owned()];
    for word in words {
        let found: Vec<String> = everybody()
            .into_iter()
            .filter(|it| is_meant(word, it))
            .collect();
        if found.is_empty() {
            bail!("{word:?} is nobody");
        }
        who.extend(found);
    }
    who.sort();
    who.dedup();
    Ok(Claim {
        asks,
        protocol,
        port: port.parse().with_context(|| format!("port {port:?}"))?,
        family,
        who,
    })
}

fn is_meant(word: &str, name: &str) -> bool {
    match word.strip_suffix('*') {
        Some("") => true,
        Some(space) => name.len() == 2 && name.starts_with(space) && !name.starts_with('n'),
        None => word == name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_read() {
        let read = claims("<t80 xb z* | >4u81").unwrap();
        assert_eq!(read[0].who, ["n1", "xa", "xb", "za", "zb", "zc"]);
        assert_eq!(
            (read[0].asks, read[0].family, read[0].port),
            (false, None, 80)
        );
        assert_eq!(
            (read[1].asks, read[1].family, read[1].port),
            (true, Some(4), 81)
        );
        assert_eq!(read[1].protocol, Protocol::UDP);
        assert!(claims("<t80 nobody").is_err());
        assert!(claims("t80").is_err());
    }
}
