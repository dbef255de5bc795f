//! Weir beside kube-proxy, CoreDNS and the bridge plugin: the same specs on the same wires, with what
//! pods waited for and what the nodes' components used meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use comfy_table::{Table, presets};

use super::e2e::{self, Selection};
use super::hierarchy;
use super::options::Options;
use super::place::Node;
use super::programs::Programs;
use super::{Cluster, End};
use crate::cache::progress;
use crate::kubectl::Kubectl;

/// From the kubelet's first sight of a pod until its containers run, without pulling images.
const POD_START: &str = "kubelet_pod_start_sli_duration_seconds_bucket";
/// What of it networking is part of: the pod's namespaces, its address and its way to others.
const SANDBOX: &str = "kubelet_run_podsandbox_duration_seconds_bucket";

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Side {
    Weir,
    Peers,
}

impl Side {
    /// In words.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Weir => "Weir",
            Self::Peers => "bridge, kube-proxy, CoreDNS",
        }
    }

    /// The cluster of this side.
    #[must_use]
    pub fn of(self, options: &Options) -> Options {
        match self {
            Self::Weir => options.clone(),
            Self::Peers => options.clone().with_peers(),
        }
    }
}

/// What one side did and cost.
#[derive(Debug)]
struct Measured {
    outcome: e2e::Outcome,
    pod_start: Times,
    sandbox: Times,
    /// Kubelets and containerds of all nodes.
    runtime: Usage,
    /// What does networking, Services and DNS on all nodes.
    network: Usage,
}

/// Half, and 99 of a hundred, took at most this long. `None` if none was counted.
type Times = Option<[Duration; 2]>;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Usage {
    /// During the specs.
    cpu: Duration,
    /// Bytes of anonymous memory, after the specs.
    memory: u64,
}

/// Runs the specs on a cluster of each side, one after the other, and returns the table.
///
/// # Errors
/// A cluster does not start, or the suite writes no report. Specs that fail are in the table.
pub fn compare(
    options: &Options,
    programs: &Programs,
    selection: &Selection,
    sides: &[Side],
) -> Result<String> {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "",
        "specs",
        "minutes",
        "pod start p50",
        "p99",
        "sandbox p50",
        "p99",
        "CPU, networking",
        "CPU, kubelet and containerd",
        "memory, networking",
        "memory, kubelet and containerd",
    ]);
    for side in sides {
        let title = side.title();
        progress(&format!("{title}:"));
        let measured = measure(side.of(options), programs.clone(), selection)?;
        println!("{title}: {}", measured.outcome);
        table.add_row(row(title, &measured));
    }
    Ok(table.to_string())
}

fn measure(options: Options, programs: Programs, selection: &Selection) -> Result<Measured> {
    let cluster = Cluster::up(options, programs, End::TakenDown)?;
    let before = components(&cluster)?;
    let kubelets = kubelets(&cluster)?;
    let outcome = e2e::run(&cluster, selection)?;
    let after = components(&cluster)?;
    let kubelets = [kubelets, self::kubelets(&cluster)?];
    let sum = |of: Kind| {
        let used = after.iter().filter(|(component, _)| component.kind == of);
        used.fold(Usage::default(), |sum, (component, now)| {
            // Not there before: restarted, and all that it used is of the specs.
            let earlier = before.get(component).map_or(Duration::ZERO, |u| u.cpu);
            Usage {
                cpu: sum.cpu + now.cpu.saturating_sub(earlier),
                memory: sum.memory + now.memory,
            }
        })
    };
    Ok(Measured {
        outcome,
        pod_start: times(&kubelets, POD_START),
        sandbox: times(&kubelets, SANDBOX),
        runtime: sum(Kind::Runtime),
        network: sum(Kind::Network),
    })
}

