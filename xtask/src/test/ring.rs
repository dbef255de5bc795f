//! The rings: which tests belong to each, and how cargo is asked to run them.
//!
//! An integration test says its ring by its file name: `netns_services.rs` is in the ring
//! `netns`, `vm.rs` in the ring `vm`. Every other test is in the ring `host`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, anyhow};
use clap::ValueEnum;

use super::libtest::{Results, run, run_aside};
use super::{Variable, environment};
use crate::build::{Profile, cargo};
use crate::workspace::{HOST_MEMBERS, Workspace};

/// A kind of test, each for what the others cannot see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Ring {
    /// Tables and properties: plain Rust on the host.
    Host,
    /// Host against kernel, through `BPF_PROG_TEST_RUN`.
    Kernel,
    /// Real sockets between network namespaces.
    Netns,
    /// Driven from a real Kubernetes control plane.
    Control,
    /// Other kernels, in virtual machines.
    Vm,
    /// Kubernetes' own specs, and applications, on a cluster of real nodes.
    Cluster,
}

/// The rings asked for.
pub(crate) struct Rings(Vec<Ring>);

impl Rings {
    /// All, if none is named.
    pub(crate) fn chosen(named: Vec<Ring>) -> Self {
        if named.is_empty() {
            return Self(Ring::value_variants().to_vec());
        }
        Self(named)
    }

    pub(crate) fn contain(&self, ring: Ring) -> bool {
        self.0.contains(&ring)
    }

    /// From the quickest to the slowest.
    pub(crate) fn in_order(&self) -> impl Iterator<Item = Ring> {
        Ring::value_variants()
            .iter()
            .copied()
            .filter(|ring| self.0.contains(ring))
    }
}

