//! kubectl, inside the namespace of a control plane. The caller says what; this only runs it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::machine::Machine;

/// kubectl with a kubeconfig.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    netns: PathBuf,
    home: PathBuf,
}

impl Kubectl {
    /// kubectl as seen from `machine`; its discovery cache goes with the machine.
    #[must_use]
    pub fn new(program: &Path, kubeconfig: &Path, machine: &Machine) -> Self {
        Self::inside(program, kubeconfig, machine.netns().path(), machine.dir())
    }

    /// kubectl in the namespace at `netns`, with its discovery cache below `home`.
    #[must_use]
    pub fn inside(program: &Path, kubeconfig: &Path, netns: PathBuf, home: &Path) -> Self {
        Self {
            program: program.to_owned(),
            kubeconfig: kubeconfig.to_owned(),
            netns,
            home: home.to_owned(),
        }
    }

    /// The same program for another user.
    #[must_use]
    pub fn with_kubeconfig(&self, kubeconfig: &Path) -> Self {
        Self {
            kubeconfig: kubeconfig.to_owned(),
            ..self.clone()
        }
    }

    /// Runs kubectl and returns its stdout.
    ///
    /// # Errors
    /// It failed; the error holds its stderr.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        self.run_with_input(args, "")
    }

    /// `kubectl apply -f -`.
    ///
    /// # Errors
    /// As [`Kubectl::run`].
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.run_with_input(&["apply", "-f", "-"], yaml)
    }

    /// Runs kubectl with this on its stdin and returns its stdout.
    ///
    /// # Errors
    /// As [`Kubectl::run`].
    pub fn run_with_input(&self, args: &[&str], input: &str) -> Result<String> {
        let mut command = crate::netns::command_in(&self.netns, &self.program);
        command
            .arg(format!("--kubeconfig={}", self.kubeconfig.display()))
            .args(args);
        command.env("HOME", &self.home);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("start kubectl")?;
        let mut stdin = child.stdin.take().context("stdin is a pipe")?;
        let output = std::thread::scope(|scope| {
            // What kubectl does not read it does not want: a broken pipe is no failure.
            scope.spawn(move || stdin.write_all(input.as_bytes()).ok());
            child.wait_with_output()
        })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!(
                "kubectl {}: {}: {}",
                args.join(" "),
                output.status,
                said.trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
