//! Row 14: how long a container runtime waits for `weir-cni`, beside the bridge plugin that it replaces.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use weir_tests::netns::Netns;
use weir_tests::node::{Node, NodeOptions};
use weir_tests::workloads::Workload;

use crate::report::{Row, Target};
use crate::rounds::Ratio;

/// Where Debian's containernetworking-plugins puts the peer.
const PLUGINS: &str = "/usr/lib/cni";

/// ADDs one after the other, ours and the peer's in turn; then DELs.
pub(crate) fn add_and_del(pods: usize) -> Result<Vec<Row>> {
    let node = Node::start(NodeOptions::named("cni"))?;
    let peer = Peer::make()?;
    let (mut add, mut del) = (Vec::new(), Vec::new());
    let (mut peer_add, mut peer_del) = (Vec::new(), Vec::new());
    for n in 0..pods {
        let mut pod = node.declare_pod(Workload::named("bench", &format!("p{n}")))?;
        let namespace = Netns::new("peer")?;
        // The agent must know the pod, as it would long before a kubelet gets here.
        node.wait_for_pod(&pod.workload.id(), Duration::from_secs(5))?;
        add.push(timed(|| node.add_pod(&mut pod).map(drop))?);
        peer_add.push(timed(|| peer.run("ADD", &namespace))?);
        del.push(timed(|| node.delete_pod(pod))?);
        peer_del.push(timed(|| peer.run("DEL", &namespace))?);
    }
    Ok(vec![
        row(
            "CNI ADD",
            add,
            peer_add,
            Target::Nanos {
                p50: 3_000_000,
                p99: 8_000_000,
            },
        )?,
        row(
            "CNI DEL",
            del,
            peer_del,
            Target::Nanos {
                p50: 3_000_000,
                p99: 3_000_000,
            },
        )?,
    ])
}

/// The bridge plugin with host-local addresses, in a namespace of its own.
struct Peer {
    node: Netns,
    dir: tempfile::TempDir,
}

impl Peer {
    fn make() -> Result<Self> {
        if !Path::new(PLUGINS).join("bridge").exists() {
            bail!("{PLUGINS}/bridge is missing: install containernetworking-plugins");
        }
        Ok(Self {
            node: Netns::new("bridge")?,
            dir: tempfile::tempdir()?,
        })
    }

    fn run(&self, verb: &str, pod: &Netns) -> Result<()> {
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "bench",
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "dataDir": self.dir.path(),
                "ranges": [[{"subnet": "10.201.0.0/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        });
        let mut command: Command = self.node.command(format!("{PLUGINS}/bridge"));
        let mut child = command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", pod.name())
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        child
            .stdin
            .take()
            .context("stdin")?
            .write_all(config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("bridge {verb}: {}", String::from_utf8_lossy(&output.stdout));
        }
        Ok(())
    }
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_nanos() as u64)
}

fn row(what: &str, ours: Vec<u64>, peer: Vec<u64>, target: Target) -> Result<Row> {
    let sorted = |mut values: Vec<u64>| {
        values.sort_unstable();
        values
    };
    let pairs: Vec<f64> = {
        let mut ratios: Vec<f64> = ours
            .iter()
            .zip(&peer)
            .map(|(a, b)| *a as f64 / *b as f64)
            .collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    };
    let (ours, peer) = (sorted(ours), sorted(peer));
    let count = ours.len();
    if count < 100 {
        bail!("{count} are too few for percentiles");
    }
    let at = |values: &[u64], percent: usize| values[values.len() * percent / 100];
    let of_p01 = at(&ours, 1) as f64 / at(&peer, 1) as f64;
    Ok(Row {
        number: 14,
        claim: format!("{what}, {count} one after the other, from start to exit of the plugin"),
        peer: "bridge".to_owned(),
        ours_p01_ns: at(&ours, 1),
        peer_p01_ns: at(&peer, 1),
        ours_p50_ns: at(&ours, 50),
        peer_p50_ns: at(&peer, 50),
        ours_p99_ns: at(&ours, 99),
        peer_p99_ns: at(&peer, 99),
        ratio_p01: Ratio {
            min: of_p01,
            median: of_p01,
            max: of_p01,
        },
        ratio_p50: Ratio {
            min: pairs[0],
            median: pairs[count / 2],
            max: pairs[count - 1],
        },
        control_p01: None,
        target,
        note: "starting the command from outside is part of both".to_owned(),
    })
}
