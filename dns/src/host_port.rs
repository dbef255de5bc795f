//! An address and a port in one word, as it is written where nobody can know the family beforehand. Both
//! `weir-dns` and the agent take it from their arguments; what is listened on is not decided here.

use std::net::{IpAddr, SocketAddr};

/// An address and a port, with the last colon between them. An IPv6 address may lack its brackets: Kubernetes
/// replaces `$(HOST_IP):9660` by a node's address when the container starts, and does not put any.
///
/// # Errors
/// It is no address with a port; the error says what was looked for.
pub fn host_port(word: &str) -> Result<SocketAddr, String> {
    let wanted =
        || format!("{word}: not ADDRESS:PORT, as 192.0.2.1:9660, [fd00::1]:9660 or fd00::1:9660");
    let (host, port) = word.rsplit_once(':').ok_or_else(wanted)?;
    let inside = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    let address: IpAddr = match inside {
        Some(inside) => IpAddr::V6(inside.parse().map_err(|_| wanted())?),
        None => host.parse().map_err(|_| wanted())?,
    };
    // Rust's numbers may begin with a plus.
    let is_number = port.bytes().all(|digit| digit.is_ascii_digit());
    let port = port.parse().ok().filter(|_| is_number).ok_or_else(wanted)?;
    Ok(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_colon_separates_the_port() {
        let cases = [
            ("192.0.2.1:9660", "192.0.2.1:9660"),
            ("0.0.0.0:0", "0.0.0.0:0"),
            ("[fd00::1]:9660", "[fd00::1]:9660"),
            ("fd00::1:9660", "[fd00::1]:9660"),
            (":::9660", "[::]:9660"),
            ("::1:80", "[::1]:80"),
            ("fd00:1:2:3:4:5:6:7:9660", "[fd00:1:2:3:4:5:6:7]:9660"),
            ("::ffff:192.0.2.1:9660", "[::ffff:192.0.2.1]:9660"),
        ];
        for (word, expected) in cases {
            assert_eq!(host_port(word), Ok(expected.parse().unwrap()), "{word}");
        }
    }

    #[test]
    fn what_is_no_address_with_a_port_is_refused() {
        let words = [
            "",
            ":",
            ":9660",
            "9660",
            "192.0.2.1",
            "192.0.2.1:",
            "192.0.2.1:+80",
            "192.0.2.1:65536",
            "[192.0.2.1]:80",
            "[fd00::1]",
            "[fd00::1:9660",
            "fd00::1]:9660",
            "fd00:1:2:3:4:5:6:7",
            "fd00::1:abcd",
            "node:9660",
            "$(HOST_IP):9660",
        ];
        for word in words {
            assert!(host_port(word).is_err(), "{word}");
        }
    }
}
