//! What else is on this node that stands in Weir's way, for `weir doctor`: read from /proc and /sys, without a
//! program's help. What a node must offer is `kernel/features.rs`; rules of netfilter are not listed here.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::network::before_ours;

/// Something to look at. The agent starts beside it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    pub what: &'static str,
    /// What was found, and what to do. docs/install.md ("Beside other software of the node") says more.
    pub text: String,
}

/// Beginnings of names of devices that other network plugins and proxies make, with whose they are.
const DEVICES: [(&str, &str); 10] = [
    ("kube-ipvs0", "kube-proxy"),
    ("cali", "Calico"),
    ("vxlan.calico", "Calico"),
    ("flannel.", "flannel"),
    ("cni0", "flannel or the bridge plugin"),
    ("cilium_", "Cilium"),
    ("lxc_health", "Cilium"),
    ("weave", "Weave Net"),
    ("kube-bridge", "kube-router"),
    ("docker0", "Docker"),
];

/// Where the node's network configurations are, in the agent's container or on the node itself.
const CONFIGURATIONS: [&str; 2] = ["/host/etc/cni/net.d", "/etc/cni/net.d"];
/// Folders that other agents pin in.
const PINS: [(&str, &str); 3] = [
    ("/sys/fs/bpf/cilium", "Cilium"),
    ("/sys/fs/bpf/tc/globals", "Cilium"),
    ("/sys/fs/bpf/calico", "Calico"),
];

const DNS: u16 = 53;
/// Of the agent and of weir-dns, unless they are told others.
const OURS: [u16; 2] = [9660, 9661];
/// kube-proxy's health check.
const KUBE_PROXY: u16 = 10256;
/// What every link that carries IPv6 must take, in bytes (RFC 8200).
const SMALLEST_MTU: u32 = 1280;

/// An agent that runs has this socket.
const ADMIN: &str = "/run/weir/admin.sock";

/// Everything that is worth a look. What cannot be read is not mentioned: it may not be there at all.
pub fn look() -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let listening: Vec<_> = ["tcp", "tcp6", "udp", "udp6"]
        .iter()
        .flat_map(|table| listeners(&read(&format!("/proc/net/{table}"))))
        .collect();
    let of_us = UnixStream::connect(ADMIN).is_ok();
    let devices = names("/sys/class/net");
    let mut found = leftovers(&devices);
    found.extend(pins(|path| Path::new(path).exists()));
    found.extend(ports(&listening, of_us));
    let folders = CONFIGURATIONS.map(Path::new);
    if let Some(folder) = folders.iter().find(|it| it.is_dir()) {
        found.extend(configurations(folder));
    }
    found.extend(ipv6(
        Path::new("/proc/sys/net/ipv6").is_dir(),
        &read("/proc/sys/net/ipv6/conf/all/disable_ipv6"),
        &read("/proc/sys/net/ipv6/conf/lo/disable_ipv6"),
    ));
    found.extend(jit(&read("/proc/sys/net/core/bpf_jit_enable")));
    found.extend(resolver(&read("/etc/resolv.conf")));
    for device in default_devices(&read("/proc/net/route")) {
        let size = read(&format!("/sys/class/net/{device}/mtu"));
        found.extend(mtu(&device, &size));
    }
    found
}

fn leftovers(devices: &[String]) -> Vec<Finding> {
    let mut found: Vec<Finding> = Vec::new();
    for (prefix, whose) in DEVICES {
        let Some(device) = devices.iter().find(|it| it.starts_with(prefix)) else {
            continue;
        };
        found.push(Finding {
            what: "other network software",
            text: match whose {
                "Docker" => format!(
                    "{device} is Docker's, which sets the policy of FORWARD to drop: iptables -P FORWARD ACCEPT"
                ),
                _ => format!("{device} is of {whose}: it must be gone, with its rules and routes"),
            },
        });
    }
    found
}

fn pins(exists: impl Fn(&str) -> bool) -> Option<Finding> {
    let (path, whose) = PINS.iter().find(|(path, _)| exists(path))?;
    Some(Finding {
        what: "other eBPF programs",
        text: format!("{path} is of {whose}: its programs may still be at devices and cgroups"),
    })
}

