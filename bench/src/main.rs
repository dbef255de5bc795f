//! `cargo xtask bench`: measures what the targets claim, each beside its peer in one run, and prints
//! ratios. What a target says is in `report`'s rows; how to measure is in `rounds`.

mod api_server;
mod cluster;
mod cni;
mod control;
mod exchange;
mod kube_proxy;
mod paths;
mod report;
mod rounds;
mod services;
mod tables;
mod usage;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::control::Scale;
use crate::exchange::{Destination, Transaction};
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
    /// Other services on both sides of rows 2 and 4.
    #[arg(long = "other-services", default_value_t = 1_000)]
    other_services: usize,
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
        /// What every byte is answered with.
        #[arg(long)]
        answer: u8,
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
        /// What the server meant answers with.
        #[arg(long)]
        answer: u8,
        #[arg(long)]
        count: usize,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.command {
        Some(Command::Serve { cpu, port, answer }) => exchange::serve(port, cpu, answer),
        Some(Command::Measure {
            cpu,
            what,
            target,
            answer,
            count,
        }) => {
            let target = Destination {
                address: target,
                answer,
            };
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
    let kube_proxy = if wanted(2) || wanted(4) {
        match kube_proxy::program() {
            // Nobody has asked for these rows by name.
            Err(why) if args.row.is_empty() && why.is_of_the_machine() => Err(why),
            program => Ok(Some(program?)),
        }
    } else {
        Ok(None)
    };
    let mut rows = Vec::new();
    if wanted(1) {
        eprintln!("row 1: a service through the socket path …");
        rows.extend(paths::service_at_the_socket(length).context("row 1")?);
    }
    let program = kube_proxy.as_ref().ok().and_then(Option::as_deref);
    if let Some(program) = program.filter(|_| wanted(2)) {
        eprintln!("row 2: a service beside kube-proxy …");
        let measured = services::beside_kube_proxy(length, args.other_services, program);
        rows.extend(measured.context("row 2")?);
    }
    if wanted(3) {
        eprintln!("row 3: everything on against plain routing …");
        rows.extend(paths::everything_on(length).context("row 3")?);
    }
    if let Some(program) = program.filter(|_| wanted(4)) {
        eprintln!("row 4: a node port from outside …");
        let measured = services::node_port(length, args.other_services, program);
        rows.extend(measured.context("row 4")?);
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
    if let Err(why) = &kube_proxy {
        println!("rows 2 and 4 were not measured: {why}");
    }
    report::write_json(&rows, &figures, &args.json)?;
    println!("\nas JSON: {}", args.json.display());
    Ok(())
}
