//! `cargo xtask demo`: a node, an application, and a short story told with live results.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use weir_tests::application::{Application, Cell, settle};
use weir_tests::binaries::Binaries;
use weir_tests::control_plane::ControlPlane;
use weir_tests::node::{CLUSTER_DNS, Family, Node, NodeOptions, Pod, binary};
use weir_tests::real::{RealNode, cluster_role};
use weir_tests::workloads;

/// Where `cargo xtask demo` starts, the root of the checkout.
const SHOP: &str = "examples/shop";
/// How long the controllers may take from one pod to the next.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Parser)]
#[command(
    name = "demo",
    about = "Run an application on a Weir node and show what happens"
)]
struct Args {
    /// A folder of manifests instead of the example shop.
    #[arg(long)]
    manifests: Option<PathBuf>,
    /// On a real control plane: etcd, API server and controller manager, with kubectl.
    #[arg(long)]
    kube: bool,
    /// Leave it running, and say how to look around, until Ctrl-C.
    #[arg(long)]
    keep: bool,
}

static STOPPED: AtomicBool = AtomicBool::new(false);

fn main() -> Result<()> {
    let args = Args::parse();
    // Building them takes minutes the first time; a Ctrl-C meanwhile has nothing to clean up.
    let binaries = args.kube.then(Binaries::ready).transpose()?;
    // Every thread leaves these signals to the one below: a Ctrl-C unwinds and cleans up.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("block SIGINT")?;
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            STOPPED.store(true, Ordering::SeqCst);
            eprintln!("\ncleaning up …");
        }
    });
    let folder = args.manifests.clone().unwrap_or_else(|| SHOP.into());
    if !folder.is_dir() {
        bail!("{} is not a folder", folder.display());
    }
    let ended = match &binaries {
        None => alone(&args, &folder),
        Some(binaries) => on_control_plane(&args, &folder, binaries),
    };
    if STOPPED.load(Ordering::SeqCst) {
        return Ok(());
    }
    ended
}

/// The story without an API server: the folder's manifests are the cluster.
fn alone(args: &Args, folder: &Path) -> Result<()> {
    heading(
        "A node: a network namespace with a bpffs, a cgroup, weir-agent and weir-dns of its own",
    );
    let mut node = step("start agent and DNS", || {
        Node::start(NodeOptions::named("demo"))
    })?;
    heading("The application: weir-cni gives each pod its addresses");
    let application = Application::start_with(&node, folder, show_pod)?;
    story(args, folder, &mut node, &application)?;
    if args.keep {
        heading("It stays until Ctrl-C. To look around:");
        look_around(&node, &application)?;
        println!("  # change the manifests in {}", node.manifests().display());
        wait_for_stop();
    }
    println!("\nDone; everything is taken down again.");
    Ok(())
}

/// The same story on a real control plane: kubectl says what should be, the real controllers make the
/// pods, a played kubelet runs them.
fn on_control_plane(args: &Args, folder: &Path, binaries: &Binaries) -> Result<()> {
    heading("A control plane: etcd, kube-apiserver and kube-controller-manager");
    let plane = step("start it", || ControlPlane::start(binaries))?;
    check_stop()?;
    heading("A node on it: its agent reads six kinds of objects and may do nothing else");
    let mut real = step("register the node, apply the agent's role", || {
        RealNode::prepare(plane, "demo", &cluster_role())
    })?;
    step("start agent and DNS", || real.start_node())?;
    check_stop()?;
    heading("The application: kubectl apply, and weir-cni gives each pod its addresses");
    step("kubectl apply", || real.apply_folder(folder))?;
    let objects = workloads::objects(folder)?;
    let expected = workloads::expand(&objects)?.len();
    let pods = pods_of_controllers(&real, expected)?;
    let application = Application { pods, objects };
    story(args, folder, &mut real.node, &application)?;
    if args.keep {
        heading("It stays until Ctrl-C. To look around:");
        look_around(&real.node, &application)?;
        println!(
            "  # what the cluster knows, and what to change:\n  ip netns exec {} {} --kubeconfig {} get pods,services,endpointslices -A",
            real.plane.machine().netns().name(),
            binaries.kubectl.display(),
            real.plane.admin().display(),
        );
        wait_for_stop();
    }
    println!("\nDone; everything is taken down again.");
    Ok(())
}

