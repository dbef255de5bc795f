//! Labels and places: what a question's name means in the zone, and how addresses are spelled in
//! names. Nothing here knows which services exist.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::rr::Name;

/// A label in lower case, on the stack.
#[derive(Clone, Copy)]
pub struct Label {
    bytes: [u8; 63],
    len: usize,
}

impl Label {
    /// `None` for a label that no object can have: too long or not ASCII.
    pub fn new(label: &[u8]) -> Option<Self> {
        let mut bytes = [0; 63];
        let target = bytes.get_mut(..label.len())?;
        if !label.is_ascii() {
            return None;
        }
        target.copy_from_slice(label);
        target.make_ascii_lowercase();
        Some(Self {
            bytes,
            len: label.len(),
        })
    }

    /// The label as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}

/// Where in the zone a name lies, by its form alone.
pub enum Place {
    /// The zone's own name.
    Apex,
    /// `dns-version`.
    Version,
    /// `svc`, `pod` and `dns`: nothing is there, and names are below.
    Branch,
    /// `ns.dns`, the name that the NS record gives.
    NameServer,
    /// `<ns>.svc` or `<ns>.pod`.
    Namespace(Label),
    Service {
        namespace: Label,
        service: Label,
    },
    /// `<x>.<svc>.<ns>.svc`: the name of an endpoint, or `_tcp` above the named ports.
    BelowService {
        namespace: Label,
        service: Label,
        label: Label,
    },
    /// `_<port>._<proto>.<svc>.<ns>.svc`.
    Port {
        namespace: Label,
        service: Label,
        protocol: Label,
        port: Label,
    },
    /// `<address>.<ns>.pod`.
    Pod {
        namespace: Label,
        address: Label,
    },
    /// No object can have this name.
    Nowhere,
}

impl std::str::FromStr for Domain {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Self, DomainError> {
        Self::new(text)
    }
}

/// The cluster domain.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Domain {
    name: Name,
}

/// A cluster domain that cannot be one.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    #[error("the cluster domain {0:?} is not a domain name")]
    Invalid(String),
    #[error("the cluster domain cannot be the root")]
    Root,
}

impl Domain {
    /// Reads a domain such as `cluster.local`, with or without the last dot.
    pub fn new(text: &str) -> Result<Self, DomainError> {
        let mut name = Name::from_ascii(text).map_err(|_| DomainError::Invalid(text.to_owned()))?;
        if name.is_root() || name.num_labels() == 0 {
            return Err(DomainError::Root);
        }
        name.set_fqdn(true);
        Ok(Self {
            name: name.to_lowercase(),
        })
    }

    /// As a DNS name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Does the name lie in the zone, its apex included?
    pub fn contains(&self, name: &Name) -> bool {
        self.name.zone_of(name)
    }

    /// Where the name lies; `None` if it is not in the zone.
    pub fn place(&self, name: &Name) -> Option<Place> {
        if !self.contains(name) {
            return None;
        }
        let depth = name.iter().count() - self.name.iter().count();
        // The longest form has five labels; whatever is longer is nowhere.
        if depth > 5 {
            return Some(Place::Nowhere);
        }
        let mut labels = [None; 5];
        for (slot, label) in labels.iter_mut().zip(name.iter().take(depth)) {
            let Some(label) = Label::new(label) else {
                return Some(Place::Nowhere);
            };
            *slot = Some(label);
        }
        // From the zone downwards: index 0 is the label next to the apex.
        labels[..depth].reverse();
        Some(Self::form(labels))
    }

    fn form(labels: [Option<Label>; 5]) -> Place {
        let Some(first) = &labels[0] else {
            return Place::Apex;
        };
        match (first.as_str(), labels[1], labels[2], labels[3], labels[4]) {
            ("dns-version", None, ..) => Place::Version,
            ("svc" | "pod" | "dns", None, ..) => Place::Branch,
            ("dns", Some(host), None, ..) if host.as_str() == "ns" => Place::NameServer,
            ("svc" | "pod", Some(namespace), None, ..) => Place::Namespace(namespace),
            ("pod", Some(namespace), Some(address), None, _) => Place::Pod { namespace, address },
            ("svc", Some(namespace), Some(service), None, _) => {
                Place::Service { namespace, service }
            }
            ("svc", Some(namespace), Some(service), Some(label), None) => Place::BelowService {
                namespace,
                service,
                label,
            },
            ("svc", Some(namespace), Some(service), Some(protocol), Some(port)) => Place::Port {
                namespace,
                service,
                protocol,
                port,
            },
            _ => Place::Nowhere,
        }
    }
}

