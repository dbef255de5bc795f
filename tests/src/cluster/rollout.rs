//! A rolling update of a Deployment while its pods send long downloads to a client outside of the cluster, through the
//! node port of every node. Whoever does Services there, it is the same.
//!
//! Seen failing with an agent whose plans name no endpoint that drains (`compile` of `service.rs` without `others`): 200 of
//! 200 downloads were reset.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Cluster;
use super::node::until;
use super::place::Node;
use super::start::Inside;
use crate::cache::progress;
use crate::downloads::{Downloads, Held};
use crate::kubectl::Kubectl;
use crate::load::{Load, Tally};
use crate::netns::Netns;
use crate::node::binary;

const DEPOT: &str = include_str!("depot.yaml");
const NAMESPACE: [&str; 2] = ["-n", "depot"];
/// How many downloads, over all nodes.
pub const DOWNLOADS: u64 = 200;
/// How long each takes, in seconds.
const SECONDS: u32 = 30;
/// New connections per second meanwhile, over all nodes.
const RATE: u32 = 50;
/// How long there are new ones after the update: the last pods that go are told so 5 s after it.
const AFTER: Duration = Duration::from_secs(8);
/// How long pods may take to be ready, and everybody to know them.
const READY: Duration = Duration::from_secs(120);

/// What came of it.
#[derive(Debug)]
pub struct Rollout {
    pub held: Held,
    /// By the node that was asked and the node of the pod that answered.
    pub ways: BTreeMap<(String, String), u64>,
    /// Connections that were made meanwhile. Each has to be answered by a pod that is ready.
    pub fresh: Tally,
    /// How long the update took.
    pub took: Duration,
    /// How long the shortest download went on after it.
    pub outlived: Duration,
}

impl fmt::Display for Rollout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (took, outlived) = (self.took.as_secs_f64(), self.outlived.as_secs_f64());
        let Held {
            attempted,
            bytes,
            outcomes,
            ..
        } = &self.held;
        let cut = self.held.cut();
        let (fresh, failed) = (self.fresh.attempted, self.fresh.failed());
        writeln!(
            f,
            "an update of {took:.1} s, outlived by {outlived:.1} s: {cut} of {attempted} downloads cut, {bytes} bytes \
             right, {failed} of {fresh} new connections failed"
        )?;
        for ((asked, of), count) in &self.ways {
            writeln!(f, "  {asked} was asked, a pod of {of} answered: {count}")?;
        }
        write!(
            f,
            "  downloads: {outcomes:?}, new ones: {:?}",
            self.fresh.outcomes
        )
    }
}

/// What is updated, or held while something else is: pods on every node that send long downloads. It is deleted on drop.
pub struct Depot<'a> {
    cluster: &'a Cluster,
    kubectl: Kubectl,
}

/// Deploys it, updates it under load, and takes it away.
///
/// # Errors
/// It does not start, is not updated in time, or the downloads end before it is; that some are cut is no error.
pub fn run(cluster: &Cluster) -> Result<Rollout> {
    let deploying = Instant::now();
    let depot = Depot::deploy(cluster)?;
    let deployed = deploying.elapsed().as_secs_f64();
    progress(&format!("{deployed:6.1} s  every node leads to every pod"));
    let (pods, targets) = (depot.pods()?, depot.targets()?);
    let begin = Instant::now();
    let downloads = depot.download(DOWNLOADS, SECONDS)?;
    let mut load = cluster.outside("weir-load")?;
    load.args(["--kind=http", "--until-eof", "--patience=3000"]);
    load.args([format!("--rate={RATE}"), format!("--seconds={SECONDS}")]);
    for (n, target) in targets.iter().enumerate() {
        let word = if n == 0 { "target" } else { "also" };
        load.arg(format!("--{word}={target}"));
    }
    let load = Load::run({
        load.stdin(Stdio::piped());
        load
    })?;

    let updating = Instant::now();
    depot.update()?;
    let (took, updated) = (updating.elapsed(), begin.elapsed());
    depot.assert_gone(&pods)?;
    std::thread::sleep(AFTER);
    let fresh = load.finish()?;
    let held = downloads.finish()?;
    let outlived = Duration::from_millis(held.shortest_ms).checked_sub(updated);
    let ways = depot.ways(&pods, &held)?;
    let rollout = Rollout {
        held,
        ways,
        fresh,
        took,
        outlived: outlived.unwrap_or_default(),
    };
    // If none was whole, that says it.
    ensure!(
        rollout.held.shortest_ms == 0 || rollout.outlived > AFTER,
        "the update took longer than the downloads: {rollout}"
    );
    Ok(rollout)
}

impl<'a> Depot<'a> {
    /// Deploys it and waits until every node leads to every pod.
    ///
    /// # Errors
    /// It is refused, or takes too long; the error shows the pods.
    pub fn deploy(cluster: &'a Cluster) -> Result<Self> {
        let program = binary("weir-download").canonicalize()?;
        let folder = program.parent().context("weir-download is in no folder")?;
        let manifest = DEPOT
            .replace("IMAGE", &cluster.agnhost()?)
            .replace("PROGRAMS", &folder.display().to_string());
        let depot = Self {
            cluster,
            kubectl: cluster.kubectl(),
        };
        depot.kubectl.apply(&manifest)?;
        depot.wait()?;
        depot.settle()?;
        Ok(depot)
    }

