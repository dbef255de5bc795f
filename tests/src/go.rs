//! Programs built from the Go modules of `tests/gomod`, where `go.mod` and `go.sum` pin every
//! version. Which programs, and for what, the callers say.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::binaries::{Unavailable, find};
use crate::cache::{Cache, run_slowly};

/// A module of ours that requires one of somebody else's.
#[derive(Debug, Clone, Copy)]
pub struct Module {
    /// Below `tests/gomod`.
    folder: &'static str,
    go_mod: &'static str,
    requires: &'static str,
    cache: &'static str,
}

/// Kubernetes: the control plane, what a node runs of it, its test suite.
pub const KUBERNETES: Module = Module {
    folder: "",
    go_mod: include_str!("../gomod/go.mod"),
    requires: "k8s.io/kubernetes",
    cache: "control-plane",
};
pub const CONTAINERD: Module = Module {
    folder: "containerd",
    go_mod: include_str!("../gomod/containerd/go.mod"),
    requires: "github.com/containerd/containerd/v2",
    cache: "containerd",
};
pub const RUNC: Module = Module {
    folder: "runc",
    go_mod: include_str!("../gomod/runc/go.mod"),
    requires: "github.com/opencontainers/runc",
    cache: "runc",
};
pub const COREDNS: Module = Module {
    folder: "coredns",
    go_mod: include_str!("../gomod/coredns/go.mod"),
    requires: "github.com/coredns/coredns",
    cache: "coredns",
};
/// The conformance suite of ClusterNetworkPolicy, with its definition.
pub const NETWORK_POLICY_API: Module = Module {
    folder: "network-policy-api",
    go_mod: include_str!("../gomod/network-policy-api/go.mod"),
    requires: "sigs.k8s.io/network-policy-api",
    cache: "network-policy-api",
};

/// What `go` is asked for.
#[derive(Debug, Clone, Copy)]
pub enum Recipe {
    /// A static program.
    Program,
    /// A program that needs a C compiler, with these build tags.
    WithC(&'static str),
    /// The test program of a package.
    Test,
}

/// A module with its place in the cache, locked against other runs.
#[derive(Debug)]
pub struct Workshop {
    module: Module,
    version: &'static str,
    cache: Cache,
}

impl Module {
    /// The version that `go.mod` requires, `v1.2.3`.
    ///
    /// # Errors
    /// `go.mod` does not require it.
    pub fn version(&self) -> Result<&'static str> {
        let mut lines = self.go_mod.lines().map(str::trim);
        let found = lines.find_map(|line| {
            let line = line.strip_prefix("require ").unwrap_or(line);
            line.strip_prefix(self.requires)?
                .strip_prefix(' ')?
                .split(' ')
                .next()
        });
        found.with_context(|| format!("no {} in tests/gomod/{}", self.requires, self.folder))
    }

    /// # Errors
    /// There is no place for a cache.
    pub fn open(self) -> Result<Workshop> {
        let version = self.version()?;
        Ok(Workshop {
            module: self,
            version,
            cache: Cache::open(&format!("{}-{version}", self.cache))?,
        })
    }

    /// Where Go keeps the source of what the module requires, fetched if it is not there yet.
    ///
    /// # Errors
    /// No Go, or it cannot be fetched.
    pub fn source(&self) -> Result<PathBuf> {
        let mut go = self.go("source")?;
        go.args(["list", "-mod=readonly", "-m", "-f", "{{.Dir}}"]);
        let output = go.arg(self.requires).output().context("run go")?;
        let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !output.status.success() || path.is_empty() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("where is the source of {}? {}", self.requires, said.trim());
        }
        Ok(path.into())
    }

    fn go(&self, program: &str) -> Result<Command, Unavailable> {
        let mut command = go(program)?;
        command.current_dir(
            Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/gomod")).join(self.folder),
        );
        Ok(command)
    }
}

/// For the compiler: the linker throws it away, so it need not be made. Stack traces do not come from it.
pub(crate) const WITHOUT_DEBUG_INFORMATION: &str = "-dwarf=false";

