//! The smallest application worth breaking things under: a Service with backends, clients that ask it,
//! the cluster's DNS Service. Nothing is broken here.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::load::Load;
use crate::node::{Family, Node, NodeOptions, Pod};
use crate::workloads::{Transport, Workload};

/// The Service `shop/web`.
pub const WEB: &str = "10.96.0.20:80";
/// The Service that weir-dns answers.
pub const DNS: &str = "10.96.0.10:53";
/// The name of the Service `shop/web`.
pub const WEB_NAME: &str = "web.shop.svc.cluster.local.";

const MANIFESTS: &str = "\
kind: Namespace
apiVersion: v1
metadata: {name: shop}
---
kind: Service
apiVersion: v1
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.20
  selector: {app: web}
  ports: [{port: 80}]
";

/// A node with the application on it.
#[derive(Debug)]
pub struct Shop {
    // Pods go before the node that they are on.
    pub clients: Vec<Pod>,
    pub backends: Vec<Pod>,
    pub node: Node,
}

impl Shop {
    /// Starts the node and its pods; returns when the Service has all of its backends.
    ///
    /// # Errors
    /// As [`Node::start`] and [`Node::run_pod`].
    pub fn open(options: NodeOptions, backends: usize, clients: usize) -> Result<Self> {
        Self::on(Node::start(options)?, backends, clients)
    }

    /// As [`Self::open`], on a node that runs.
    ///
    /// # Errors
    /// As [`Node::run_pod`].
    pub fn on(node: Node, backends: usize, clients: usize) -> Result<Self> {
        node.write_manifest("shop.yaml", MANIFESTS)?;
        let web = |i| {
            Workload::named("shop", &format!("web-{i}"))
                .label("app", "web")
                .port(Transport::Tcp, 80)
        };
        let client = |i| Workload::named("shop", &format!("client-{i}")).label("app", "client");
        let run = |workload| node.run_pod(workload);
        let backends: Vec<_> = (0..backends).map(web).map(run).collect::<Result<_>>()?;
        let clients = (0..clients).map(client).map(run).collect::<Result<_>>()?;
        node.wait_for_service("shop/web", backends.len(), Duration::from_secs(10))?;
        Ok(Self {
            clients,
            backends,
            node,
        })
    }

    /// One request of the first client to the Service, and one to a backend's own address.
    ///
    /// # Errors
    /// One was not answered.
    pub fn still_serves(&self) -> Result<()> {
        let client = self.clients.first().context("the shop has no client")?;
        let backend = self.backends.first().context("the shop has no backend")?;
        let direct = format!("{}:80", backend.address(Family::V4)?);
        for target in [WEB, &direct] {
            let asked = client
                .command("curl")
                .args(["-sS", "--max-time", "3", &format!("http://{target}/")])
                .output()?;
            if !asked.status.success() {
                bail!(
                    "{target}: curl ended with {}: {}",
                    asked.status,
                    String::from_utf8_lossy(&asked.stderr).trim()
                );
            }
        }
        Ok(())
    }

    /// Waits until weir-dns knows the Service.
    ///
    /// # Errors
    /// It did not within ten seconds.
    pub fn wait_for_names(&self) -> Result<()> {
        let client = self.clients.first().context("the shop has no client")?;
        let once = format!("--kind dns --target {DNS} --name {WEB_NAME} --rate 10 --seconds 0.1");
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let tally = Load::start(client, &once)?.finish()?;
            if tally.failed() == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("weir-dns does not know {WEB_NAME}: {tally:?}");
            }
        }
    }

    /// Connections that the backends have accepted since they started.
    ///
    /// # Errors
    /// A pod's counters cannot be read.
    pub fn accepted(&self) -> Result<u64> {
        let of = |pod: &Pod| counter(pod, "Tcp", "PassiveOpens");
        self.backends.iter().map(of).sum()
    }

    /// Openings of connections that clients have sent again since they started: each stands for a packet that was
    /// lost on its way.
    ///
    /// # Errors
    /// As [`Self::accepted`].
    pub fn sent_again(&self) -> Result<u64> {
        let of = |pod: &Pod| counter(pod, "TcpExt", "TCPSynRetrans");
        self.clients.iter().map(of).sum()
    }
}

/// A counter of a pod's network stack, as in `nstat`: its group, its name.
fn counter(pod: &Pod, group: &str, name: &str) -> Result<u64> {
    let file = if group == "TcpExt" { "netstat" } else { "snmp" };
    let path = Path::new("/proc/thread-self/net").join(file);
    let text = pod.netns().run(|| std::fs::read_to_string(&path))??;
    let group = format!("{group}:");
    let mut lines = text.lines().filter(|l| l.starts_with(&group));
    let names = lines.next().context("no names of counters")?;
    let values = lines.next().context("no counters")?;
    let mut both = names.split(' ').zip(values.split(' '));
    let found = both.find(|(known, _)| *known == name);
    let (_, value) = found.with_context(|| format!("no counter {group} {name}"))?;
    Ok(value.parse()?)
}