fn ports(listening: &[(IpAddr, u16)], of_us: bool) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut add = |text: String| {
        found.push(Finding {
            what: "ports",
            text,
        });
    };
    if let Some((address, _)) = listening
        .iter()
        .find(|(address, port)| *port == DNS && address.is_unspecified())
    {
        add(format!(
            "somebody listens at {address} port {DNS}, every address, and weir-dns then cannot have its own: \
             have it listen at addresses of its own (dnsmasq: bind-interfaces)"
        ));
    }
    for port in OURS {
        if !of_us && listening.iter().any(|(_, used)| *used == port) {
            add(format!(
                "somebody listens at port {port}, and no agent runs: free it, or choose others (ports.agent, \
                 ports.dns)"
            ));
        }
    }
    if listening.iter().any(|(_, port)| *port == KUBE_PROXY) {
        add(format!(
            "somebody listens at port {KUBE_PROXY}, kube-proxy most likely: delete its DaemonSet, and \
             kube-proxy --cleanup"
        ));
    }
    found
}

/// Configurations that a runtime reads before ours: it takes the first by name.
fn configurations(folder: &Path) -> Option<Finding> {
    let path = folder.join(before_ours(folder).first()?);
    Some(Finding {
        what: "network configurations",
        text: format!(
            "the runtime reads {} before ours: move it away",
            path.display()
        ),
    })
}

fn ipv6(is_there: bool, all: &str, lo: &str) -> Option<Finding> {
    let is_off = [all, lo].iter().any(|it| it.trim() == "1");
    let why = match (is_there, is_off) {
        (false, _) => "the kernel has no IPv6",
        (true, true) => "IPv6 is switched off (disable_ipv6)",
        (true, false) => return None,
    };
    Some(Finding {
        what: "IPv6",
        text: format!(
            "{why}: this node gets no IPv6 address for cluster DNS, and none for its pods"
        ),
    })
}

fn jit(enabled: &str) -> Option<Finding> {
    (enabled.trim() == "0").then(|| Finding {
        what: "BPF compiler",
        text: "programs are interpreted, many times slower: sysctl -w net.core.bpf_jit_enable=1"
            .into(),
    })
}

fn resolver(text: &str) -> Option<Finding> {
    let servers = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"));
    (servers.count() == 0).then(|| Finding {
        what: "resolv.conf",
        text:
            "/etc/resolv.conf names no server: names outside of the cluster get SERVFAIL, unless \
               dns.upstreams names some"
                .into(),
    })
}

fn mtu(device: &str, size: &str) -> Option<Finding> {
    let size: u32 = size.trim().parse().ok()?;
    (size < SMALLEST_MTU).then(|| Finding {
        what: "MTU",
        text: format!("{device} takes {size} bytes, and IPv6 needs {SMALLEST_MTU}"),
    })
}

/// Devices with a default route of IPv4, of /proc/net/route.
fn default_devices(table: &str) -> Vec<String> {
    let default = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
        is_default.then(|| fields[0].to_owned())
    };
    table.lines().filter_map(default).collect()
}

/// Where somebody listens, of /proc/net/tcp and its kin: TCP that listens, UDP without a peer.
fn listeners(table: &str) -> Vec<(IpAddr, u16)> {
    const TCP_LISTEN: &str = "0A";
    const UDP_UNCONNECTED: &str = "07";
    let listener = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let state = *fields.get(3)?;
        if ![TCP_LISTEN, UDP_UNCONNECTED].contains(&state) {
            return None;
        }
        let (address, port) = fields.get(1)?.split_once(':')?;
        Some((address_of(address)?, u16::from_str_radix(port, 16).ok()?))
    };
    table.lines().skip(1).filter_map(listener).collect()
}

