//! The frames between the plugin and the agent: one JSON object per line, over a stream socket.
//! The connection is the transaction of an ADD: when it ends without `Done`, the agent takes the attachment back. An agent
//! that waits no longer refuses what is said from then on, so the plugin knows whether it was heard.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use weir_common::device;

use crate::attachment::Attachment;

/// How long an ADD may take altogether, in milliseconds (docs/architecture.md, "A pod's network").
pub const ADD_DEADLINE_MS: u64 = 2_000;

/// The longest frame either side accepts, in bytes, its newline included. GC lists every valid
/// attachment of a node: 1 MiB is room for 3,500 of the longest.
pub const MAX_FRAME: usize = 1 << 20;

/// The gateway of every pod, which no device carries: a fixed neighbour entry stands for it.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::from_bits(u32::from_be_bytes(device::GATEWAY_V4));
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::from_bits(u128::from_be_bytes(device::GATEWAY_V6));

/// The gateway for traffic of the family of `address`.
pub fn gateway(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => GATEWAY_V4.into(),
        IpAddr::V6(_) => GATEWAY_V6.into(),
    }
}

/// What the plugin says. `Add`, `Attach`, `Done` go over one connection, in this order; every other
/// request is one frame and one answer.
#[derive(Clone, Debug, Eq, PartialEq, Deserialize, Serialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Asks for a lease. Answered by `Leased` or `Refused`.
    Add(Add),
    /// The devices exist and are down; the node's end has this index in the node's namespace.
    /// Answered by `Ok` when the pod's policy is in force.
    Attach { host_ifindex: u32 },
    /// The devices are configured and up: from here the attachment stays. The plugin does not wait for the `Ok` that answers
    /// it; those of earlier releases do.
    Done,
    /// Frees the attachment and its addresses. Answered by `Ok`, also when there is none, or `Refused`: ask again.
    Del { attachment: Attachment },
    /// Asks for the lease of an attachment. Answered by `Leased` or `Refused(NotFound)`.
    Check { attachment: Attachment },
    /// Whether an ADD could be served. Answered by `Ok` or `Refused`.
    Status,
    /// Frees every attachment of this network but these. Answered by `Ok` or `Refused`.
    Gc {
        network: String,
        valid: Vec<Attachment>,
    },
}

/// What the agent must know to lease addresses.
#[derive(Clone, Debug, Eq, PartialEq, Deserialize, Serialize)]
pub struct Add {
    pub attachment: Attachment,
    /// The name of the network configuration; GC speaks of one network only.
    pub network: String,
    /// The inode of the pod's network namespace.
    pub netns: u64,
    /// What `CNI_ARGS` says about the pod; a container outside Kubernetes has none.
    pub pod: Option<Pod>,
}

/// A Kubernetes pod, as the runtime names it in `CNI_ARGS`.
#[derive(Clone, Debug, Eq, PartialEq, Deserialize, Serialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    /// Tells a pod from an earlier one of the same name. Old runtimes do not send it.
    pub uid: Option<String>,
}

/// The Ethernet addresses of a pod's veth pair. They are part of the lease, so the record of an
/// attachment is complete before its devices exist.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Deserialize, Serialize)]
pub struct Macs {
    /// The node's end.
    pub host: Mac,
    pub pod: Mac,
}

/// What the agent says.
#[derive(Clone, Debug, Eq, PartialEq, Deserialize, Serialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Ok,
    Leased(Leased),
    /// An unfinished ADD has been taken back: nothing of it is left at the agent.
    Released,
    Refused(Refused),
}

/// The network of one attachment.
#[derive(Clone, Debug, Eq, PartialEq, Deserialize, Serialize)]
pub struct Leased {
    /// One address, or one of each family, IPv4 first; as `/32` and `/128`.
    pub addresses: Vec<IpNet>,
    /// Of both devices, in bytes.
    pub mtu: u32,
    /// The name of the node's end.
    pub device: String,
    pub macs: Macs,
}

/// Why the agent does not do what was asked.
#[derive(Clone, Debug, Eq, PartialEq, Deserialize, Serialize)]
pub struct Refused {
    pub reason: Refusal,
    /// For people.
    pub message: String,
}

/// What the plugin can do about it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The agent cannot serve an ADD yet, or its pod's policy is not known in time.
    NotReady,
    /// No address is free.
    Exhausted,
    /// The attachment exists; it stays as it is.
    Exists,
    /// There is no such attachment.
    NotFound,
    /// The lease cannot be written or read.
    Storage,
    /// The request makes no sense here.
    Invalid,
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// Text that is not six bytes in hexadecimal with colons between them.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Error)]
#[error("not an Ethernet address")]
pub struct InvalidMac;

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let mut parts = text.split(':');
        let mut mac = [0; 6];
        for byte in &mut mac {
            let part = parts.next().filter(|part| part.len() == 2);
            *byte = part
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or(InvalidMac)?;
        }
        match parts.next() {
            None => Ok(Self(mac)),
            Some(_) => Err(InvalidMac),
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, InvalidMac> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_six_hexadecimal_bytes_are_an_ethernet_address() {
        assert_eq!(
            "02:00:5e:10:00:ff".parse(),
            Ok(Mac([2, 0, 0x5e, 0x10, 0, 0xff]))
        );
        for text in [
            "",
            "02:00:5e:10:00",
            "02:00:5e:10:00:ff:01",
            "2:0:5e:10:0:ff",
            "gg:00:00:00:00:00",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(InvalidMac), "{text}");
        }
    }

    #[test]
    fn frames_are_single_lines_that_read_back() {
        let request = Request::Add(Add {
            attachment: Attachment::new("c1", "eth0").unwrap(),
            network: "weir\npods".into(),
            netns: 4_026_531_840,
            pod: Some(Pod {
                namespace: "default".into(),
                name: "web".into(),
                uid: None,
            }),
        });
        let line = serde_json::to_string(&request).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
        assert_eq!(
            serde_json::to_string(&Request::Done).unwrap(),
            r#"{"request":"done"}"#
        );
    }
}
