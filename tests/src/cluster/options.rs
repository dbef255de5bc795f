//! What a cluster is asked to be: how many nodes, and who does networking, Services and DNS on them.

use std::path::{Path, PathBuf};

use clap::{Parser as _, ValueEnum};
use serde::{Deserialize, Serialize};

/// Whose pod network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Cni {
    Weir,
    /// Bridge, host-local and portmap of the CNI project, and a static route to each other node.
    Bridge,
    /// Nodes stay NotReady until somebody installs one.
    None,
}

/// Who makes Services work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Proxy {
    Weir,
    /// kube-proxy in nftables mode.
    Nftables,
    /// kube-proxy in iptables mode.
    Iptables,
    None,
}

/// Who answers at the address of cluster DNS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Dns {
    Weir,
    Coredns,
    None,
}

/// The addresses of pods, Services and nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Family {
    Ipv4,
    /// IPv4 first, and IPv6.
    Dual,
}

/// A cluster to be. It is also in the record on disk, for the commands that come after `up`.
#[derive(Debug, Clone, clap::Args, Serialize, Deserialize)]
pub struct Options {
    /// Clusters of different names live side by side; at most six letters and digits.
    #[arg(long, default_value = "main", value_parser = name)]
    pub name: String,
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=40))]
    pub nodes: u8,
    #[arg(long, value_enum, default_value = "weir")]
    pub cni: Cni,
    #[arg(long, value_enum, default_value = "weir")]
    pub proxy: Proxy,
    #[arg(long, value_enum, default_value = "weir")]
    pub dns: Dns,
    #[arg(long, value_enum, default_value = "ipv4")]
    pub family: Family,
    /// Weir's image, as `cargo xtask image` writes it.
    #[arg(long, env = "WEIR_IMAGE", default_value_os_t = image())]
    pub image: PathBuf,
    /// What installs Weir.
    #[arg(long, default_value = "deploy/weir.yaml")]
    pub manifest: PathBuf,
}

impl Options {
    /// Those of a test's own cluster: as without words. Paths, also that of `WEIR_IMAGE`, are from the root of the
    /// repository.
    #[must_use]
    pub fn of_test(name: &str) -> Self {
        #[derive(clap::Parser)]
        struct Words {
            #[command(flatten)]
            options: Options,
        }
        let Words { options } = Words::parse_from(["cluster", "--name", name]);
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        Self {
            image: root.join(&options.image),
            manifest: root.join(&options.manifest),
            ..options
        }
    }

    /// Weir does at least one of the three.
    #[must_use]
    pub fn has_weir(&self) -> bool {
        self.cni == Cni::Weir || self.proxy == Proxy::Weir || self.dns == Dns::Weir
    }

    /// Weir is asked for, and the image that `cargo xtask image` makes is not there yet.
    #[must_use]
    pub fn lacks_image(&self) -> bool {
        self.has_weir() && self.image == image() && !self.image.exists()
    }

    /// What the peers do, all three: what Weir is compared with.
    #[must_use]
    pub fn with_peers(self) -> Self {
        Self {
            cni: Cni::Bridge,
            proxy: Proxy::Nftables,
            dns: Dns::Coredns,
            ..self
        }
    }
}

/// For the machine's own architecture.
fn image() -> PathBuf {
    format!("target/image/weir-{}.tar", std::env::consts::ARCH).into()
}

/// It becomes part of device names, which have 15 bytes, and of paths of sockets.
fn name(text: &str) -> Result<String, String> {
    let is_fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if text.is_empty() || text.len() > 6 || !text.chars().all(is_fine) {
        return Err("one to six lower case letters and digits".to_owned());
    }
    Ok(text.to_owned())
}
