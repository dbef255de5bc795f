//! From what Kubernetes says to what we mean. Everything is checked here, once; nothing behind it checks
//! again. A part that is wrong (one endpoint of a slice) is left out and reported, and the rest holds; an
//! object that is wrong as a whole is refused.

mod cluster_policy;
mod node;
mod pod;
mod policy;
mod selector;
mod service;
mod slice;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use ipnet::IpNet;
use weir_common::Protocol;

use super::{Family, Labels, Object, ObjectName};
use crate::watch::wire;

pub use cluster_policy::cluster_policy;
pub use node::{namespace, node};
pub use pod::pod;
pub use policy::{closed_policy, policy};
pub use service::{FamilyPolicy, FamilyRequest, family_request, service};
pub use slice::slice;

/// An object that was understood, perhaps without some of its parts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Converted {
    /// `None`: the object is of a sort that does not concern us.
    pub object: Option<Object>,
    pub problems: Vec<Problem>,
}

/// A part of an object that was left out.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    /// Which part, such as `endpoint 3`; counted from 0.
    pub part: String,
    pub reason: String,
}

/// An object that cannot be understood.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Invalid {
    pub reason: String,
    /// What to hold when nothing better was ever known of the object: a policy that isolates the pods it
    /// selects and allows nothing. `None`: nothing can be held.
    pub closed: Option<Object>,
}

impl From<String> for Invalid {
    fn from(reason: String) -> Self {
        Self {
            reason,
            closed: None,
        }
    }
}

impl From<Object> for Converted {
    fn from(object: Object) -> Self {
        Self {
            object: Some(object),
            problems: Vec::new(),
        }
    }
}

/// The namespaced name of an object. The API server checks names; a manifest has been checked by nobody.
fn id(meta: &wire::Meta) -> Result<ObjectName, String> {
    let namespace = name("metadata.namespace", &meta.namespace)?;
    Ok(ObjectName::new(
        namespace,
        name("metadata.name", &meta.name)?,
    ))
}

/// What is wrong with an object, in the order of its fields. What cannot be read as what it should be has one
/// fault, the first that is found in it.
#[derive(Debug, Default)]
struct Faults(Vec<String>);

/// How many faults of an object are said; an Event has room for 1024 bytes.
const SAID: usize = 8;

impl Faults {
    /// What was read, unless there is something wrong with it.
    fn keep<T>(&mut self, read: Result<T, impl Into<Self>>) -> Option<T> {
        read.map_err(|faults| self.0.extend(faults.into().0)).ok()
    }

