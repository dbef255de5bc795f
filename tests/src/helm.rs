//! Helm, built once from its Go module, for rendering and linting the chart of `deploy/`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::binaries::Unavailable;
use crate::cache::{Cache, run_slowly};
use crate::go::{WITHOUT_DEBUG_INFORMATION, fetch, go};

/// Pinned: another version may render other blank lines.
const VERSION: &str = "v4.3.1";

/// A helm that asks no cluster anything.
#[derive(Debug, Clone)]
pub struct Helm {
    program: PathBuf,
}

impl Helm {
    /// The one in the cache. Builds it the first time on a machine, which takes minutes.
    ///
    /// # Errors
    /// There is no Go to build it with, or the build fails.
    pub fn ready() -> Result<Self, Unavailable> {
        let cache = Cache::open(&format!("helm-{VERSION}"))?;
        let program = cache.dir.join("helm");
        if !program.exists() {
            let module = format!("helm.sh/helm/v4@{VERSION}");
            fetch(go("helm")?.current_dir(&cache.dir), &module)?;
            // go moves what it built into place when it is complete.
            let mut build = go("helm")?;
            build
                .current_dir(&cache.dir)
                .env("GOBIN", &cache.dir)
                .env("CGO_ENABLED", "0")
                .args(["install", "-trimpath", "-ldflags=-s -w"])
                // It renders a chart a few times: compiling it is what takes long.
                .arg(format!("-gcflags=all=-N -l {WITHOUT_DEBUG_INFORMATION}"))
                .arg(format!("helm.sh/helm/v4/cmd/helm@{VERSION}"));
            run_slowly(&format!("build helm {VERSION}"), &mut build)?;
        }
        Ok(Self { program })
    }

    /// Objects as YAML: the chart's as the release `weir` of this namespace, with these values (`KEY=VALUE`).
    ///
    /// # Errors
    /// The chart cannot be rendered; the error says why.
    pub fn template(&self, chart: &Path, namespace: &str, values: &[&str]) -> Result<String> {
        let mut words = vec!["template", "weir"];
        let chart = chart.to_str().context("the chart's path")?;
        words.extend([chart, "--namespace", namespace]);
        words.extend(values.iter().flat_map(|value| ["--set", value]));
        self.run(&words)
    }

    /// What Helm finds wrong with the chart, as a failure, or nothing.
    ///
    /// # Errors
    /// It finds something.
    pub fn lint(&self, chart: &Path, values: &[&str]) -> Result<String> {
        let mut words = vec!["lint", "--strict"];
        words.push(chart.to_str().context("the chart's path")?);
        words.extend(values.iter().flat_map(|value| ["--set", value]));
        self.run(&words)
    }

    fn run(&self, words: &[&str]) -> Result<String> {
        // Neither a kubeconfig of whoever runs this nor plugins of theirs.
        let output = Command::new(&self.program)
            .args(words)
            .env("KUBECONFIG", "/dev/null")
            .env("HELM_PLUGINS", "/nonexistent")
            .output()
            .context("start helm")?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if !output.status.success() {
            // lint says what is wrong on stdout.
            bail!("helm: {}\n{}", said(&output.stderr), said(&output.stdout));
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}
