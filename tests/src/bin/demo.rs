//! `cargo xtask demo`: a node, an application, and a short story told with live results.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use weir_tests::application::{Application, Cell, settle};
use weir_tests::node::{CLUSTER_DNS, Family, Node, NodeOptions, Pod, binary};

/// Where `cargo xtask demo` starts, the root of the checkout.
const SHOP: &str = "examples/shop";

#[derive(Debug, Parser)]
#[command(
    name = "demo",
    about = "Run an application on a Weir node and show what happens"
)]
struct Args {
    /// A folder of manifests instead of the example shop.
    #[arg(long)]
    manifests: Option<PathBuf>,
    /// Leave it running, and say how to look around, until Ctrl-C.
    #[arg(long)]
    keep: bool,
}

static STOPPED: AtomicBool = AtomicBool::new(false);

fn main() -> Result<()> {
    let args = Args::parse();
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
    let ended = story(&args, &folder);
    if STOPPED.load(Ordering::SeqCst) {
        return Ok(());
    }
    ended
}

fn story(args: &Args, folder: &Path) -> Result<()> {
    heading(
        "A node: a network namespace with a bpffs, a cgroup, weir-agent and weir-dns of its own",
    );
    let mut node = step("start agent and DNS", || {
        Node::start(NodeOptions::named("demo"))
    })?;
    heading("The application: weir-cni gives each pod its addresses");
    let application = Application::start_with(&node, folder, |pod| {
        let addresses: Vec<_> = pod.addresses.iter().map(ToString::to_string).collect();
        println!("  {:44} {}", pod.workload.id(), addresses.join("  "));
    })?;
    step("services are programmed", || settle(&node, &application))?;
    check_stop()?;

    if args.manifests.is_none() {
        shop(&mut node, &application)?;
    }
    check_stop()?;
    matrix(&application, folder)?;

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
    if args.keep {
        keep(&node, &application)?;
    }
    println!("\nDone; everything is taken down again.");
    Ok(())
}

/// The part of the story that knows the shop.
fn shop(node: &mut Node, application: &Application) -> Result<()> {
    let frontend = application.pod("shop/frontend-0")?;
    let alice = application.pod("customers/alice")?;
    let mallory = application.pod("default/mallory")?;

    heading("Names, asked with dig in the pod shop/frontend-0");
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
    heading("30 requests of shop/frontend-0 to http://catalog, by backend");
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
    let target = application.pod("shop/frontend-1")?;
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
        println!("  {backend:20} {count:3}  {}", "▇".repeat(count));
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

fn keep(node: &Node, application: &Application) -> Result<()> {
    let netns = node.machine().netns().name();
    let socket = node.machine().dir().join("run/admin.sock");
    let pod = application
        .pods
        .first()
        .context("the application has no pod")?;
    heading("It stays until Ctrl-C. To look around:");
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
    println!("  # change the manifests in {}", node.manifests().display());
    while !STOPPED.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
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
