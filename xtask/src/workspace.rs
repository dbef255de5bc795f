//! Where things are: the root of the workspace, its `target`, its tools, and who is running us.

use std::env;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// Packages whose binaries and tests run on the host, by folder: the workspace's `default-members`.
pub(crate) const HOST_MEMBERS: &[&str] = &[
    "common", "datapath", "agent", "dns", "cni", "cli", "xtask", "tests", "bench",
];

/// One checkout.
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// The checkout that this binary was built from. Cargo says where when it runs us; a binary
    /// started by hand falls back on where it was compiled.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let manifest = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest
            .parent()
            .with_context(|| format!("{} has no parent folder", manifest.display()))?
            .to_path_buf();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(folder) => root.join(folder),
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Where `setup` unpacks programs whose Debian package would start a service if installed.
    pub(crate) fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// `PATH` with the unpacked tools in front.
    pub(crate) fn search_path(&self) -> anyhow::Result<OsString> {
        let inherited = env::var_os("PATH").unwrap_or_default();
        let folders = [self.tools().join("usr/bin")]
            .into_iter()
            .chain(env::split_paths(&inherited));
        env::join_paths(folders).context("put target/tools on PATH")
    }

    /// The file a program name stands for, if it is in `target/tools` or on `PATH`.
    pub(crate) fn which(&self, program: &str) -> Option<PathBuf> {
        let path = self.search_path().ok()?;
        // Debian keeps `ip` and `nft` in sbin, which a root shell made by `su` may not have.
        env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .map(|folder| folder.join(program))
            .find(|candidate| candidate.is_file())
    }
}

/// Fails unless we are root. `why` completes the sentence "this needs root: …".
pub(crate) fn require_root(why: &str) -> anyhow::Result<()> {
    if !is_root()? {
        bail!("this needs root: {why} (run it again as root, for example with `sudo -E`)");
    }
    Ok(())
}

fn is_root() -> anyhow::Result<bool> {
    // The owner of /proc/self is our effective user.
    let owner = std::fs::metadata("/proc/self")
        .context("read /proc/self")?
        .uid();
    Ok(owner == 0)
}