/// Waits for so many pods, showing each as it runs.
fn pods_of_controllers(real: &RealNode, expected: usize) -> Result<Vec<Pod>> {
    let mut shown = BTreeSet::new();
    let mut progress = Instant::now();
    loop {
        check_stop()?;
        let pods = real.pods();
        for pod in &pods {
            if shown.insert(pod.workload.id()) {
                show_pod(pod);
                progress = Instant::now();
            }
        }
        if pods.len() == expected {
            return Ok(pods);
        }
        if progress.elapsed() > PATIENCE {
            bail!(
                "{} of {expected} pods run, and no other started in {PATIENCE:?}",
                pods.len()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn story(args: &Args, folder: &Path, node: &mut Node, application: &Application) -> Result<()> {
    step("services are programmed", || settle(node, application))?;
    check_stop()?;

    if args.manifests.is_none() {
        shop(node, application)?;
    }
    check_stop()?;
    matrix(application, folder)?;

    heading("What the kernel dropped, and why");
    show(node.weir("drops"), 14)?;
    heading("Does the kernel hold what it should?");
    show(node.weir("verify"), 40)?;
    heading("Counters");
    let metrics = node.metrics()?;
    for line in metrics
        .lines()
        .filter(|l| !l.starts_with('#') && !l.ends_with(" 0"))
        .take(24)
    {
        println!("  {line}");
    }
    Ok(())
}

/// The part of the story that knows the shop.
fn shop(node: &mut Node, application: &Application) -> Result<()> {
    let frontend = pod_of(application, "shop", "frontend", 0)?;
    let alice = pod_of(application, "customers", "customer", 0)?;
    let mallory = pod_of(application, "default", "customer", 0)?;

    let name = frontend.workload.id();
    heading(&format!("Names, asked with dig in the pod {name}"));
    for question in [
        "catalog A",
        "catalog AAAA",
        "db A",
        "db-1.db A",
        "_sql._tcp.db.shop.svc.cluster.local SRV",
        "warehouse CNAME",
        "nobody.shop.svc.cluster.local A",
    ] {
        let answer = dig(frontend, question)?;
        println!("  {question:44} {answer}");
    }
    check_stop()?;

    heading("30 requests of customers/alice to http://frontend.shop, by backend");
    balanced(alice, "http://frontend.shop/", 30)?;
    heading(&format!(
        "30 requests of {name} to http://catalog, by backend"
    ));
    balanced(frontend, "http://catalog/", 30)?;
    check_stop()?;

    heading("default/mallory, whom nobody invited, tries the same");
    let denied = curl(mallory, "http://frontend.shop/")?;
    println!("  {denied}");
    if denied.contains("frontend-") {
        bail!("a request that policy denies was answered: {denied}");
    }
    let drops = node.ask("drops")?;
    let recent = drops["recent"]
        .as_array()
        .and_then(|r| r.last())
        .context("no drop was recorded")?;
    let word = |key: &str| recent[key].as_str().unwrap_or_default().to_owned();
    println!("  weir: {}: {}", word("reason"), word("why"));
    check_stop()?;

    heading("The agent is killed with SIGKILL; the kernel goes on");
    node.kill_agent()?;
    println!("  weir-agent is dead");
    let target = pod_of(application, "shop", "frontend", 1)?;
    load(
        alice,
        "http",
        &format!("{}:8080", target.address(Family::V4)?),
        200,
        3.0,
    )?;
    load(alice, "dns", &format!("{CLUSTER_DNS}:53"), 100, 3.0)?;
    balanced(alice, "http://frontend.shop/", 10)?;
    let restart = Instant::now();
    node.start_agent()?;
    node.wait_ready()?;
    println!(
        "  weir-agent is back and ready after {} ms",
        restart.elapsed().as_millis()
    );
    Ok(())
}

fn matrix(application: &Application, folder: &Path) -> Result<()> {
    heading("Every pod to every service, by name, against a naive reading of the policies");
    let cells = application.matrix(folder)?;
    let wrong: Vec<&Cell> = cells.iter().filter(|c| c.expected != c.reached).collect();
    let mut clients: Vec<&str> = cells.iter().map(|c| c.client.as_str()).collect();
    clients.dedup();
    for client in clients {
        let reached: Vec<&str> = cells
            .iter()
            .filter(|c| c.client == client && c.reached)
            .map(|c| c.target.as_str())
            .collect();
        let refused = cells
            .iter()
            .filter(|c| c.client == client && !c.reached)
            .count();
        let list = if reached.is_empty() {
            "nothing".to_owned()
        } else {
            reached.join(" ")
        };
        println!("  {client:44} reaches {list}; {refused} refused");
    }
    for cell in &wrong {
        println!(
            "  WRONG {} → {}: policy says {}, it was {} ({})",
            cell.client,
            cell.target,
            if cell.expected { "allow" } else { "deny" },
            if cell.reached { "reached" } else { "refused" },
            cell.said
        );
    }
    let allowed = cells.iter().filter(|c| c.expected).count();
    println!(
        "  {} pairs, {allowed} permitted, {} wrong",
        cells.len(),
        wrong.len()
    );
    if !wrong.is_empty() {
        bail!(
            "{} of {} pairs are not as the policies say",
            wrong.len(),
            cells.len()
        );
    }
    Ok(())
}

fn dig(pod: &Pod, question: &str) -> Result<String> {
    let mut words = question.split(' ');
    let output = pod
        .command("dig")
        .args([
            "+search",
            "+noall",
            "+answer",
            "+comments",
            "+time=2",
            "+tries=1",
        ])
        .args(&mut words)
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let answers: Vec<String> = said
        .lines()
        .filter(|l| !l.starts_with(';') && !l.is_empty())
        .map(|l| l.split_whitespace().skip(3).collect::<Vec<_>>().join(" "))
        .collect();
    if answers.is_empty() {
        let status = said
            .lines()
            .find_map(|l| l.split("status: ").nth(1))
            .unwrap_or("no answer");
        return Ok(status.split(',').next().unwrap_or_default().to_owned());
    }
    Ok(answers.join("  "))
}

fn curl(pod: &Pod, url: &str) -> Result<String> {
    let output = pod
        .command("curl")
        .args(["-sS", "--max-time", "2", url])
        .output()?;
    let said = if output.status.success() {
        &output.stdout
    } else {
        &output.stderr
    };
    Ok(String::from_utf8_lossy(said).trim().to_owned())
}

fn balanced(pod: &Pod, url: &str, requests: usize) -> Result<()> {
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    for _ in 0..requests {
        let said = curl(pod, url)?;
        let backend = said.split(' ').next().unwrap_or_default().to_owned();
        if said.starts_with("curl:") {
            bail!("{} to {url}: {said}", pod.workload.id());
        }
        *counts.entry(backend).or_default() += 1;
    }
    for (backend, count) in counts {
        println!("  {backend:28} {count:3}  {}", "▇".repeat(count));
    }
    Ok(())
}

fn load(pod: &Pod, kind: &str, target: &str, rate: u32, seconds: f64) -> Result<()> {
    let program = binary("weir-load");
    let output = pod
        .command(&program.display().to_string())
        .args([
            "--kind",
            kind,
            "--target",
            target,
            "--rate",
            &rate.to_string(),
        ])
        .args(["--seconds", &seconds.to_string()])
        .args(["--name", "kube-dns.kube-system.svc.cluster.local."])
        .output()?;
    let said: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    println!(
        "  {kind:5} {} attempts: {}",
        said["attempted"], said["outcomes"]
    );
    if said["outcomes"]["ok"] != said["attempted"] {
        bail!("{kind} attempts failed while the agent was dead: {said}");
    }
    Ok(())
}

fn show(mut command: Command, lines: usize) -> Result<()> {
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    for line in said.lines().take(lines) {
        println!("  {line}");
    }
    if said.is_empty() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn look_around(node: &Node, application: &Application) -> Result<()> {
    let netns = node.machine().netns().name();
    let socket = node.machine().dir().join("run/admin.sock");
    let pod = application
        .pods
        .first()
        .context("the application has no pod")?;
    println!(
        "  {} --socket {} status",
        binary("weir").display(),
        socket.display()
    );
    println!("  ip netns exec {netns} curl -s http://127.0.0.1:9660/metrics");
    println!("  # in the pod {}:", pod.workload.id());
    println!(
        "  ip netns exec {} dig @{CLUSTER_DNS} kube-dns.kube-system.svc.cluster.local",
        pod.netns().name()
    );
    println!(
        "  ip netns exec {} curl http://SERVICE-ADDRESS/   # weir services lists them",
        pod.netns().name()
    );
    Ok(())
}

fn wait_for_stop() {
    while !STOPPED.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The pod number `nth`, from 0, of those in a namespace with this label `app`: a Deployment of a real
/// control plane gives its pods names that nobody knows beforehand.
fn pod_of<'a>(
    application: &'a Application,
    namespace: &str,
    app: &str,
    nth: usize,
) -> Result<&'a Pod> {
    let pods = application.pods.iter();
    pods.filter(|pod| pod.workload.is_of(namespace, app))
        .nth(nth)
        .with_context(|| format!("no pod number {nth} of app {app} runs in {namespace}"))
}

fn show_pod(pod: &Pod) {
    let addresses: Vec<_> = pod.addresses.iter().map(ToString::to_string).collect();
    println!("  {:44} {}", pod.workload.id(), addresses.join("  "));
}

fn heading(text: &str) {
    println!("\n\x1b[1m{text}\x1b[0m");
}

fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    print!("  {what} … ");
    std::io::stdout().flush()?;
    let start = Instant::now();
    let done = work()?;
    println!("{} ms", start.elapsed().as_millis());
    Ok(done)
}

fn check_stop() -> Result<()> {
    if STOPPED.load(Ordering::SeqCst) {
        bail!("stopped");
    }
    Ok(())
}
