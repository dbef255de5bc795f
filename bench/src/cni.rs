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

/// Pods that start together, as after a node's reboot or a rollout.
const AT_ONCE: usize = 30;

/// ADDs one after the other, ours and the peer's in turn; then DELs; then many at once.
pub(crate) fn add_and_del(pods: usize) -> Result<Vec<Row>> {
    let node = Node::start(NodeOptions::named("cni"))?;
    let peer = Peer::make()?;
    // Some pod runs on a node at any time: what the first one sets up for all is there.
    let (resident, peers_resident) = (
        node.run_pod(Workload::named("bench", "resident"))?,
        Netns::new("peer")?,
    );
    peer.run("ADD", &peers_resident)?;
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
    let (add_at_once, peer_add_at_once) = at_once(&node, &peer, pods.div_ceil(AT_ONCE).max(4))?;
    node.delete_pod(resident)?;
    peer.run("DEL", &peers_resident)?;
    let one_by_one = |verb: &str| {
        let count = add.len();
        format!("CNI {verb}, {count} one after the other, from start to exit of the plugin")
    };
    Ok(vec![
        row(
            one_by_one("ADD"),
            add.clone(),
            peer_add,
            Target::Nanos {
                p50: 2_500_000,
                p99: 6_000_000,
            },
        )?,
        row(
            one_by_one("DEL"),
            del,
            peer_del,
            Target::Nanos {
                p50: 3_000_000,
                p99: 3_000_000,
            },
        )?,
        row(
            format!(
                "CNI ADD, {AT_ONCE} at once, {} in all, from start to exit of the plugin",
                add_at_once.len()
            ),
            add_at_once,
            peer_add_at_once,
            Target::Nanos {
                p50: 40_000_000,
                p99: 40_000_000,
            },
        )?,
    ])
}

/// Rounds of [`AT_ONCE`] ADDs that start together, ours and then the peer's; each is taken back before the next.
fn at_once(node: &Node, peer: &Peer, rounds: usize) -> Result<(Vec<u64>, Vec<u64>)> {
    let ours = binary("weir-cni");
    let config = node.cni_config("1.1.0");
    let netns = node.machine().netns();
    let (mut add, mut peer_add) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let pods = (0..AT_ONCE)
            .map(|n| node.declare_pod(Workload::named("bench", &format!("r{round}-{n}"))))
            .collect::<Result<Vec<_>>>()?;
        let namespaces = (0..AT_ONCE)
            .map(|_| Netns::new("peer"))
            .collect::<Result<Vec<_>>>()?;
        for pod in &pods {
            node.wait_for_pod(&pod.workload.id(), Duration::from_secs(5))?;
        }
        let ours_of = |verb: &'static str| {
            together(&pods, |pod| {
                timed(netns, &ours, verb, &pod.cni_env(), &config)
            })
        };
        let peers_of = |verb: &'static str| together(&namespaces, |it| peer.run(verb, it));
        add.extend(ours_of("ADD")?);
        ours_of("DEL")?;
        peer_add.extend(peers_of("ADD")?);
        peers_of("DEL")?;
        for pod in pods {
            // Once more, to take its object away, too.
            node.delete_pod(pod)?;
        }
    }
    Ok((add, peer_add))
}

/// Runs something for each, all at the same time.
fn together<T: Sync>(all: &[T], run: impl Fn(&T) -> Result<u64> + Sync) -> Result<Vec<u64>> {
    let start = std::sync::Barrier::new(all.len());
    std::thread::scope(|scope| {
        let (run, start) = (&run, &start);
        let running: Vec<_> = all
            .iter()
            .map(|it| {
                scope.spawn(move || {
                    start.wait();
                    run(it)
                })
            })
            .collect();
        let ended = running.into_iter().map(|it| match it.join() {
            Ok(took) => took,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ended.collect()
    })
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

fn row(claim: String, ours: Vec<u64>, peer: Vec<u64>, target: Target) -> Result<Row> {
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
        claim,
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
        target: Some(target),
        note: "each started directly by the bench, in the node's namespace".to_owned(),
    })
}
