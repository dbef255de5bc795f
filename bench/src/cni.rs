//! Row 14: how long a container runtime waits for `weir-cni`, beside the bridge plugin that it replaces.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use weir_tests::netns::Netns;
use weir_tests::node::{Node, NodeOptions, Pod, binary};
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
    let ours = binary("weir-cni");
    let config = node.cni_config("1.1.0");
    let run =
        |verb: &str, pod: &Pod| timed(node.machine().netns(), &ours, verb, &pod.cni_env(), &config);
    for n in 0..pods {
        let pod = node.declare_pod(Workload::named("bench", &format!("p{n}")))?;
        let namespace = Netns::new("peer")?;
        // The agent must know the pod, as it would long before a kubelet gets here.
        node.wait_for_pod(&pod.workload.id(), Duration::from_secs(5))?;
        add.push(run("ADD", &pod)?);
        peer_add.push(peer.run("ADD", &namespace)?);
        del.push(run("DEL", &pod)?);
        peer_del.push(peer.run("DEL", &namespace)?);
        // Once more, to take its object away, too.
        node.delete_pod(pod)?;
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

    fn run(&self, verb: &str, pod: &Netns) -> Result<u64> {
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
        let env = BTreeMap::from([
            ("CNI_CONTAINERID", pod.name().to_owned()),
            ("CNI_NETNS", pod.path().display().to_string()),
            ("CNI_IFNAME", "eth0".to_owned()),
        ]);
        let program = Path::new(PLUGINS).join("bridge");
        timed(&self.node, &program, verb, &env, &config)
    }
}

/// Nanoseconds from the start of a plugin to its end, started as a runtime does it: directly, in the node's
/// namespace.
fn timed(
    node: &Netns,
    program: &Path,
    verb: &str,
    env: &BTreeMap<&'static str, String>,
    config: &Value,
) -> Result<u64> {
    let config = config.to_string();
    node.run(|| {
        let start = Instant::now();
        let mut child = Command::new(program)
            .env("CNI_COMMAND", verb)
            .env("CNI_PATH", PLUGINS)
            .envs(env)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let mut stdin = child.stdin.take().context("a plugin has a stdin")?;
        stdin.write_all(config.as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        let took = start.elapsed();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stdout);
            bail!("{} {verb}: {said}", program.display());
        }
        Ok(took.as_nanos() as u64)
    })?
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
        note: "each started directly by the bench, in the node's namespace".to_owned(),
    })
}
