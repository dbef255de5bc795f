//! What `weir policy explain` is asked, read from what was typed. Who is meant in a cluster is the agent's to find out.

use std::fmt;
use std::net::IpAddr;

/// From whom.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Source {
    Pod { namespace: String, name: String },
    Address(IpAddr),
}

/// To whom.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Target {
    Pod { namespace: String, name: String },
    Service { namespace: String, name: String },
    Address(IpAddr),
}

/// To which port. ICMP has none.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum AskedPort {
    /// Host order, not 0.
    Number(u16),
    /// What the destination calls so.
    Name(String),
    None,
}

/// Of which protocol.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AskedProtocol {
    Tcp,
    Udp,
    Sctp,
    /// That of the addresses' family.
    Icmp,
}

/// May one send this to the other?
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Question {
    pub from: Source,
    pub to: Target,
    pub port: AskedPort,
    pub protocol: AskedProtocol,
}

impl Question {
    /// Reads `NAMESPACE/POD` or an address, and `NAMESPACE/POD:PORT[/PROTOCOL]`, `service/NAMESPACE/NAME:PORT[/PROTOCOL]`,
    /// `ADDRESS:PORT[/PROTOCOL]` or `[ADDRESS]:PORT[/PROTOCOL]`.
    ///
    /// # Errors
    /// What is wrong with it, and what to write instead.
    pub fn read(from: &str, to: &str) -> Result<Self, String> {
        let source = match party(from)? {
            Target::Pod { namespace, name } => Source::Pod { namespace, name },
            Target::Address(address) => Source::Address(address),
            Target::Service { .. } => {
                return Err(format!(
                    "{from}: a Service sends nothing; name one of its pods"
                ));
            }
        };
        let (rest, protocol) = protocol(to)?;
        if protocol == AskedProtocol::Icmp {
            return Ok(Self {
                from: source,
                to: party(rest)?,
                port: AskedPort::None,
                protocol,
            });
        }
        let no_port = || format!("{to}: it has no port; write it as {rest}:80");
        let (whom, port) = match rest.rsplit_once(':') {
            Some((whom, _)) if whom.contains(':') && !whom.starts_with('[') => {
                return Err(format!("{to}: write an IPv6 address as [ADDRESS]:PORT"));
            }
            Some((whom, port)) if !port.contains(']') => (whom, port),
            _ => return Err(no_port()),
        };
        let port = match port.parse::<u16>() {
            Ok(0) => return Err(format!("{to}: there is no port 0")),
            Ok(number) => AskedPort::Number(number),
            Err(_) if port.is_empty() => return Err(no_port()),
            Err(_) if port.bytes().all(|c| c.is_ascii_digit()) => {
                return Err(format!("{to}: port {port} is not within 1 to 65535"));
            }
            Err(_) => AskedPort::Name(port.to_owned()),
        };
        Ok(Self {
            from: source,
            to: party(whom)?,
            port,
            protocol,
        })
    }
}

/// The protocol behind the last `/`, where there is one.
fn protocol(text: &str) -> Result<(&str, AskedProtocol), String> {
    let Some((rest, last)) = text.rsplit_once('/') else {
        return Ok((text, AskedProtocol::Tcp));
    };
    match last.to_ascii_lowercase().as_str() {
        "tcp" => Ok((rest, AskedProtocol::Tcp)),
        "udp" => Ok((rest, AskedProtocol::Udp)),
        "sctp" => Ok((rest, AskedProtocol::Sctp)),
        "icmp" => Ok((rest, AskedProtocol::Icmp)),
        _ if rest.contains(':') && !rest.ends_with(':') && !last.contains(':') => Err(format!(
            "{text}: protocol {last:?} is not tcp, udp, sctp or icmp"
        )),
        _ => Ok((text, AskedProtocol::Tcp)),
    }
}

