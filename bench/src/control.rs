//! Rows 11, 13 and 17 of the targets: what a change of the cluster costs an agent, and how soon the kernel
//! has it; what the agent keeps in memory; what it takes when nothing happens. A small cluster, a large one
//! and the small one once more, as the control, are watched at the same time by an agent each.

use std::net::TcpListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::runtime::Builder;
use tokio::task::spawn_blocking;
use weir_tests::node::{Node, NodeOptions, Source};

use crate::api_server::{self, ApiServer, Change};
use crate::cluster::{Cluster, PORTS, Resource, moving_address, node_address, service_address};
use crate::exchange::pin;
use crate::report::{Figure, Unit};
use crate::rounds::{Ratio, spread};
use crate::tables::Tables;
use crate::usage::Usage;

/// Where agents are; the API servers and who looks at the tables are on the other one.
const CPU_OF_AGENTS: usize = 0;
const CPU_OF_BENCH: usize = 1;
const API_SERVER: &str = "127.0.0.1:6443";
/// The small cluster.
const FEW_SERVICES: usize = 100;
const FEW_PODS: usize = 1_000;
/// Services whose endpoints change, and those which change themselves: the first, and those behind them.
const CHANGING: usize = 16;
/// Which of the clusters is the control.
const CONTROL: usize = 1;
/// How long an agent may take to be ready, with everything that there is in its tables.
const START: Duration = Duration::from_secs(240);
/// How long a change may be on its way.
const PATIENCE: Duration = Duration::from_secs(10);
/// For what an agent does after it has written.
const REST: Duration = Duration::from_millis(500);

/// How large and how long.
#[derive(Clone, Debug)]
pub(crate) struct Scale {
    pub(crate) services: usize,
    pub(crate) pods: usize,
    pub(crate) rounds: usize,
    /// Changes of each round.
    pub(crate) changes: usize,
    /// From one change to the next.
    pub(crate) pace: Duration,
    pub(crate) idle: Duration,
    /// Another agent than the one beside the bench.
    pub(crate) agent: Option<PathBuf>,
}

/// What changes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Endpoint,
    ServicePort,
    ServiceAnnotation,
    NamespaceLabel,
    NodeHeartbeat,
    PodReadiness,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::Endpoint,
        Self::ServicePort,
        Self::ServiceAnnotation,
        Self::NamespaceLabel,
        Self::NodeHeartbeat,
        Self::PodReadiness,
    ];

    fn title(self) -> &'static str {
        match self {
            Self::Endpoint => "one endpoint of a slice",
            Self::ServicePort => "the port of a Service",
            Self::ServiceAnnotation => "an annotation of a Service",
            Self::NamespaceLabel => "a label of a Namespace",
            Self::NodeHeartbeat => "the heartbeat of a Node",
            Self::PodReadiness => "the readiness of a Pod",
        }
    }
}

/// A cluster with the node that is measured.
struct Site {
    title: String,
    agent: Usage,
    dns: Usage,
    tables: Tables,
    server: ApiServer<Cluster>,
    /// What it takes when nothing happens, as a part of a CPU.
    idle: f64,
    // Its processes go before what they read.
    node: Node,
    _dir: tempfile::TempDir,
}

/// Measures the rows that are wanted.
///
/// # Errors
/// An agent is not ready, or a change does not arrive.
pub(crate) fn rows(scale: &Scale, wanted: &dyn Fn(u32) -> bool) -> Result<Vec<Figure>> {
    if scale.services < FEW_SERVICES {
        bail!("fewer than {FEW_SERVICES} services are no large cluster");
    }
    Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(measure(scale, wanted))
}

