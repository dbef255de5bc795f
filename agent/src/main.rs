//! `weir-agent`: reads what was typed and hands over to the library.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use weir_agent::config::{Args, CleanupArgs, Command, LogFormat, RunArgs, Settings};
use weir_agent::{app, kernel, watch};

fn main() -> ExitCode {
    let ended = match Args::parse().command {
        Command::Run(args) => run(&args),
        Command::Doctor(args) => return doctor(&args.bpffs, &args.cgroup),
        Command::Cleanup(args) => cleanup(&args),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weir-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &RunArgs) -> Result<()> {
    start_log(args)?;
    let settings = Settings::try_from(args).map_err(|errors| {
        let list: Vec<String> = errors.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("{}", list.join("\n"))
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let stopping = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stopping.cancel();
        });
        app::run(settings, stop).await
    })
}

/// Says what is gone, and fails if something is left.
fn cleanup(args: &CleanupArgs) -> Result<()> {
    let _only = kernel::lock::lock(&args.run_dir)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let kernel = &args.kernel;
    let cleaned = runtime.block_on(kernel::cleanup(&kernel.bpffs, &kernel.cgroup))?;
    for what in cleaned.removed {
        println!("removed {what}");
    }
    if !cleaned.left.is_empty() {
        anyhow::bail!("some things are left:\n  {}", cleaned.left.join("\n  "));
    }
    Ok(())
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
    code
}
