//! The command line of `cargo xtask`: what a person can ask for, and the order in which it happens.
//! What each command does is in the module of its name.

mod build;
mod census;
mod check;
mod command;
mod image;
mod mutants;
mod run;
mod setup;
mod test;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::build::Profile;
use crate::test::{Ring, Rings};
use crate::workspace::Workspace;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Everything a developer does with Weir",
    version
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Bring this machine to where everything builds and every test runs.
    Setup,
    /// Build everything: the agent with its BPF object, the DNS server, the CNI plugin, the CLI.
    Build {
        /// Build with optimisations.
        #[arg(long)]
        release: bool,
    },
    /// Check formatting, lints (host and BPF code), dependencies.
    Check,
    /// Set up, check, then run every test and say what was not run.
    Test {
        /// Run this ring only; may be given more than once.
        #[arg(long, value_enum)]
        ring: Vec<Ring>,
        /// Take the machine as it is.
        #[arg(long)]
        no_setup: bool,
    },
    /// Show Weir at work on this machine, in network namespaces of its own.
    Demo {
        /// Passed on to the demo; `--help` after `--` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Measure Weir against its peers.
    Bench {
        /// Passed on to the benchmarks.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Pack static programs into an image archive, without a container engine.
    Image(image::Options),
    /// A real Kubernetes cluster in namespaces, with Weir or its peers: up, down, e2e, network-policy-api, shell, compare.
    Cluster {
        /// Passed on; `--help` after `--` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Change `datapath` in small ways, one at a time, and say which of them no test of the host notices.
    Mutants {
        /// Passed on to cargo-mutants, for example `--file datapath/src/nat.rs`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Load every program in the kernels of the virtual machine ring, with its output shown.
    Vm,
}

fn main() -> ExitCode {
    match start(Arguments::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(task: Task) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::find()?;
    match task {
        Task::Setup => setup::run(&workspace)?,
        Task::Build { release } => {
            setup::run(&workspace)?;
            build::run(
                &workspace,
                if release {
                    Profile::Release
                } else {
                    Profile::Debug
                },
            )?;
        }
        Task::Check => {
            setup::run(&workspace)?;
            check::run(&workspace)?;
        }
        Task::Test { ring, no_setup } => {
            workspace::require_root("the tests make network namespaces and load BPF programs")?;
            let rings = Rings::chosen(ring);
            // Without Go there will be no cluster, and nothing is installed for one.
            match (
                no_setup,
                rings.contain(Ring::Cluster) && setup::has_go(&workspace),
            ) {
                (true, _) => {}
                (false, true) => setup::cluster(&workspace)?,
                (false, false) => setup::run(&workspace)?,
            }
            return test::run(&workspace, &rings);
        }
        Task::Demo { arguments } => return run::demo(&workspace, arguments),
        Task::Bench { arguments } => return run::bench(&workspace, arguments),
        Task::Image(options) => drop(image::run(&workspace, options)?),
        Task::Cluster { arguments } => return run::cluster(&workspace, arguments),
        Task::Mutants { arguments } => return mutants::run(&workspace, arguments),
        Task::Vm => return run::vm(&workspace),
    }
    Ok(ExitCode::SUCCESS)
}