async fn measure(scale: &Scale, wanted: &dyn Fn(u32) -> bool) -> Result<Vec<Figure>> {
    let mut sites = vec![
        Site::start("small", FEW_SERVICES, FEW_PODS, scale).await?,
        Site::start("control", FEW_SERVICES, FEW_PODS, scale).await?,
        Site::start("large", scale.services, scale.pods, scale).await?,
    ];
    // Not before: an agent would be where we are, and make as many threads as there are CPUs for it.
    pin(CPU_OF_BENCH)?;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let mut figures = Vec::new();
    if wanted(13) {
        let large = &sites[2];
        figures.push(large.memory("settled", Some(64.0))?);
        figures.push(sites[0].memory("settled", None)?);
    }
    if wanted(17) || wanted(11) {
        eprintln!("  nothing happens for {:?} …", scale.idle);
        let idle = idle(&mut sites, scale.idle).await?;
        figures.extend(idle.into_iter().filter(|_| wanted(17)));
    }
    if wanted(11) {
        for kind in Kind::ALL {
            eprintln!("  {} changes …", kind.title());
            let rounds = match kind {
                Kind::Endpoint => scale.rounds,
                _ => scale.rounds.min(3),
            };
            figures.extend(changes(&sites, kind, rounds, scale).await?);
        }
    } else if wanted(13) {
        changes(&sites, Kind::Endpoint, 1, scale).await?;
    }
    if wanted(13) {
        let large = &sites[2];
        figures.push(large.memory("after the changes", Some(64.0))?);
        figures.push(Figure::new(
            13,
            format!("peak of the agent, {}", large.title),
            Unit::Megabytes(large.agent.memory()?.peak as f64 / 1e6),
            Some(128.0),
        ));
        figures.push(Figure::new(
            13,
            format!("the kernel's tables, {}", large.title),
            Unit::Megabytes(large.agent.maps()? as f64 / 1e6),
            Some(96.0),
        ));
        figures.push(Figure::new(
            13,
            format!("weir-dns, {}", large.title),
            Unit::Megabytes(large.dns.memory()?.resident as f64 / 1e6),
            None,
        ));
    }
    // Ends processes and waits for them: not on the thread that serves them.
    spawn_blocking(move || drop(sites)).await?;
    Ok(figures)
}

impl Site {
    async fn start(name: &str, services: usize, pods: usize, scale: &Scale) -> Result<Self> {
        let title = format!("{services} services, {pods} pods");
        eprintln!("  a node of {title} …");
        let dir = tempfile::tempdir()?;
        let kubeconfig = dir.path().join("kubeconfig");
        let url = format!("http://{API_SERVER}");
        std::fs::write(&kubeconfig, api_server::kubeconfig(&url))?;
        let mut options = NodeOptions::named(name);
        options.source = Source::Kube {
            kubeconfig,
            api_server: url,
        };
        if let Some(agent) = &scale.agent {
            options.agent = agent.clone();
        }
        let name = name.to_owned();
        let mut node = Node::prepare(options)?;
        // The other nodes are on a link of this one, or there would be no routes to them.
        let netns = node.machine().netns();
        netns.ip("link add nodes type veth peer name cable")?;
        netns.ip(&format!("addr add {}/16 dev nodes", node_address(0)))?;
        for device in ["nodes", "cable"] {
            netns.ip(&format!("link set {device} up"))?;
        }
        let socket = netns.run(|| TcpListener::bind(API_SERVER))??;
        let server = ApiServer::start(Cluster::new(services, pods, &name), socket)?;
        let begin = Instant::now();
        let (mut node, ready) = spawn_blocking(move || {
            let ready = start(&mut node);
            (node, ready)
        })
        .await?;
        ready.with_context(|| format!("a node of {title}"))?;
        let agent = Usage::of(node.agent()?.pid())?;
        let cpu = agent.cpu()?;
        eprintln!(
            "    ready in {:.1} s, {:.1} s of a CPU",
            begin.elapsed().as_secs_f64(),
            cpu.as_secs_f64()
        );
        agent.pin(CPU_OF_AGENTS)?;
        let dns = Usage::of(node.dns()?.pid())?;
        dns.pin(CPU_OF_AGENTS)?;
        let tables = Tables::open(&node.machine().bpffs().path().join("weir"))?;
        let last = tables.frontend(service_address(services - 1), PORTS[0])?;
        if last.is_none() {
            bail!("the agent says that it is ready, and its last service is not there");
        }
        Ok(Self {
            title,
            agent,
            dns,
            tables,
            server,
            idle: 0.0,
            node,
            _dir: dir,
        })
    }

    fn memory(&self, when: &str, most: Option<f64>) -> Result<Figure> {
        Ok(Figure::new(
            13,
            format!("memory of the agent, {when}, {}", self.title),
            Unit::Megabytes(self.agent.memory()?.resident as f64 / 1e6),
            most,
        ))
    }

