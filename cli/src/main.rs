//! The `weir` command: asks the agent of this node and prints what it says. It decides nothing.

mod client;
mod tables;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use serde::de::DeserializeOwned;
use weir_cli::question::Question;
use weir_cli::{explained, views};

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

impl Output {
    /// As the agent's binary is told.
    fn options(self) -> [OsString; 2] {
        let name = match self {
            Self::Table => "table",
            Self::Json => "json",
        };
        ["--output".into(), name.into()]
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Is the node ready, and if not, why. Exits 1 when it is not.
    Status,
    /// Services: addresses, and the backends that the kernel balances over.
    Services,
    /// Pods of this node: address, device, what isolates them.
    Endpoints,
    /// Policies, and which pods of this node they isolate; or a question about policy.
    Policy {
        #[command(subcommand)]
        question: Option<PolicyQuestion>,
    },
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

#[derive(Debug, Subcommand)]
enum PolicyQuestion {
    /// May one send this to the other, and why? Exits 1 when it is denied.
    Explain {
        /// NAMESPACE/POD or an address.
        from: String,
        /// NAMESPACE/POD:PORT[/PROTOCOL], service/NAMESPACE/NAME:PORT[/PROTOCOL], ADDRESS:PORT[/PROTOCOL] or
        /// [ADDRESS]:PORT[/PROTOCOL]. PORT is a number or a name, PROTOCOL tcp, udp or sctp; `/icmp` has no port.
        to: String,
    },
    /// Do the policies of a folder do what its PolicyTests expect? Needs no agent and no cluster. Exits 1 if one does
    /// not, 2 if the folder is wrong.
    Test {
        /// A folder of manifests, or one file.
        #[arg(short, long)]
        file: PathBuf,
    },
    /// What do the policies of a folder open and close: against this cluster as the agent knows it, or, with a second folder
    /// that needs no agent, against that?
    Diff {
        /// A folder of manifests, or one file: what is new, and then what was before. Against a cluster, its policies and
        /// Namespaces come or change, and nothing goes.
        #[arg(short, long, required = true)]
        file: Vec<PathBuf>,
        /// Against a cluster: the folder has all policies that there are, others go.
        #[arg(long)]
        whole: bool,
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
        Command::Policy { question: None } => {
            show(args, "/v1/policy", |rows: &Vec<views::PolicyView>| {
                tables::policy(rows)
            })
            .await?;
            true
        }
        Command::Policy {
            question: Some(PolicyQuestion::Explain { from, to }),
        } => {
            Question::read(from, to).map_err(anyhow::Error::msg)?;
            let (from, to) = (client::escape(from), client::escape(to));
            let path = format!("/v1/policy/explain?from={from}&to={to}");
            let explained = show(args, &path, explained::words).await?;
            explained.cases.iter().all(|case| case.allowed)
        }
        Command::Policy {
            question: Some(PolicyQuestion::Test { file }),
        } => {
            let mut options = vec![OsString::from("test"), "--file".into(), file.into()];
            options.extend(args.output.options());
            return agent("policy", &options);
        }
        Command::Policy {
            question: Some(PolicyQuestion::Diff { file, whole }),
        } => {
            let mut options = vec![OsString::from("diff")];
            for file in file {
                options.extend(["--file".into(), file.into()]);
            }
            options.extend(whole.then(|| "--whole".into()));
            options.extend(args.output.options());
            if file.len() > 1 {
                return agent("policy", &options);
            }
            let cluster = client::fetch(&args.socket, "/v1/policy/objects").await?;
            return tell_agent("policy", &options, &cluster);
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
        Output::Table => print(table(&value).trim_end())?,
        Output::Json => {
            let value: serde_json::Value = serde_json::from_slice(&body)?;
            print(&serde_json::to_string_pretty(&value)?)?;
        }
    }
    Ok(value)
}

/// Whoever reads may have read enough: the answer is what it is.
fn print(text: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("write the answer"),
    }
}

/// The agent's binary holds what needs privilege, and all that decides; it lies beside this one.
fn agent<O: AsRef<OsStr>>(command: &str, options: &[O]) -> Result<ExitCode> {
    let agent = beside()?;
    let error = std::process::Command::new(&agent)
        .arg(command)
        .args(options)
        .exec();
    Err(error).with_context(|| format!("start {}", agent.display()))
}

/// The same, with something to read. It reads all of it before it says anything.
fn tell_agent<O: AsRef<OsStr>>(command: &str, options: &[O], input: &[u8]) -> Result<ExitCode> {
    let agent = beside()?;
    let mut child = std::process::Command::new(&agent)
        .arg(command)
        .args(options)
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", agent.display()))?;
    if let Some(mut to) = child.stdin.take() {
        match to.write_all(input) {
            // It has said what is wrong already.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {}
            written => written.context("tell of the cluster")?,
        }
    }
    let ended = child.wait().context("wait for the answer")?;
    let code = ended.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(2)))
}

fn beside() -> Result<PathBuf> {
    let here = std::env::current_exe().context("find the path of this command")?;
    Ok(here.with_file_name("weir-agent"))
}
