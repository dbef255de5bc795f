//! What the arguments mean. Every mistake is reported, not just the first.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use thiserror::Error;

use super::args::RunArgs;
use crate::model::ObjectName;
use crate::tell::Tells;

/// Validated settings.
#[derive(Clone, Debug)]
pub struct Settings {
    pub node: Arc<str>,
    pub source: Source,
    pub pod_cidrs: PodCidrs,
    /// Where Services may have external IPs.
    pub external_ip_ranges: Vec<IpNet>,
    pub mtu: u32,
    pub masquerade: bool,
    /// Names of the uplinks; empty to find them.
    pub devices: Vec<String>,
    pub dns: DnsSettings,
    pub bpffs: PathBuf,
    pub cgroup: PathBuf,
    pub run_dir: PathBuf,
    pub state_dir: PathBuf,
    /// Where the container runtime is told of the network, if by us.
    pub cni_conf_dir: Option<PathBuf>,
    /// Where the plugin must be before that.
    pub cni_bin_dir: Option<PathBuf>,
    pub http: SocketAddr,
    /// What the cluster is told.
    pub tells: Tells,
    /// The namespace that agents' pods are in, if the source of objects has them.
    pub agents_in: Option<Arc<str>>,
    /// How often an agent was killed and this one's parent started another.
    pub restarts: u64,
}

#[cfg(test)]
impl Settings {
    /// Of a node in memory: nothing that it names exists.
    pub(crate) fn for_tests(node: &str) -> Self {
        Self {
            node: node.into(),
            source: Source::Manifests {
                folder: "/nowhere".into(),
                service_cidrs: Vec::new(),
            },
            pod_cidrs: PodCidrs::OfNode,
            external_ip_ranges: Vec::new(),
            mtu: 1500,
            masquerade: false,
            devices: Vec::new(),
            dns: DnsSettings {
                addresses: Vec::new(),
                service: ObjectName::new("kube-system", "kube-dns"),
                uid: 0,
                zone_socket: "/nowhere/zone".into(),
                domain: "cluster.local".into(),
            },
            bpffs: "/nowhere".into(),
            cgroup: "/nowhere".into(),
            run_dir: "/nowhere".into(),
            state_dir: "/nowhere".into(),
            cni_conf_dir: None,
            cni_bin_dir: None,
            http: SocketAddr::from(([127, 0, 0, 1], 0)),
            tells: Tells::default(),
            agents_in: None,
            restarts: 0,
        }
    }
}

/// Where the addresses of this node's pods come from.
#[derive(Clone, Debug, PartialEq)]
pub enum PodCidrs {
    /// One range, or one of each family.
    Given(Vec<IpNet>),
    /// `spec.podCIDRs` of this node's Node object.
    OfNode,
}

/// Where objects come from.
#[derive(Clone, Debug)]
pub enum Source {
    Manifests {
        folder: PathBuf,
        service_cidrs: Vec<IpNet>,
    },
    Kube {
        kubeconfig: Option<PathBuf>,
        /// Empty: the one that the credentials name.
        api_servers: Vec<String>,
    },
}

/// Cluster DNS on this node.
#[derive(Clone, Debug)]
pub struct DnsSettings {
    pub addresses: Vec<IpAddr>,
    pub service: ObjectName,
    pub uid: u32,
    pub zone_socket: PathBuf,
    pub domain: String,
}

/// A mistake in the arguments.
#[derive(Debug, Error, PartialEq)]
pub enum ConfigError {
    #[error("--{option}: at most one range of each family, but {first} and {second} are of one")]
    TwoOfOneFamily {
        option: &'static str,
        first: IpNet,
        second: IpNet,
    },
    #[error("--pod-cidr {0}: too small, a node needs at least 4 addresses")]
    TooSmall(IpNet),
    #[error("--dns-service {0}: must be NAMESPACE/NAME")]
    DnsService(String),
    #[error("--manifests and --kubeconfig exclude each other")]
    TwoSources,
    #[error("--manifests {0}: not a folder")]
    NoFolder(PathBuf),
    #[error("--kube-api-server {0}: must be http://HOST:PORT or https://HOST:PORT")]
    ApiServer(String),
    #[error("--dns-address {0}: must not be loopback, multicast or unspecified")]
    DnsAddress(IpAddr),
    #[error("--mtu {0}: must be 0 or from 1280 to 65535")]
    Mtu(u32),
    #[error("--tell-absence: needs --pod-namespace, by which the other agents are known")]
    NoAgents,
    #[error("--tell-events and --tell-absence: with --manifests there is no API server to tell")]
    NobodyToTell,
    #[error("--node-name must not be empty")]
    NodeName,
}