/// Each word of an address is printed as a number of the machine's byte order.
fn address_of(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(hex.get(at..at + 8)?, 16).ok();
    match hex.len() {
        8 => Some(IpAddr::from(word(0)?.to_ne_bytes())),
        32 => {
            let mut bytes = [0; 16];
            for (number, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(number * 8)?.to_ne_bytes());
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:2810 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 0100007F:25BC 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2
   2: 0100007F:25BC 0100007F:9000 01 00000000:00000000 00:00000000 00000000     0        0 3
";
    const UDP6: &str = "\
  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:0035 00000000000000000000000000000000:0000 07 00000000:00000000
   1: 695657FD000000720000000053000000:0035 00000000000000000000000000000000:0000 07 00000000:00000000
";

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|it| (*it).to_owned()).collect()
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn tables_of_sockets_are_read() {
        let expected = [("0.0.0.0", 10256), ("127.0.0.1", 9660)];
        let parsed = |(address, port): (&str, u16)| (address.parse().unwrap(), port);
        assert_eq!(listeners(TCP), expected.map(parsed));
        let expected = [("::", 53), ("fd57:5669:7200::53", 53)];
        assert_eq!(listeners(UDP6), expected.map(parsed));
        assert_eq!(listeners("cut\n 0: 00"), []);
    }

    #[test]
    fn who_has_a_port_of_ours_is_found_and_we_are_not() {
        let at = |address: &str, port| (address.parse::<IpAddr>().unwrap(), port);
        let cases = [
            (vec![], false, 0),
            (vec![at("0.0.0.0", 53)], false, 1),
            (vec![at("::", 53), at("0.0.0.0", 53)], true, 1),
            (
                vec![at("127.0.0.53", 53), at("169.254.53.53", 53)],
                false,
                0,
            ),
            (vec![at("127.0.0.1", 9660)], true, 0),
            (vec![at("127.0.0.1", 9660), at("127.0.0.1", 9661)], false, 2),
            (vec![at("::", 10256)], true, 1),
        ];
        for (listening, of_us, expected) in cases {
            assert_eq!(ports(&listening, of_us).len(), expected, "{listening:?}");
        }
    }

    #[test]
    fn what_others_left_is_found() {
        let devices = [
            "eth0",
            "lo",
            "weir0123456789",
            "cali12345",
            "docker0",
            "flannel.1",
        ];
        let found = leftovers(&words(&devices));
        let said: Vec<_> = found.iter().map(|it| it.text.as_str()).collect();
        assert_eq!(said.len(), 3, "{said:?}");
        for whose in ["Calico", "flannel", "Docker"] {
            assert!(said.iter().any(|it| it.contains(whose)), "{said:?}");
        }
        assert_eq!(leftovers(&words(&["eth0", "lo", "weir0123456789"])), []);
        assert!(pins(|path| path == "/sys/fs/bpf/cilium").is_some());
        assert_eq!(pins(|_| false), None);
    }

    #[test]
    fn only_a_configuration_that_is_read_before_ours_is_in_the_way() {
        let cases: [(&[&str], bool); 5] = [
            (&["05-weir.conflist"], false),
            (&["05-weir.conflist", "10-calico.conflist"], false),
            (&["00-multus.conf", "05-weir.conflist"], true),
            (&["00-multus.conf.bak", "01-kubeconfig"], false),
            (&["05-cilium.conflist"], true),
        ];
        for (names, expected) in cases {
            let folder = tempfile::tempdir().unwrap();
            for name in names {
                fs::write(folder.path().join(name), "").unwrap();
            }
            let found = configurations(folder.path());
            assert_eq!(found.is_some(), expected, "{names:?}");
        }
    }

    #[test]
    fn settings_of_the_node_are_judged() {
        assert_eq!(ipv6(true, "0\n", "0\n"), None);
        assert!(ipv6(true, "0\n", "1\n").is_some());
        assert!(ipv6(true, "1\n", "1\n").is_some());
        assert!(ipv6(false, "", "").is_some());
        assert_eq!(jit("1\n"), None);
        assert_eq!(jit(""), None, "it cannot be read");
        assert!(jit("0\n").is_some());
        assert_eq!(resolver("search a\nnameserver 192.0.2.1\n"), None);
        assert!(resolver("# nameserver 192.0.2.1\n").is_some());
        let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
                      eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                      eth1\t0002A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert_eq!(default_devices(routes), ["eth0"]);
        assert_eq!(mtu("eth0", "1500\n"), None);
        assert!(mtu("eth0", "1200\n").is_some());
    }
}