/// Go, to build this program with.
///
/// # Errors
/// There is none.
pub(crate) fn go(program: &str) -> Result<Command, Unavailable> {
    let go = find("go", &["/usr/local/go/bin"]).ok_or_else(|| Unavailable::NoGo {
        program: program.to_owned(),
    })?;
    let mut command = Command::new(go);
    command.env("GOFLAGS", "");
    // The compiler is a short-lived process with much to allocate: memory for time, up to what a small machine has
    // for each core.
    command.env("GOGC", "off").env("GOMEMLIMIT", "3GiB");
    Ok(command)
}

/// Fetches one module, if it is not there yet: what shows whether Go can build at all. `go` has no arguments
/// yet.
///
/// # Errors
/// It cannot: Go is too old for the `go.mod` in its folder, or cannot reach the module proxy.
pub(crate) fn fetch(go: &mut Command, module: &str) -> Result<(), Unavailable> {
    let download = go.args(["mod", "download", module]).output();
    let output = download.context("run go")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Unavailable::NoModule {
        module: module.to_owned(),
        why: said.trim().to_owned(),
    })
}

impl Workshop {
    #[must_use]
    pub fn version(&self) -> &'static str {
        self.version
    }

    /// Where the programs are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.cache.dir
    }

    /// The program `name` of the module, `kube-proxy`, where Go programs usually are: in `cmd`.
    ///
    /// # Errors
    /// As [`Self::program`].
    pub fn command(&self, name: &str) -> Result<PathBuf, Unavailable> {
        let package = format!("{}/cmd/{name}", self.module.requires);
        self.program(name, &package, Recipe::Program)
    }

    /// The program `name`, built from `package` if it is not there yet.
    ///
    /// # Errors
    /// It has to be built, and there is no Go or it does not compile.
    pub fn program(
        &self,
        name: &str,
        package: &str,
        recipe: Recipe,
    ) -> Result<PathBuf, Unavailable> {
        let path = self.cache.dir.join(name);
        if path.exists() {
            return Ok(path);
        }
        let module = format!("{}@{}", self.module.requires, self.version);
        fetch(&mut self.module.go(name)?, &module)?;
        let part = path.with_added_extension("part");
        let mut go = self.module.go(name)?;
        go.env("CGO_ENABLED", "0");
        match recipe {
            Recipe::Program => go.arg("build"),
            Recipe::WithC(tags) => go.env("CGO_ENABLED", "1").args(["build", "-tags", tags]),
            Recipe::Test => go.args(["test", "-c"]),
        };
        go.args(["-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags"]);
        go.arg(self.linker_flags());
        go.arg(format!("-gcflags=all={WITHOUT_DEBUG_INFORMATION}"));
        go.arg("-o").arg(&part);
        run_slowly(&format!("build {name} {}", self.version), go.arg(package))?;
        fs::rename(&part, &path).map_err(anyhow::Error::from)?;
        Ok(path)
    }

    /// The version goes in where the program looks for it: without one the API server calls
    /// itself v0.0.0 and refuses its own feature gates. Elsewhere the linker ignores it.
    fn linker_flags(&self) -> String {
        let version = self.version;
        let kubernetes = "k8s.io/component-base/version";
        let minor = version.split('.').nth(1).unwrap_or("0");
        [
            "-s -w".to_owned(),
            format!("-X {kubernetes}.gitVersion={version}"),
            format!("-X {kubernetes}.gitMajor=1 -X {kubernetes}.gitMinor={minor}"),
            format!("-X github.com/containerd/containerd/v2/version.Version={version}"),
        ]
        .join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_pins_what_it_is_for() {
        for (module, major) in [
            (KUBERNETES, "v1."),
            (CONTAINERD, "v2."),
            (RUNC, "v1."),
            (COREDNS, "v1."),
            (NETWORK_POLICY_API, "v0."),
        ] {
            let version = module.version().unwrap();
            assert!(version.starts_with(major), "{version}");
        }
    }
}
