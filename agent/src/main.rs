//! `weir-agent`: reads what was typed and hands over to the library.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use weir_agent::beat::LOOK;
use weir_agent::config::{
    Args, CleanupArgs, Command, InstallArgs, LogFormat, PolicyArgs, PolicyCommand, PolicyOutput,
    RunArgs, Settings,
};
use weir_agent::explain::diff::{self, Diff, Scope};
use weir_agent::explain::expect;
use weir_agent::install::{self, Installed, Leases, Places};
use weir_agent::{app, keep, kernel, watch};
use weir_common::allocator::Allocator;
use weir_dns::hand_over::Folder;

// docs/decisions/0020-an-allocator-of-our-own-choice.md
#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    let ended = match Args::parse().command {
        Command::Run(args) => run(&args),
        Command::Doctor(args) => return doctor(&args.bpffs, &args.cgroup),
        Command::Install(args) => install(&args),
        Command::Cleanup(args) => cleanup(&args),
        Command::Keep(args) => {
            match keep::keep(&args.command, &args.hold, &Folder::new(args.hand_over)) {
                Ok(code) => return code,
                Err(error) => Err(error),
            }
        }
        Command::Policy(args) => return policy(&args),
        Command::Wait => wait(),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weir-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A panic anywhere ends the process, whichever task or thread it is in: half an agent that looks whole is worse than
/// one that starts again. The kernel goes on meanwhile, and the parent (`keep`) starts what a signal has ended at once.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

fn run(args: &RunArgs) -> Result<()> {
    abort_on_panic();
    args.kept
        .end_with_keeper()
        .context("follow the parent in its end")?;
    start_log(args)?;
    let settings = Settings::try_from(args).map_err(|errors| {
        let list: Vec<String> = errors.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("{}", list.join("\n"))
    })?;
    app::run(settings)
}

fn install(args: &InstallArgs) -> Result<()> {
    let plugin = match &args.plugin {
        Some(path) => path.clone(),
        None => install::own_plugin()?,
    };
    let say = |installed| match installed {
        Installed::Now(path) => println!("installed {}", path.display()),
        Installed::Already(path) => println!("{} is there already", path.display()),
    };
    say(install::install(&plugin, &args.cni_bin_dir)?);
    if !args.keep {
        return Ok(());
    }
    let kept = install::keep_installed(&plugin, &args.cni_bin_dir, LOOK, say);
    until_ended(kept)
}

/// Says what is gone, and fails if something is left. The network configuration goes first, so that no
/// pod is started meanwhile; the plugin after the kernel's side.
fn cleanup(args: &CleanupArgs) -> Result<()> {
    let _only = kernel::lock::lock(&args.run_dir)?;
    let places = Places {
        cni_conf_dir: args.cni_conf_dir.clone(),
        cni_bin_dir: args.cni_bin_dir.clone(),
        run_dir: args.run_dir.clone(),
        zone_socket: args.zone_socket.clone(),
        state_dir: args.state_dir.clone(),
    };
    let leases = match args.leases {
        true => Leases::Removed,
        false => Leases::Kept,
    };
    let kernel = &args.kernel;
    let closed = install::close(&places);
    let cleaned = kernel::cleanup(&kernel.bpffs, &kernel.cgroup, &args.run_dir);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let cleaned = runtime.block_on(cleaned)?;
    let files = install::remove(&places, leases);
    for what in [closed.removed, cleaned.removed, files.removed].concat() {
        println!("removed {what}");
    }
    let left = [closed.left, cleaned.left, files.left].concat();
    if !left.is_empty() {
        anyhow::bail!("some things are left:\n  {}", left.join("\n  "));
    }
    Ok(())
}

fn wait() -> Result<()> {
    until_ended(std::future::pending())
}

/// Until somebody ends us, or this fails.
fn until_ended(meanwhile: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            ended = meanwhile => return ended,
        }
        Ok(())
    })
}

/// Asks about policies that are in no cluster yet.
fn policy(args: &PolicyArgs) -> ExitCode {
    let said = match &args.command {
        PolicyCommand::Test { file } => expect::check(file)
            .and_then(|it| said(args.output, &it, it.table()).map(|()| it.passed())),
        PolicyCommand::Diff { file, whole } => {
            diff(file, *whole).and_then(|it| said(args.output, &it, it.table()).map(|()| true))
        }
    };
    match said {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(wrong) => {
            eprintln!("{}", wrong.join("\n"));
            ExitCode::from(2)
        }
    }
}

fn said(output: PolicyOutput, answer: &impl Serialize, table: String) -> Result<(), Vec<String>> {
    let text = match output {
        PolicyOutput::Table => table,
        PolicyOutput::Json => {
            let json = serde_json::to_string_pretty(answer).map_err(|e| vec![e.to_string()])?;
            format!("{json}\n")
        }
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has read enough: the answer is what it is.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|e| vec![format!("write the answer: {e}")]),
    }
}

fn diff(files: &[PathBuf], whole: bool) -> Result<Diff, Vec<String>> {
    match files {
        [_, _] if whole => Err(vec![
            "--whole is about a cluster: of two folders each has all policies that there are"
                .to_owned(),
        ]),
        [after, before] => diff::of_folders(before, after),
        [after] => {
            let told = serde_json::from_reader(std::io::stdin().lock());
            let told = told.map_err(|e| vec![format!("what is told of the cluster: {e}")])?;
            let scope = match whole {
                true => Scope::Whole,
                false => Scope::Added,
            };
            diff::against_cluster(after, told, scope)
        }
        _ => Err(vec![
            "at most two folders: what is new, what was before".to_owned(),
        ]),
    }
}

fn start_log(args: &RunArgs) -> Result<()> {
    let filter =
        EnvFilter::try_new(format!("{},{}", args.log, watch::kube::LOG_FILTER)).context("--log")?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

fn doctor(bpffs: &std::path::Path, cgroup: &std::path::Path) -> ExitCode {
    let checks = kernel::features::probe(bpffs, cgroup);
    let mut code = ExitCode::SUCCESS;
    for check in checks {
        match check.outcome {
            Ok(found) => println!("ok       {:32} {found}", check.what),
            Err(problem) => {
                code = ExitCode::FAILURE;
                println!("MISSING  {:32} {problem}", check.what);
            }
        }
    }
    if let Err(error) = kernel::connected::probe() {
        let left = "those of the node's own processes stay with a backend that is gone";
        println!("LOOK     {:32} {left}: {error}", "connected UDP sockets");
    }
    for finding in install::surroundings::look() {
        println!("LOOK     {:32} {}", finding.what, finding.text);
    }
    code
}