    fn push(&mut self, fault: impl Into<String>) {
        self.0.push(fault.into());
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// They are of the part that this names, with what is between it and them.
    fn at(self, part: &str) -> Self {
        let faults = self.0.into_iter();
        Self(faults.map(|fault| format!("{part}{fault}")).collect())
    }

    /// What was read in parts, if nothing is wrong.
    fn or<T>(self, read: T) -> Result<T, Self> {
        match self.is_empty() {
            true => Ok(read),
            false => Err(self),
        }
    }

    /// In words.
    fn reason(self) -> String {
        let said = &self.0[..self.0.len().min(SAID)];
        match self.0.len() - said.len() {
            0 => said.join("; "),
            more => format!("{}; and {more} more", said.join("; ")),
        }
    }
}

impl From<String> for Faults {
    fn from(fault: String) -> Self {
        Self(vec![fault])
    }
}

const ENFORCEMENT: &str = "annotation weir.local/enforcement";

/// Is a policy only audited?
fn is_audit(annotations: &wire::Annotations) -> Result<bool, String> {
    match annotations.enforcement.as_deref() {
        None | Some("enforce") => Ok(false),
        Some("audit") => Ok(true),
        Some(other) => Err(format!("{other:?} is neither \"audit\" nor \"enforce\"")),
    }
}

/// Whoever says something else gets what he had without saying it.
fn enforced(why: &str) -> Problem {
    Problem {
        part: ENFORCEMENT.to_owned(),
        reason: format!("{why}: the policy is enforced"),
    }
}

/// `metadata.creationTimestamp`, in seconds since 1970.
fn created(meta: &wire::Meta) -> Option<u64> {
    let at = humantime::parse_rfc3339(meta.creation_timestamp.as_deref()?).ok()?;
    at.duration_since(UNIX_EPOCH)
        .ok()
        .map(|since| since.as_secs())
}

/// A DNS subdomain (RFC 1123), as every kind that we read demands of its name.
fn name(field: &str, text: &str) -> Result<Arc<str>, String> {
    let ends_well = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let is_name = text.len() <= 253
        && text.bytes().all(|c| ends_well(c) || c == b'-' || c == b'.')
        && text.bytes().next().is_some_and(ends_well)
        && text.bytes().last().is_some_and(ends_well);
    match (is_name, text.is_empty()) {
        (true, _) => Ok(text.into()),
        (false, true) => Err(format!("{field} is missing")),
        (false, false) => Err(format!("{field}: {text:?} is not a valid name")),
    }
}

fn labels(wire: std::collections::BTreeMap<String, String>) -> Labels {
    wire.into_iter()
        .map(|(k, v)| (k.into(), v.into()))
        .collect()
}

/// "" and absent are the same name everywhere in these APIs.
fn optional(text: Option<String>) -> Option<Arc<str>> {
    text.filter(|t| !t.is_empty()).map(Into::into)
}

/// An absent protocol is TCP (core/v1, discovery/v1, networking/v1).
fn protocol(text: Option<&str>) -> Result<Protocol, String> {
    match text {
        None | Some("" | "TCP") => Ok(Protocol::TCP),
        Some("UDP") => Ok(Protocol::UDP),
        Some("SCTP") => Ok(Protocol::SCTP),
        Some(other) => Err(format!("protocol {other:?} is not TCP, UDP or SCTP")),
    }
}

/// A port that can be sent to.
fn port(number: i64) -> Result<u16, String> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("port {number} is not within 1 to 65535")),
    }
}

/// An address in the form of its own family. An IPv4 address dressed as IPv6 is refused: in our tables
/// that form means IPv4, so it would be another address than its text says.
fn address(text: &str) -> Result<IpAddr, String> {
    match text.parse() {
        Ok(IpAddr::V6(v6)) if v6.to_ipv4_mapped().is_some() => {
            Err(format!("{text} is an IPv4-mapped IPv6 address"))
        }
        Ok(ip) => Ok(ip),
        Err(_) => Err(format!("{text:?} is not an IP address")),
    }
}

/// An address that traffic may be sent to on behalf of others. Loopback and link-local mean something
/// else on every node, and so reach what a tenant must not reach (CVE-2021-25737).
fn unicast(text: &str) -> Result<IpAddr, String> {
    let ip = address(text)?;
    let what = match ip {
        _ if ip.is_unspecified() => "the unspecified address",
        _ if ip.is_loopback() => "a loopback address",
        _ if ip.is_multicast() => "a multicast address",
        IpAddr::V4(v4) if v4.is_link_local() => "a link-local address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local address",
        IpAddr::V4(v4) if v4.is_broadcast() => "the broadcast address",
        _ => return Ok(ip),
    };
    Err(format!("{ip} is {what}"))
}

/// A prefix; bits behind its length are cut off, as the API tolerates them.
fn cidr(text: &str) -> Result<IpNet, String> {
    let net: IpNet = text
        .parse()
        .map_err(|_| format!("{text:?} is not a CIDR"))?;
    match net {
        IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some() => {
            Err(format!("{text} is an IPv4-mapped IPv6 prefix"))
        }
        _ => Ok(net.trunc()),
    }
}

impl Family {
    /// The family of an address.
    pub fn of(ip: &IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}