    /// Makes the n-th change of a kind, and waits for it where the kernel has it. Nanoseconds from the bytes
    /// of the event to the row.
    async fn make(&self, kind: Kind, n: usize) -> Result<Option<u64>> {
        let (first, behind) = (n % CHANGING, CHANGING + n % CHANGING);
        let send = |resource, index, change| self.server.send(resource, index, change, PATIENCE);
        match kind {
            Kind::Endpoint => self.move_endpoint(first).await.map(Some),
            Kind::ServicePort => {
                let (revision, at) = send(Resource::Services, behind, Change::Seen).await?;
                let port = PORTS[revision.changed as usize % PORTS.len()];
                let address = service_address(behind);
                self.seen(at, || Ok(self.tables.frontend(address, port)?.is_some()))
                    .map(Some)
            }
            Kind::ServiceAnnotation => {
                send(Resource::Services, behind, Change::Unseen).await?;
                Ok(None)
            }
            Kind::NamespaceLabel => {
                send(Resource::Namespaces, n % 10, Change::Seen).await?;
                Ok(None)
            }
            Kind::NodeHeartbeat => {
                send(Resource::Nodes, 1 + n % 10, Change::Unseen).await?;
                Ok(None)
            }
            Kind::PodReadiness => {
                send(Resource::Pods, n % FEW_PODS, Change::Seen).await?;
                Ok(None)
            }
        }
    }

    async fn move_endpoint(&self, service: usize) -> Result<u64> {
        let address = service_address(service);
        let row = || -> Result<_> {
            let row = self.tables.frontend(address, PORTS[0])?;
            row.with_context(|| format!("{address} is no service's"))
        };
        let before = row()?;
        let earlier = self.server.revision(Resource::EndpointSlices, service);
        let place = self
            .tables
            .place_of(&before, moving_address(service, earlier))?;
        let (revision, at) = self
            .server
            .send(Resource::EndpointSlices, service, Change::Seen, PATIENCE)
            .await?;
        let wanted = moving_address(service, revision);
        self.seen(at, || {
            let now = row()?;
            match place {
                // Few calls, to look often.
                Some(place) if now == before => self.tables.is_at(place, wanted),
                _ => Ok(self.tables.place_of(&now, wanted)?.is_some()),
            }
        })
    }

    /// Looks until something is so; nanoseconds since `at`.
    fn seen(&self, at: Instant, mut is_so: impl FnMut() -> Result<bool>) -> Result<u64> {
        loop {
            if is_so()? {
                return Ok(u64::try_from(at.elapsed().as_nanos())?);
            }
            if at.elapsed() > PATIENCE {
                let said = self.node.readyz();
                bail!(
                    "{}: no row within {PATIENCE:?}; /readyz says {said:?}",
                    self.title
                );
            }
        }
    }
}