    /// Begins so many downloads of so many seconds from outside of the cluster, through the node port of each node in turn.
    ///
    /// # Errors
    /// Some do not begin.
    pub fn download(&self, count: u64, seconds: u32) -> Result<Downloads> {
        let mut fetch = self.cluster.outside("weir-download")?;
        fetch.args([
            "fetch",
            &format!("--count={count}"),
            &format!("--seconds={seconds}"),
        ]);
        for target in self.targets()? {
            fetch.arg(format!("--target={target}"));
        }
        Downloads::begin(fetch, count)
    }

    /// How many downloads there were by the node that was asked and the node of the pod, one of these, that answered.
    ///
    /// # Errors
    /// The API server does not say which port it was.
    pub fn ways(
        &self,
        pods: &BTreeMap<String, String>,
        held: &Held,
    ) -> Result<BTreeMap<(String, String), u64>> {
        let mut ways = BTreeMap::new();
        for (n, target) in (1..).zip(self.targets()?) {
            let served = held.served.get(&target.to_string());
            for (pod, count) in served.into_iter().flatten() {
                let of = pods.get(pod).map_or("nobody", String::as_str);
                *ways.entry((Node(n).name(), of.to_owned())).or_default() += count;
            }
        }
        Ok(ways)
    }

    /// Where pods reach it.
    ///
    /// # Errors
    /// The API server does not say.
    pub fn service(&self) -> Result<SocketAddr> {
        let address = "-o=jsonpath={.spec.clusterIP}:80";
        Ok(self.run(&["get", "service", "depot", address])?.parse()?)
    }

    fn run(&self, words: &[&str]) -> Result<String> {
        self.kubectl.run(&[&NAMESPACE[..], words].concat())
    }

    fn wait(&self) -> Result<()> {
        let timeout = format!("--timeout={}s", READY.as_secs());
        let status = self.run(&["rollout", "status", "deployment/depot", &timeout]);
        status.map(drop).map_err(|why| {
            let seen = self.run(&["describe", "pods"]);
            why.context(seen.unwrap_or_else(|e| format!("{e:#}")))
        })
    }

    fn update(&self) -> Result<()> {
        self.run(&["rollout", "restart", "deployment/depot"])?;
        self.wait()
    }

    /// Its pods, by name, with their nodes. Those that are told to go are left out.
    ///
    /// # Errors
    /// The API server does not say.
    pub fn pods(&self) -> Result<BTreeMap<String, String>> {
        let pods: Value = serde_json::from_str(&self.run(&["get", "pods", "-o", "json"])?)?;
        let pods = pods["items"].as_array().context("a list of pods")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let stay = pods
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        Ok(stay
            .map(|pod| {
                (
                    text(&pod["metadata"]["name"]),
                    text(&pod["spec"]["nodeName"]),
                )
            })
            .collect())
    }

    /// The node port of every node.
    fn targets(&self) -> Result<Vec<SocketAddr>> {
        let port = "-o=jsonpath={.spec.ports[0].nodePort}";
        let port = self.run(&["get", "service", "depot", port])?.parse()?;
        let nodes = Node::all(self.cluster.options.nodes);
        Ok(nodes
            .map(|node| SocketAddr::new(node.addresses()[0], port))
            .collect())
    }

    /// Waits until every node leads to every pod.
    fn settle(&self) -> Result<()> {
        let pods = self.pods()?;
        let nodes: BTreeSet<&String> = pods.values().collect();
        let expected = usize::from(self.cluster.options.nodes);
        ensure!(nodes.len() == expected, "a node has no pod: {pods:?}");
        let outside = Netns::existing(self.cluster.place.switch());
        for target in self.targets()? {
            let mut seen = BTreeSet::new();
            until(&format!("every pod through {target}"), READY, || {
                seen.insert(outside.run(|| name_of(target))??);
                match seen.len() == pods.len() {
                    true => Ok(()),
                    false => bail!("only {seen:?}"),
                }
            })?;
        }
        Ok(())
    }

    /// Every one of these was told to go.
    fn assert_gone(&self, before: &BTreeMap<String, String>) -> Result<()> {
        let now = self.pods()?;
        let stayed: Vec<_> = before.keys().filter(|pod| now.contains_key(*pod)).collect();
        ensure!(stayed.is_empty(), "not updated: {stayed:?}");
        Ok(())
    }
}

impl Drop for Depot<'_> {
    fn drop(&mut self) {
        let gone = self
            .kubectl
            .run(&["delete", "namespace", "depot", "--wait=false"]);
        if let Err(why) = gone {
            eprintln!("delete namespace depot: {why:#}");
        }
    }
}

/// Who answers there.
fn name_of(target: SocketAddr) -> Result<String> {
    let patience = Duration::from_secs(1);
    let mut stream = TcpStream::connect_timeout(&target, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: depot\r\n\r\n")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let name = answer
        .strip_prefix("HTTP/1.1 200 ")
        .and_then(|it| it.split_once("\r\n\r\n"));
    let (_, name) = name.with_context(|| format!("an answer of {target}: {answer:?}"))?;
    Ok(name.to_owned())
}

impl Cluster {
    /// One of our programs outside of the cluster: on the wire of its nodes, where no pod's address is known.
    ///
    /// # Errors
    /// No cgroup can be made.
    pub fn outside(&self, program: &str) -> Result<Command> {
        let mut command = self
            .starter
            .foreground(Inside::Outside, &format!("outside-{program}"))?;
        command.arg(binary(program));
        Ok(command)
    }
}