fn row(title: &str, measured: &Measured) -> Vec<String> {
    let Measured {
        outcome,
        pod_start,
        sandbox,
        runtime,
        network,
    } = measured;
    let time = |times: &Times, n: usize| match times {
        Some(times) => format!("{:.2} s", times[n].as_secs_f64()),
        None => "no pod".to_owned(),
    };
    let cpu = |usage: &Usage| format!("{:.1} s", usage.cpu.as_secs_f64());
    let memory = |usage: &Usage| format!("{} MB", usage.memory / 1_000_000);
    vec![
        title.to_owned(),
        format!(
            "{} of {}",
            outcome.passed,
            outcome.passed + outcome.failed.len()
        ),
        format!("{:.1}", outcome.took.as_secs_f64() / 60.0),
        time(pod_start, 0),
        time(pod_start, 1),
        time(sandbox, 0),
        time(sandbox, 1),
        cpu(network),
        cpu(runtime),
        memory(network),
        memory(runtime),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// The same for every side.
    Runtime,
    Network,
}

/// A cgroup, as a path below the root of its hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Component {
    kind: Kind,
    cgroup: PathBuf,
}

/// What the components of all nodes have used so far. Pods of `kube-system` do networking: nothing
/// else is there.
fn components(cluster: &Cluster) -> Result<BTreeMap<Component, Usage>> {
    let wanted = [
        "-n",
        "kube-system",
        "get",
        "pods",
        "-o",
        "jsonpath={.items[*].metadata.uid}",
    ];
    let pods = cluster.kubectl().run(&wanted)?;
    let pods: Vec<String> = pods
        .split_whitespace()
        .map(|uid| format!("pod{uid}"))
        .collect();
    let mounted = hierarchy::mounted()?;
    let unified = mounted.iter().find(|h| h.file_system == "cgroup2");
    let unified = unified.context("no cgroup2 is mounted")?.mounted_at.clone();
    let mut found = BTreeMap::new();
    for node in Node::all(cluster.options.nodes) {
        let of_node = PathBuf::from(cluster.place.cgroup_of(&node.name()));
        let daemons = [
            (Kind::Runtime, "kubelet"),
            (Kind::Runtime, "containerd"),
            (Kind::Network, "kube-proxy"),
        ];
        let mut cgroups: Vec<Component> = daemons
            .into_iter()
            .map(|(kind, name)| Component {
                kind,
                cgroup: of_node.join(name),
            })
            .collect();
        let kubepods = of_node.join("kubepods");
        for class in ["", "burstable", "besteffort"] {
            cgroups.extend(pods.iter().map(|pod| Component {
                kind: Kind::Network,
                cgroup: kubepods.join(class).join(pod),
            }));
        }
        for component in cgroups {
            if unified.join(&component.cgroup).is_dir() {
                let usage = usage(&mounted, &component.cgroup)?;
                found.insert(component, usage);
            }
        }
    }
    Ok(found)
}

/// Processor time is accounted in version 2 even where the controllers are those of version 1.
fn usage(mounted: &[hierarchy::Hierarchy], cgroup: &Path) -> Result<Usage> {
    let mut usage = Usage::default();
    for hierarchy in mounted {
        let dir = hierarchy.mounted_at.join(cgroup);
        let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
        if hierarchy.file_system == "cgroup2" {
            let micros = field(&read("cpu.stat"), "usage_usec").unwrap_or(0);
            usage.cpu = Duration::from_micros(micros);
        }
        let memory = read("memory.stat");
        if let Some(bytes) = field(&memory, "total_rss").or_else(|| field(&memory, "anon")) {
            usage.memory = bytes;
        }
    }
    if usage.cpu.is_zero() {
        bail!("{} has used no time: it is not accounted", cgroup.display());
    }
    Ok(usage)
}

fn field(stat: &str, name: &str) -> Option<u64> {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
    stat.lines().find_map(value)
}

/// How many took at most as long as each bound, by the bound in milliseconds, on all nodes. The last
/// bound is `u64::MAX`.
type Histogram = BTreeMap<u64, u64>;