/// Starts agent and DNS, and waits for longer than tests do.
fn start(node: &mut Node) -> Result<()> {
    node.start_agent()?;
    node.start_dns()?;
    let deadline = Instant::now() + START;
    loop {
        let said = node.readyz();
        if said == "ok" {
            return Ok(());
        }
        if let Some(status) = node.agent()?.ended()? {
            bail!("the agent ended ({status}): {}", node.agent()?.log());
        }
        if Instant::now() > deadline {
            bail!("/readyz said {said:?}; {}", node.agent()?.log());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// How often a kubelet asks whether an agent is ready (`readinessProbe` of the chart).
const PROBE: Duration = Duration::from_secs(2);

async fn idle(sites: &mut [Site], time: Duration) -> Result<Vec<Figure>> {
    let read = |sites: &[Site]| -> Result<Vec<(Duration, Duration)>> {
        let read = |site: &Site| Ok((site.agent.cpu()?, site.dns.cpu()?));
        sites.iter().map(read).collect()
    };
    let (begin, before) = (Instant::now(), read(sites)?);
    let mut probe = tokio::time::interval(PROBE);
    while begin.elapsed() < time {
        probe.tick().await;
        for site in &*sites {
            let said = site.node.readyz();
            if said != "ok" {
                bail!(
                    "{}: /readyz said {said:?} although nothing happens",
                    site.title
                );
            }
        }
    }
    let (took, after) = (begin.elapsed().as_secs_f64(), read(sites)?);
    let mut figures = Vec::new();
    for (n, ((site, before), after)) in sites.iter_mut().zip(before).zip(after).enumerate() {
        site.idle = (after.0 - before.0).as_secs_f64() / took;
        if n == CONTROL {
            continue;
        }
        let mut figure = Figure::new(
            17,
            format!("idle agent, {}", site.title),
            Unit::MilliCpu(site.idle * 1e3),
            Some(1.0),
        );
        figure.note = format!(
            "weir-dns beside it {:.2} mCPU",
            (after.1 - before.1).as_secs_f64() / took * 1e3
        );
        figures.push(figure);
    }
    Ok(figures)
}

/// One site's rounds.
#[derive(Default)]
struct Course {
    /// Nanoseconds of a CPU for a change, of each round.
    cpu: Vec<f64>,
    /// From the bytes to the row, of each change of every round.
    latency: Vec<u64>,
}

async fn changes(sites: &[Site], kind: Kind, rounds: usize, scale: &Scale) -> Result<Vec<Figure>> {
    let mut courses: Vec<Course> = sites.iter().map(|_| Course::default()).collect();
    let slot = scale.pace / u32::try_from(sites.len())?;
    // The first round is not counted.
    for round in 0..=rounds {
        let begin = Instant::now();
        let before: Vec<Duration> = sites.iter().map(|s| s.agent.cpu()).collect::<Result<_>>()?;
        for n in 0..scale.changes {
            // Each in its own time and each first in its turn, so that none finds a CPU that another woke.
            for place in 0..sites.len() {
                let at = (n + place) % sites.len();
                let next = tokio::time::Instant::now() + slot;
                let latency = sites[at].make(kind, n).await?;
                courses[at].latency.extend(latency.filter(|_| round > 0));
                tokio::time::sleep_until(next).await;
            }
        }
        tokio::time::sleep(REST).await;
        for ((site, course), before) in sites.iter().zip(&mut courses).zip(before) {
            let idle = begin.elapsed().mul_f64(site.idle);
            let busy = (site.agent.cpu()? - before).saturating_sub(idle);
            if round > 0 {
                course
                    .cpu
                    .push(busy.as_nanos() as f64 / scale.changes as f64);
            }
        }
    }
    figures(sites, kind, &mut courses)
}

fn figures(sites: &[Site], kind: Kind, courses: &mut [Course]) -> Result<Vec<Figure>> {
    let [small, control, large] = courses else {
        bail!("three clusters are compared");
    };
    let title = kind.title();
    let mut figures = Vec::new();
    for (site, course, is_large) in [
        (&sites[2], &mut *large, true),
        (&sites[0], &mut *small, false),
    ] {
        let is_target = is_large && kind == Kind::Endpoint;
        course.latency.sort_unstable();
        if let Some(last) = course.latency.len().checked_sub(1) {
            for (percent, most) in [(50, 150.0), (99, 1_000.0)] {
                let at = course.latency[last * percent / 100];
                figures.push(Figure::new(
                    11,
                    format!(
                        "{title} until the kernel has it, p{percent}, {}",
                        site.title
                    ),
                    Unit::Micros(at as f64 / 1e3),
                    is_target.then_some(most),
                ));
            }
        }
        let mut cpu = Figure::new(
            11,
            format!("{title}, CPU of the agent, {}", site.title),
            Unit::Millis(course.cpu.iter().sum::<f64>() / course.cpu.len() as f64 / 1e6),
            is_target.then_some(0.3),
        );
        cpu.spread = spread(course.cpu.iter().map(|nanos| nanos / 1e6));
        figures.push(cpu);
    }
    // Of all rounds together: what is done every few seconds is in some rounds and not in others.
    let total = |course: &Course| course.cpu.iter().sum::<f64>();
    let ratios = |a: &Course, b: &Course| -> Option<Ratio> {
        let mut ratio = spread(a.cpu.iter().zip(&b.cpu).map(|(a, b)| a / b))?;
        ratio.median = total(a) / total(b);
        Some(ratio)
    };
    let ratio = ratios(large, small).context("no rounds")?;
    let mut figure = Figure::new(
        11,
        format!("{title}, CPU, large ÷ small cluster"),
        Unit::Ratio(ratio.median),
        Some(1.2),
    );
    figure.spread = Some(ratio);
    figure.control = ratios(control, small);
    figures.push(figure);
    Ok(figures)
}
