//! `cargo xtask cluster`: the command line of a real Kubernetes cluster on this machine.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use weir_tests::cluster::compare::{Side, compare};
use weir_tests::cluster::e2e::{self, Outcome, Selection};
use weir_tests::cluster::kills::{self, Unrest};
use weir_tests::cluster::options::Options;
use weir_tests::cluster::programs::Programs;
use weir_tests::cluster::{Cluster, End, census, down, init, network_policy_api, rollout};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask cluster",
    about = "A real Kubernetes cluster on this machine, in namespaces of its own"
)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Start a cluster and leave it running.
    Up {
        /// Leave what there is also if it does not come up, to look why.
        #[arg(long)]
        keep: bool,
        #[command(flatten)]
        options: Options,
    },
    /// Take a cluster down, also one whose start or whose end was cut short.
    Down {
        #[arg(long, default_value = "main")]
        name: String,
    },
    /// Run Kubernetes' own specs, on the cluster that runs or on one for the purpose.
    E2e {
        #[command(flatten)]
        selection: Selection,
        #[command(flatten)]
        unrest: Unrest,
        /// So many times, all of which must be good.
        #[arg(long, default_value_t = 1)]
        repeat: u32,
        #[command(flatten)]
        options: Options,
    },
    /// Run the conformance suite of network-policy-api (ClusterNetworkPolicy), on the cluster that runs or on one for the
    /// purpose.
    NetworkPolicyApi {
        #[command(flatten)]
        selection: network_policy_api::Selection,
        #[command(flatten)]
        unrest: Unrest,
        #[command(flatten)]
        options: Options,
    },
    /// Run the specs on a cluster with Weir and on one with its peers, and print what they took.
    Compare {
        #[command(flatten)]
        selection: Selection,
        /// One side only.
        #[arg(long, value_enum)]
        side: Option<Side>,
        #[command(flatten)]
        options: Options,
    },
    /// Update a Deployment while it sends downloads through node ports, on a cluster with Weir and on one with its peers,
    /// and print what was cut.
    Rollout {
        /// One side only.
        #[arg(long, value_enum)]
        side: Option<Side>,
        #[command(flatten)]
        options: Options,
    },
    /// A shell inside a node, or another command there; kubectl and ctr are on its PATH.
    Shell {
        /// n1, n2, …
        node: String,
        #[arg(long, default_value = "main")]
        name: String,
        #[arg(last = true)]
        command: Vec<OsString>,
    },
    /// Build or find everything that a cluster runs, and no more.
    Build,
    /// What the node that this runs on is made of.
    #[command(hide = true)]
    Census,
    #[command(hide = true)]
    Init { name: String, dir: PathBuf },
}

fn main() -> Result<ExitCode> {
    match Args::parse().task {
        Task::Up { keep, options } => {
            let name = options.name.clone();
            let failed = if keep {
                End::LeftRunning
            } else {
                End::TakenDown
            };
            let cluster = up(options, Programs::ready()?, failed)?.leave_running();
            print!(
                "{}",
                cluster.kubectl().run(&["get", "nodes", "-o", "wide"])?
            );
            println!("cluster {name} runs: `cargo xtask cluster shell n1`, `… down`");
        }
        Task::Down { name } => down(&name)?,
        Task::E2e {
            selection,
            unrest,
            repeat,
            options,
        } => {
            let run = |cluster: &Cluster| e2e::run(cluster, &selection);
            return specs(options, unrest, repeat, run);
        }
        Task::NetworkPolicyApi {
            selection,
            unrest,
            options,
        } => {
            let suite = network_policy_api::Suite::ready()?;
            let run = |cluster: &Cluster| suite.run(cluster, &selection);
            return specs(options, unrest, 1, run);
        }
        Task::Compare {
            selection,
            side,
            options,
        } => {
            make_image(&options)?;
            let sides = side.map_or(vec![Side::Weir, Side::Peers], |side| vec![side]);
            let table = compare(&options, &Programs::ready()?, &selection, &sides)?;
            println!("{table}");
        }
        Task::Rollout { side, options } => {
            make_image(&options)?;
            let programs = Programs::ready()?;
            for side in side.map_or(vec![Side::Weir, Side::Peers], |side| vec![side]) {
                let cluster = Cluster::up(side.of(&options), programs.clone(), End::TakenDown)?;
                println!("{}: {}", side.title(), rollout::run(&cluster)?);
            }
        }
        Task::Shell {
            node,
            name,
            command,
        } => {
            let cluster = Cluster::running(&name, Programs::ready()?)?;
            let mut shell = cluster.inside(&node)?;
            match command.as_slice() {
                [] => shell.arg("bash"),
                words => shell.args(words),
            };
            bail!("cannot start it: {}", shell.exec());
        }
        Task::Build => drop(Programs::ready()?),
        Task::Census => print!("{}", census::of_this_node()?),
        Task::Init { name, dir } => init::run(&name, &dir)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(options: Options, programs: Programs, failed: End) -> Result<Cluster> {
    make_image(&options)?;
    Cluster::up(options, programs, failed)
}

/// On a machine that has made none. One that is there is taken, however old it is.
fn make_image(options: &Options) -> Result<()> {
    if !options.lacks_image() {
        return Ok(());
    }
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let made = Command::new(cargo).args(["xtask", "image"]).status();
    if !made.context("start `cargo xtask image`")?.success() {
        bail!("`cargo xtask image` made no {}", options.image.display());
    }
    Ok(())
}

/// On the cluster that runs, or on one for the purpose.
fn specs(
    options: Options,
    unrest: Unrest,
    repeat: u32,
    run: impl Fn(&Cluster) -> Result<Outcome>,
) -> Result<ExitCode> {
    let programs = Programs::ready()?;
    let cluster = match Cluster::running(&options.name, programs.clone()) {
        Ok(running) => running,
        Err(_) => up(options, programs, End::TakenDown)?,
    };
    let mut good = true;
    for round in 1..=repeat {
        let (outcome, tolls) = kills::during(&cluster, unrest, || run(&cluster))?;
        let outcome = outcome?;
        println!("{tolls}{outcome}");
        if repeat > 1 {
            println!("that was {round} of {repeat}");
        }
        good &= outcome.is_good() && tolls.are_enough();
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