/// What the kubelets of all nodes have counted so far, as they publish it.
fn kubelets(cluster: &Cluster) -> Result<String> {
    let kubectl: Kubectl = cluster.kubectl();
    let mut all = String::new();
    for node in Node::all(cluster.options.nodes) {
        let path = format!("/api/v1/nodes/{}/proxy/metrics", node.name());
        all += &kubectl.run(&["get", "--raw", &path])?;
    }
    Ok(all)
}

fn times([before, after]: &[String; 2], metric: &str) -> Times {
    let counts = since(&histogram(before, metric), &histogram(after, metric));
    Some([quantile(&counts, 0.5)?, quantile(&counts, 0.99)?])
}

fn histogram(metrics: &str, metric: &str) -> Histogram {
    let mut all = Histogram::new();
    for (bound, count) in metrics.lines().filter_map(|line| bucket(line, metric)) {
        *all.entry(bound).or_default() += count;
    }
    all
}

/// One line of a Prometheus histogram: `name{le="0.5"} 17`.
fn bucket(line: &str, metric: &str) -> Option<(u64, u64)> {
    let rest = line.strip_prefix(metric)?;
    let (bound, after) = rest.split_once("le=\"")?.1.split_once('"')?;
    let bound = match bound {
        "+Inf" => u64::MAX,
        seconds => Duration::try_from_secs_f64(seconds.parse().ok()?)
            .ok()?
            .as_millis() as u64,
    };
    let count: f64 = after.split_once(' ')?.1.trim().parse().ok()?;
    Some((bound, count as u64))
}

fn since(before: &Histogram, after: &Histogram) -> Histogram {
    let earlier = |bound| before.get(bound).copied().unwrap_or(0);
    let counts = after
        .iter()
        .map(|(bound, n)| (*bound, n.saturating_sub(earlier(bound))));
    counts.collect()
}

/// Between the bounds of its bucket it is taken to be where its share of the bucket is, as Prometheus'
/// `histogram_quantile` does. `None` if nothing was counted.
fn quantile(counts: &Histogram, quantile: f64) -> Option<Duration> {
    let total = counts.values().copied().max().filter(|n| *n > 0)?;
    let rank = quantile * total as f64;
    let (mut below, mut from) = (0, 0);
    for (&bound, &count) in counts {
        if count as f64 >= rank {
            let share = (rank - below as f64) / (count - below).max(1) as f64;
            // Beyond the last bound nothing is known but that it is beyond.
            let to = if bound == u64::MAX { from } else { bound };
            let millis = from as f64 + (to - from) as f64 * share;
            return Some(Duration::from_secs_f64(millis / 1000.0));
        }
        (below, from) = (count, bound);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_read_and_others_are_not() {
        for (line, expected) in [
            (format!("{POD_START}{{le=\"0.5\"}} 17"), Some((500, 17))),
            (
                format!("{POD_START}{{le=\"+Inf\"}} 40"),
                Some((u64::MAX, 40)),
            ),
            (format!("# TYPE {POD_START} histogram"), None),
            (
                format!("{POD_START}{{handler=\"\",le=\"0.25\"}} 2"),
                Some((250, 2)),
            ),
            ("kubelet_other_bucket{le=\"1\"} 1".to_owned(), None),
        ] {
            assert_eq!(bucket(&line, POD_START), expected, "{line}");
        }
    }

    #[test]
    fn a_quantile_is_between_the_bounds_of_its_bucket() {
        let counts = Histogram::from([(1000, 10), (2000, 20), (u64::MAX, 20)]);
        for (q, millis) in [(0.25, 500), (0.5, 1000), (0.75, 1500), (1.0, 2000)] {
            let found = quantile(&counts, q).unwrap().as_millis();
            assert_eq!(found, millis, "{q}");
        }
        assert_eq!(quantile(&Histogram::new(), 0.5), None);
        let beyond = Histogram::from([(1000, 0), (u64::MAX, 5)]);
        assert_eq!(quantile(&beyond, 0.5), Some(Duration::from_secs(1)));
    }
}
