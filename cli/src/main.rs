//! The `weir` command: asks the agent of this node and prints what it says. It decides nothing.

mod client;
mod tables;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use serde::de::DeserializeOwned;
use weir_cli::views;

/// Look at what the Weir agent of this node does.
#[derive(Debug, Parser)]
#[command(name = "weir", version, about)]
struct Args {
    /// The agent's local socket.
    #[arg(
        long,
        global = true,
        env = "WEIR_SOCKET",
        default_value = "/run/weir/admin.sock"
    )]
    socket: PathBuf,
    /// A table for people, or JSON for programs.
    #[arg(short, long, global = true, default_value = "table")]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Is the node ready, and if not, why. Exits 1 when it is not.
    Status,
    /// Services: addresses, and the backends that the kernel balances over.
    Services,
    /// Pods of this node: address, device, what isolates them.
    Endpoints,
    /// Policies, and which pods of this node they isolate.
    Policy,
    /// Conversations that the kernel knows.
    Flows,
    /// What was dropped, and why.
    Drops,
    /// Compares what the kernel holds with what it should. Exits 1 when they differ.
    Verify,
    /// What this node offers, and what is missing. Needs no agent.
    Doctor {
        /// Options that `weir-agent doctor` takes.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Removes everything of Weir from this node; pods lose their network. The agent must be stopped.
    Cleanup {
        /// Options that `weir-agent cleanup` takes.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("weir: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn run(args: &Args) -> Result<ExitCode> {
    let ok = match &args.command {
        Command::Status => show(args, "/v1/status", tables::status)
            .await?
            .not_ready
            .is_empty(),
        Command::Services => {
            show(args, "/v1/services", |rows: &Vec<views::ServiceView>| {
                tables::services(rows)
            })
            .await?;
            true
        }
        Command::Endpoints => {
            show(args, "/v1/endpoints", |rows: &Vec<views::EndpointView>| {
                tables::endpoints(rows)
            })
            .await?;
            true
        }
        Command::Policy => {
            show(args, "/v1/policy", |rows: &Vec<views::PolicyView>| {
                tables::policy(rows)
            })
            .await?;
            true
        }
        Command::Flows => {
            show(args, "/v1/flows", |rows: &Vec<views::FlowView>| {
                tables::flows(rows)
            })
            .await?;
            true
        }
        Command::Drops => {
            show(args, "/v1/drops", tables::drops).await?;
            true
        }
        Command::Verify => show(args, "/v1/verify", tables::verify).await?.is_clean(),
        Command::Doctor { options } => return agent("doctor", options),
        Command::Cleanup { options } => return agent("cleanup", options),
    };
    Ok(if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Fetches, prints in the format asked for, and returns what was read.
async fn show<T: DeserializeOwned>(
    args: &Args,
    path: &str,
    table: impl FnOnce(&T) -> String,
) -> Result<T> {
    let body = client::fetch(&args.socket, path).await?;
    let value: T = serde_json::from_slice(&body)
        .with_context(|| format!("the agent's answer to {path} is of another version"))?;
    match args.output {
        Output::Table => println!("{}", table(&value).trim_end()),
        Output::Json => {
            let value: serde_json::Value = serde_json::from_slice(&body)?;
            println!("{}", serde_json::to_string_pretty(&value)?);
        }
    }
    Ok(value)
}

/// The agent's binary holds what needs privilege; it lies beside this one.
fn agent(command: &str, options: &[String]) -> Result<ExitCode> {
    let here = std::env::current_exe().context("find the path of this command")?;
    let agent = here.with_file_name("weir-agent");
    let error = std::process::Command::new(&agent)
        .arg(command)
        .args(options)
        .exec();
    Err(error).with_context(|| format!("start {}", agent.display()))
}