/// An address as one label: `10-0-0-1`, `fd00--1`. An end that would be a dash gets a zero, since a
/// label may neither begin nor end with one.
pub fn address_label(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string().replace('.', "-"),
        IpAddr::V6(v6) => {
            let mut label = v6.to_string().replace([':', '.'], "-");
            if label.ends_with('-') {
                label.push('0');
            }
            if label.starts_with('-') {
                label.insert(0, '0');
            }
            label
        }
    }
}

/// The address that a label spells, if it does.
pub fn label_address(label: &str) -> Option<IpAddr> {
    if !label.contains('-') {
        return None;
    }
    if let Ok(v4) = label.replace('-', ".").parse::<Ipv4Addr>() {
        return Some(v4.into());
    }
    let v6 = label.replace('-', ":").parse::<Ipv6Addr>().ok()?;
    Some(v6.into())
}

/// The address of a full reverse name (RFC 1035 3.5, RFC 3596 2.5).
pub fn reverse_address(name: &Name) -> Option<IpAddr> {
    let labels: Vec<&[u8]> = name.iter().collect();
    let (tail, digits) = split_arpa(&labels)?;
    match tail {
        Arpa::V4 => {
            let mut octets = [0u8; 4];
            if digits.len() != octets.len() {
                return None;
            }
            for (octet, label) in octets.iter_mut().zip(digits.iter().rev()) {
                let text = std::str::from_utf8(label).ok()?;
                if text.len() > 1 && text.starts_with('0') || text.starts_with('+') {
                    return None;
                }
                *octet = text.parse().ok()?;
            }
            Some(Ipv4Addr::from(octets).into())
        }
        Arpa::V6 => {
            if digits.len() != 32 {
                return None;
            }
            let mut bits = 0u128;
            for label in digits.iter().rev() {
                let [digit] = label else { return None };
                bits = bits << 4 | u128::from(char::from(*digit).to_digit(16)?);
            }
            Some(Ipv6Addr::from(bits).into())
        }
    }
}

/// Is the name below one of the trees of reverse names?
pub fn is_reverse(name: &Name) -> bool {
    let labels: Vec<&[u8]> = name.iter().collect();
    split_arpa(&labels).is_some()
}

enum Arpa {
    V4,
    V6,
}

fn split_arpa<'a, 'b>(labels: &'a [&'b [u8]]) -> Option<(Arpa, &'a [&'b [u8]])> {
    let [digits @ .., tree, arpa] = labels else {
        return None;
    };
    if !arpa.eq_ignore_ascii_case(b"arpa") {
        return None;
    }
    if tree.eq_ignore_ascii_case(b"in-addr") {
        Some((Arpa::V4, digits))
    } else if tree.eq_ignore_ascii_case(b"ip6") {
        Some((Arpa::V6, digits))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_survives_its_label() {
        for (address, label) in [
            ("10.0.0.1", "10-0-0-1"),
            ("fd00::1", "fd00--1"),
            ("fd00::", "fd00--0"),
            ("::1", "0--1"),
            ("2001:db8:1:2:3:4:5:6", "2001-db8-1-2-3-4-5-6"),
        ] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(address_label(address), label);
            assert_eq!(label_address(label), Some(address), "{label}");
        }
    }

    #[test]
    fn what_does_not_spell_an_address_is_none() {
        for label in [
            "web-0",
            "1-2-3",
            "256-1-1-1",
            "1-2-3-4-5",
            "",
            "-",
            "a",
            "01-2-3-4",
        ] {
            assert_eq!(label_address(label), None, "{label}");
        }
    }

    #[test]
    fn reverse_names_are_read_backwards() {
        for (name, expected) in [
            ("1.0.96.10.in-addr.arpa.", Some("10.96.0.1")),
            ("1.0.96.10.IN-ADDR.ARPA.", Some("10.96.0.1")),
            ("96.10.in-addr.arpa.", None),
            ("01.0.96.10.in-addr.arpa.", None),
            ("1.1.0.96.10.in-addr.arpa.", None),
            ("x.0.96.10.in-addr.arpa.", None),
            (
                "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.D.f.ip6.arpa.",
                Some("fd00::1"),
            ),
            ("1.d.f.ip6.arpa.", None),
            ("in-addr.arpa.", None),
            ("1.0.96.10.example.", None),
        ] {
            let expected = expected.map(|text| text.parse::<IpAddr>().unwrap());
            let name = Name::from_ascii(name).unwrap();
            assert_eq!(reverse_address(&name), expected, "{name}");
        }
    }
}