impl TryFrom<&RunArgs> for Settings {
    type Error = Vec<ConfigError>;

    fn try_from(args: &RunArgs) -> Result<Self, Vec<ConfigError>> {
        let mut errors = Vec::new();
        if args.node_name.is_empty() {
            errors.push(ConfigError::NodeName);
        }
        one_of_each_family("pod-cidr", &args.pod_cidrs, &mut errors);
        one_of_each_family("service-cidr", &args.service_cidrs, &mut errors);
        for cidr in &args.pod_cidrs {
            if cidr.max_prefix_len() - cidr.prefix_len() < 2 {
                errors.push(ConfigError::TooSmall(*cidr));
            }
        }
        for address in &args.dns_addresses {
            if address.is_loopback() || address.is_multicast() || address.is_unspecified() {
                errors.push(ConfigError::DnsAddress(*address));
            }
        }
        if args.mtu != 0 && !(1280..=65_535).contains(&args.mtu) {
            errors.push(ConfigError::Mtu(args.mtu));
        }
        let service = match args.dns_service.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                ObjectName::new(namespace, name)
            }
            _ => {
                errors.push(ConfigError::DnsService(args.dns_service.clone()));
                ObjectName::cluster("")
            }
        };
        if args.tell_absence && args.pod_namespace.is_none() {
            errors.push(ConfigError::NoAgents);
        }
        if (args.tell_absence || args.tell_events) && args.manifests.is_some() {
            errors.push(ConfigError::NobodyToTell);
        }
        let source = source(args, &mut errors);
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self {
            node: args.node_name.as_str().into(),
            source,
            pod_cidrs: if args.pod_cidrs.is_empty() {
                PodCidrs::OfNode
            } else {
                PodCidrs::Given(args.pod_cidrs.clone())
            },
            external_ip_ranges: args.external_ip_ranges.clone(),
            mtu: args.mtu,
            masquerade: args.masquerade,
            devices: args.devices.clone(),
            dns: DnsSettings {
                addresses: args.dns_addresses.clone(),
                service,
                uid: args.dns_uid,
                zone_socket: args.zone_socket.clone(),
                domain: args
                    .cluster_domain
                    .trim_end_matches('.')
                    .to_ascii_lowercase(),
            },
            bpffs: args.kernel.bpffs.clone(),
            cgroup: args.kernel.cgroup.clone(),
            run_dir: args.run_dir.clone(),
            state_dir: args.state_dir.clone(),
            cni_conf_dir: args.cni_conf_dir.clone(),
            cni_bin_dir: args.cni_bin_dir.clone(),
            http: args.http,
            tells: Tells {
                events: args.tell_events,
                node_condition: args.tell_absence,
            },
            agents_in: args.pod_namespace.as_deref().map(Into::into),
            restarts: args.kept.restarts,
        })
    }
}

fn source(args: &RunArgs, errors: &mut Vec<ConfigError>) -> Source {
    for url in &args.kube_api_servers {
        if !(url.starts_with("http://") || url.starts_with("https://")) {
            errors.push(ConfigError::ApiServer(url.clone()));
        }
    }
    match (&args.manifests, &args.kubeconfig) {
        (Some(folder), None) => {
            if !folder.is_dir() {
                errors.push(ConfigError::NoFolder(folder.clone()));
            }
            Source::Manifests {
                folder: folder.clone(),
                service_cidrs: args.service_cidrs.clone(),
            }
        }
        (manifests, kubeconfig) => {
            if manifests.is_some() {
                errors.push(ConfigError::TwoSources);
            }
            Source::Kube {
                kubeconfig: kubeconfig.clone(),
                api_servers: args.kube_api_servers.clone(),
            }
        }
    }
}