fn party(text: &str) -> Result<Target, String> {
    let inner = text.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    if let Ok(address) = inner.unwrap_or(text).parse() {
        return match address {
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
                Err(format!("{text}: write the IPv4 address as one"))
            }
            address => Ok(Target::Address(address)),
        };
    }
    let parts: Vec<&str> = text.split('/').collect();
    if parts.iter().any(|part| part.is_empty()) {
        return Err(format!("{text:?} is neither NAMESPACE/POD nor an address"));
    }
    match parts[..] {
        ["pod" | "pods" | "po", namespace, name] | [namespace, name] => Ok(Target::Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }),
        ["service" | "services" | "svc", namespace, name] => Ok(Target::Service {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }),
        [kind, namespace, _] => Err(format!(
            "{text}: policy knows pods, not what made them; name a pod of this {kind} \
             (`kubectl -n {namespace} get pods`)"
        )),
        ["outside" | "world" | "internet"] => Err(format!(
            "{text}: policy goes by address; name one that is meant, such as 203.0.113.9"
        )),
        [name] if name.contains('.') => Err(format!(
            "{text}: policy goes by address and not by name; ask with an address that the name has \
             (`getent ahosts {name}`)"
        )),
        _ => Err(format!(
            "{text}: write NAMESPACE/POD, service/NAMESPACE/NAME or an address"
        )),
    }
}

impl fmt::Display for AskedProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
            Self::Icmp => "ICMP",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(namespace: &str, name: &str) -> Target {
        Target::Pod {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    #[test]
    fn targets_are_read_as_people_write_them() {
        use AskedPort::{Name, None, Number};
        use AskedProtocol::{Icmp, Sctp, Tcp, Udp};
        let address = |text: &str| Target::Address(text.parse().unwrap());
        let service = Target::Service {
            namespace: "shop".into(),
            name: "web".into(),
        };
        for (text, to, port, protocol) in [
            ("shop/db:5432", pod("shop", "db"), Number(5432), Tcp),
            ("pod/shop/db:53/UDP", pod("shop", "db"), Number(53), Udp),
            ("shop/db:sql", pod("shop", "db"), Name("sql".into()), Tcp),
            ("svc/shop/web:80", service, Number(80), Tcp),
            ("10.0.0.1:80", address("10.0.0.1"), Number(80), Tcp),
            ("[::1]:80/sctp", address("::1"), Number(80), Sctp),
            ("[::1]/icmp", address("::1"), None, Icmp),
            ("shop/db/icmp", pod("shop", "db"), None, Icmp),
        ] {
            let read = Question::read("a/b", text).unwrap();
            assert_eq!(
                (read.to, read.port, read.protocol),
                (to, port, protocol),
                "{text}"
            );
        }
        let from = Question::read("fd00::1", "a/b:1").unwrap().from;
        assert_eq!(from, Source::Address("fd00::1".parse().unwrap()));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_what_to_write_instead() {
        for (from, to, hint) in [
            ("outside", "a/b:80", "203.0.113.9"),
            ("a/b", "example.org:443", "getent ahosts example.org"),
            ("a/b", "deployment/shop/web:80", "kubectl -n shop get pods"),
            ("a/b", "a/b", "no port"),
            ("a/b", "a/b:", "no port"),
            ("a/b", "a/b:0", "no port 0"),
            ("a/b", "a/b:65536", "1 to 65535"),
            ("a/b", "::1:80", "[ADDRESS]:PORT"),
            ("a/b", "[::1]", "no port"),
            ("a/b", "a/b:80/icmq", "tcp, udp, sctp or icmp"),
            ("svc/a/b", "a/b:80", "a Service sends nothing"),
            ("/b", "a/b:80", "neither"),
            ("::ffff:10.0.0.1", "a/b:80", "IPv4"),
            ("web", "a/b:80", "NAMESPACE/POD"),
        ] {
            let said = Question::read(from, to).unwrap_err();
            assert!(said.contains(hint), "{from} {to}: {said}");
        }
    }
}
