//! `cargo xtask bench`: measures what the targets claim, each beside its peer in one run, and prints
//! ratios. What a target says is in `report`'s rows; how to measure is in `rounds`.

mod api_server;
mod cluster;
mod cni;
mod control;
mod exchange;
mod paths;
mod report;
mod rounds;
mod tables;
mod usage;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::control::Scale;
use crate::exchange::Transaction;
use crate::paths::Length;

#[derive(Debug, Parser)]
#[command(name = "weir-bench", about = "Measure Weir beside its peers")]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Only these rows of the targets.
    #[arg(long)]
    row: Vec<u32>,
    /// Counted rounds of each comparison.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Transactions in each run.
    #[arg(long, default_value_t = 5_000)]
    transactions: usize,
    /// Pods added and deleted for row 14.
    #[arg(long, default_value_t = 200)]
    pods: usize,
    /// Services of the large cluster of rows 11, 13 and 17.
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Pods of it.
    #[arg(long = "cluster-pods", default_value_t = 150_000)]
    cluster_pods: usize,
    /// Changes in each round of row 11.
    #[arg(long, default_value_t = 250)]
    changes: usize,
    /// From one change of a cluster to its next, in milliseconds.
    #[arg(long, default_value_t = 30)]
    pace: u64,
    /// How long nothing happens for row 17, in seconds.
    #[arg(long, default_value_t = 60)]
    idle: u64,
    /// The agent of rows 11, 13 and 17, when it is not the one beside this program.
    #[arg(long)]
    agent: Option<PathBuf>,
    /// Where the figures go as JSON.
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One end of an exchange; started by the bench itself.
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        cpu: usize,
        #[arg(long)]
        port: u16,
    },
    /// The other end.
    #[command(hide = true)]
    Measure {
        #[arg(long)]
        cpu: usize,
        #[arg(long, value_enum)]
        what: Transaction,
        #[arg(long)]
        target: SocketAddr,
        #[arg(long)]
        count: usize,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.command {
        Some(Command::Serve { cpu, port }) => exchange::serve(port, cpu),
        Some(Command::Measure {
            cpu,
            what,
            target,
            count,
        }) => {
            let latency = exchange::measure(what, target, count, cpu)?;
            println!("{}", serde_json::to_string(&latency)?);
            Ok(())
        }
        None => bench(&args),
    }
}

fn bench(args: &Args) -> Result<()> {
    let length = Length {
        rounds: args.rounds,
        transactions: args.transactions,
    };
    let wanted = |row: u32| args.row.is_empty() || args.row.contains(&row);
    let mut rows = Vec::new();
    if wanted(1) {
        eprintln!("row 1: a service through the socket path …");
        rows.extend(paths::service_at_the_socket(length).context("row 1")?);
    }
    if wanted(3) {
        eprintln!("row 3: everything on against plain routing …");
        rows.extend(paths::everything_on(length).context("row 3")?);
    }
    if wanted(14) {
        eprintln!("row 14: CNI ADD and DEL …");
        rows.extend(cni::add_and_del(args.pods).context("row 14")?);
    }
    let mut figures = Vec::new();
    if [11, 13, 17].into_iter().any(wanted) {
        eprintln!("rows 11, 13 and 17: an agent that watches a cluster …");
        let scale = Scale {
            services: args.services,
            pods: args.cluster_pods,
            rounds: args.rounds,
            changes: args.changes,
            pace: Duration::from_millis(args.pace),
            idle: Duration::from_secs(args.idle),
            agent: args.agent.clone(),
        };
        figures = control::rows(&scale, &wanted).context("rows 11, 13 and 17")?;
    }
    if !rows.is_empty() {
        println!("{}", report::table(&rows));
    }
    if !figures.is_empty() {
        println!("{}", report::figures(&figures));
    }
    for figure in figures.iter().filter(|figure| !figure.note.is_empty()) {
        println!("{}: {}", figure.claim, figure.note);
    }
    for row in rows.iter().filter(|row| !row.note.is_empty()) {
        println!("{}: {}", row.claim, row.note);
    }
    report::write_json(&rows, &figures, &args.json)?;
    println!("\nas JSON: {}", args.json.display());
    Ok(())
}