fn one_of_each_family(option: &'static str, cidrs: &[IpNet], errors: &mut Vec<ConfigError>) {
    for (i, second) in cidrs.iter().enumerate() {
        let is_v4 = second.addr().is_ipv4();
        if let Some(first) = cidrs[..i].iter().find(|c| c.addr().is_ipv4() == is_v4) {
            errors.push(ConfigError::TwoOfOneFamily {
                option,
                first: *first,
                second: *second,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::args::{Args, Command};
    use super::*;

    fn settings(words: &str) -> Result<Settings, Vec<ConfigError>> {
        let words = format!("weir-agent run --node-name n1 {words}");
        match Args::try_parse_from(words.split_whitespace())
            .unwrap()
            .command
        {
            Command::Run(args) => Settings::try_from(&*args),
            _ => unreachable!("the words say run"),
        }
    }

    #[test]
    fn api_servers_are_a_list_in_order() {
        let found = settings(
            "--kube-api-server https://10.0.0.1:6443,https://[fd00::1]:6443 \
             --kube-api-server http://c:1",
        )
        .unwrap();
        let Source::Kube { api_servers, .. } = found.source else {
            panic!("it is an API server");
        };
        let expected = [
            "https://10.0.0.1:6443",
            "https://[fd00::1]:6443",
            "http://c:1",
        ];
        assert_eq!(api_servers, expected);
        let error = settings("--kube-api-server https://a:1,b:2").unwrap_err();
        assert_eq!(error, [ConfigError::ApiServer("b:2".to_owned())]);
    }

    #[test]
    fn every_mistake_is_reported_at_once() {
        let errors = settings(
            "--pod-cidr 10.1.0.0/24 --pod-cidr 10.2.0.0/31 --manifests /nowhere --mtu 9 \
             --dns-service kube-dns --dns-address 127.0.0.1 --tell-absence",
        )
        .unwrap_err();
        assert_eq!(
            errors,
            [
                ConfigError::TwoOfOneFamily {
                    option: "pod-cidr",
                    first: "10.1.0.0/24".parse().unwrap(),
                    second: "10.2.0.0/31".parse().unwrap(),
                },
                ConfigError::TooSmall("10.2.0.0/31".parse().unwrap()),
                ConfigError::DnsAddress("127.0.0.1".parse().unwrap()),
                ConfigError::Mtu(9),
                ConfigError::DnsService("kube-dns".into()),
                ConfigError::NoAgents,
                ConfigError::NobodyToTell,
                ConfigError::NoFolder("/nowhere".into()),
            ]
        );
    }

    #[test]
    fn without_a_range_the_node_object_says_it() {
        let settings = settings("--manifests /").unwrap();
        assert_eq!(settings.pod_cidrs, PodCidrs::OfNode);
    }

    #[test]
    fn external_ips_are_allowed_nowhere_unless_a_range_says_so() {
        let ranges = |words: &str| settings(words).unwrap().external_ip_ranges;
        assert!(ranges("--manifests /").is_empty());
        let some = "--external-ip-range 198.51.100.0/24 --external-ip-range 2001:db8::/64";
        let wanted = ["198.51.100.0/24", "2001:db8::/64"].map(|range| range.parse().unwrap());
        assert_eq!(ranges(&format!("--manifests / {some}")), wanted);
    }

    #[test]
    fn dual_stack_is_one_range_of_each_family() {
        let settings =
            settings("--pod-cidr 10.1.0.0/24 --pod-cidr fd00:1::/64 --manifests /").unwrap();
        let ranges = ["10.1.0.0/24", "fd00:1::/64"].map(|it| it.parse().unwrap());
        assert_eq!(settings.pod_cidrs, PodCidrs::Given(ranges.into()));
        assert_eq!(
            settings.dns.service,
            ObjectName::new("kube-system", "kube-dns")
        );
    }
}