impl Ring {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Ring::Host => "host (tables and properties)",
            Ring::Kernel => "kernel (host against kernel)",
            Ring::Netns => "netns (real sockets in namespaces)",
            Ring::Control => "control (a real Kubernetes control plane)",
            Ring::Vm => "vm (other kernels)",
            Ring::Cluster => "cluster (Kubernetes' own specs, applications on real nodes)",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Ring::Host => "host",
            Ring::Kernel => "kernel",
            Ring::Netns => "netns",
            Ring::Control => "control",
            Ring::Vm => "vm",
            Ring::Cluster => "cluster",
        }
    }

    /// Runs the ring's tests, all of them even if some fail, with these variables beside the usual.
    ///
    /// Cargo is always asked about the same set of packages (the default members): it resolves
    /// features for the packages it is asked about, and another set would compile everything again.
    pub(crate) fn run(
        self,
        workspace: &Workspace,
        variables: &[Variable],
    ) -> anyhow::Result<Results> {
        let files = self.files(workspace)?;
        if self.side_by_side() > 1 {
            return self.run_side_by_side(workspace, variables, files);
        }
        let mut results = Results::default();
        let targets: Vec<_> = files.iter().flat_map(|file| target(file)).collect();
        if self == Ring::Host {
            let mut libraries = vec!["--lib", "--bins"];
            libraries.extend(targets);
            results.add(run(&mut self.cargo_test(workspace, variables, &libraries)?)?);
            results.add(run(&mut self.cargo_test(
                workspace,
                variables,
                &["--doc"],
            )?)?);
        } else if !targets.is_empty() {
            results.add(run(&mut self.cargo_test(workspace, variables, &targets)?)?);
        }
        Ok(results)
    }

    /// Takes the files in their order, [`side_by_side`](Self::side_by_side) at once, and shows what each printed
    /// when it has ended.
    fn run_side_by_side(
        self,
        workspace: &Workspace,
        variables: &[Variable],
        files: Vec<String>,
    ) -> anyhow::Result<Results> {
        let files = Mutex::new(files.into_iter());
        let results = Mutex::new(Results::default());
        let poisoned = || anyhow!("another thread that runs tests has panicked");
        let lane = || -> anyhow::Result<()> {
            loop {
                let next = files.lock().map_err(|_| poisoned())?.next();
                let Some(file) = next else { return Ok(()) };
                let mut command = self.cargo_test(workspace, variables, &target(&file))?;
                let (result, said) = run_aside(&mut command)?;
                let mut results = results.lock().map_err(|_| poisoned())?;
                print!("{said}");
                results.add(result);
            }
        };
        thread::scope(|scope| {
            let lanes: Vec<_> = (0..self.side_by_side())
                .map(|_| scope.spawn(lane))
                .collect();
            lanes
                .into_iter()
                .try_for_each(|lane| lane.join().map_err(|_| poisoned())?)
        })?;
        results.into_inner().map_err(|_| poisoned())
    }

    fn cargo_test(
        self,
        workspace: &Workspace,
        variables: &[Variable],
        targets: &[&str],
    ) -> anyhow::Result<Command> {
        let mut command = cargo(workspace);
        command.args(["test", "--no-fail-fast"]).args(targets);
        if let Some(threads) = self.threads() {
            command.args(["--", "--test-threads", threads]);
        }
        command.envs(environment(workspace, Profile::Debug)?);
        command.envs(variables.iter().cloned());
        Ok(command)
    }

    /// How many files run at once. Tests that start nodes wait for most of their time: two files leave a machine of
    /// two cores work for half of it.
    fn side_by_side(self) -> usize {
        match self {
            Ring::Host | Ring::Kernel | Ring::Vm | Ring::Cluster => 1,
            Ring::Netns | Ring::Control => 2,
        }
    }

    /// How many tests of one file run at once, where it must not be left to the number of cores:
    /// these rings start processes that want the machine to themselves.
    fn threads(self) -> Option<&'static str> {
        match self {
            Ring::Host | Ring::Kernel => None,
            Ring::Netns => Some("2"),
            Ring::Control | Ring::Vm => Some("1"),
            // Those of one file share a cluster if they run side by side, and take turns on it.
            Ring::Cluster => Some("4"),
        }
    }

    /// The integration tests of this ring, by name.
    fn files(self, workspace: &Workspace) -> anyhow::Result<Vec<String>> {
        let mut names = Vec::new();
        for member in HOST_MEMBERS {
            let folder = workspace.root().join(member).join("tests");
            if folder.is_dir() {
                names.extend(integration_tests(&folder)?);
            }
        }
        names.sort();
        names.dedup();
        names.retain(|name| Ring::of(name) == self);
        Ok(names)
    }

    fn of(test: &str) -> Ring {
        let first = test.split('_').next().unwrap_or(test);
        Ring::value_variants()
            .iter()
            .copied()
            .find(|ring| ring.name() == first)
            .unwrap_or(Ring::Host)
    }
}

/// How cargo is asked for an integration test.
fn target(file: &str) -> [&str; 2] {
    ["--test", file]
}

/// What cargo takes for an integration test: `NAME.rs` or `NAME/main.rs`.
fn integration_tests(folder: &Path) -> anyhow::Result<Vec<String>> {
    let read = || format!("read {}", folder.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(read)? {
        let path = entry.with_context(read)?.path();
        let is_test = path.extension().is_some_and(|extension| extension == "rs")
            || path.join("main.rs").is_file();
        if is_test && let Some(name) = path.file_stem() {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_name_says_the_ring() {
        let cases = [
            ("tidy", Ring::Host),
            ("kernel", Ring::Kernel),
            ("netns_service", Ring::Netns),
            ("control_plane", Ring::Control),
            ("vm", Ring::Vm),
            ("vmware", Ring::Host),
            ("cluster", Ring::Cluster),
        ];
        for (test, expected) in cases {
            assert_eq!(Ring::of(test), expected, "{test}");
        }
    }

    #[test]
    fn rings_run_from_quick_to_slow_whatever_the_order_asked() {
        let rings = Rings::chosen(vec![Ring::Vm, Ring::Host]);
        assert_eq!(rings.in_order().collect::<Vec<_>>(), [Ring::Host, Ring::Vm]);
    }

    #[test]
    fn every_ring_runs_unless_some_are_named() {
        let all: Vec<_> = Rings::chosen(Vec::new()).in_order().collect();
        assert_eq!(all, Ring::value_variants());
        assert!(!Rings::chosen(vec![Ring::Host]).contain(Ring::Cluster));
    }
}
