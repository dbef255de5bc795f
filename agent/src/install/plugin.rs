//! Putting the CNI plugin where the container runtime looks for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::file;
use crate::beat::beat;

/// The plugin's name, as the network configuration calls it.
pub const PLUGIN: &str = "weir-cni";
const MODE: u32 = 0o755;

/// What came of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Installed {
    /// The same plugin is there already; it was not touched.
    Already(PathBuf),
    /// A plugin that runs meanwhile goes on with the old file.
    Now(PathBuf),
}

/// Copies the plugin at `from` into `folder`, whole or not at all, and compares what it wrote.
///
/// # Errors
/// The plugin cannot be read, or the folder not written.
pub fn install(from: &Path, folder: &Path) -> Result<Installed> {
    let bytes = fs::read(from).with_context(|| format!("read the plugin {}", from.display()))?;
    let to = folder.join(PLUGIN);
    if file::is(&to, &bytes, MODE).with_context(|| format!("look at {}", to.display()))? {
        return Ok(Installed::Already(to));
    }
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    file::put(&to, &bytes, MODE).with_context(|| format!("install {}", to.display()))?;
    Ok(Installed::Now(to))
}

/// The plugin that belongs to this program: it is beside it.
///
/// # Errors
/// The program does not know where it is.
pub fn own_plugin() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find the path of this program")?;
    Ok(program.with_file_name(PLUGIN))
}

/// Is this very plugin in the folder?
///
/// # Errors
/// One of the two cannot be read.
pub fn is_installed(plugin: &Path, folder: &Path) -> Result<bool> {
    let bytes =
        fs::read(plugin).with_context(|| format!("read the plugin {}", plugin.display()))?;
    let to = folder.join(PLUGIN);
    file::is(&to, &bytes, MODE).with_context(|| format!("look at {}", to.display()))
}

/// Installs the plugin again whenever it is not there or another one is. For ever.
///
/// # Errors
/// As [`install`], each time: whoever waits for this decides what then.
pub async fn keep_installed(
    plugin: &Path,
    folder: &Path,
    every: Duration,
    mut news: impl FnMut(Installed),
) -> Result<()> {
    loop {
        match install(plugin, folder)? {
            Installed::Already(_) => {}
            now @ Installed::Now(_) => news(now),
        }
        beat(every).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_is_installed_once_and_again_when_it_differs() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("image");
        let to = folder.path().join("opt/cni/bin");
        fs::write(&from, "one").unwrap();
        let installed = to.join(PLUGIN);
        let first = install(&from, &to).unwrap();
        assert_eq!(first, Installed::Now(installed.clone()));
        let again = install(&from, &to).unwrap();
        assert_eq!(again, Installed::Already(installed.clone()));
        fs::write(&from, "two").unwrap();
        assert_eq!(
            install(&from, &to).unwrap(),
            Installed::Now(installed.clone())
        );
        assert_eq!(fs::read(&installed).unwrap(), b"two");
        install(&folder.path().join("nothing"), &to).unwrap_err();
        assert_eq!(fs::read(&installed).unwrap(), b"two");
    }

    #[tokio::test]
    async fn a_plugin_that_goes_or_is_replaced_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("image");
        let to = folder.path().join("opt/cni/bin");
        fs::write(&from, "ours").unwrap();
        assert!(!is_installed(&from, &to).unwrap());
        let installed = to.join(PLUGIN);
        let mut times = 0;
        let kept = keep_installed(&from, &to, Duration::from_millis(1), |_| {
            times += 1;
            assert!(is_installed(&from, &to).unwrap());
            match times {
                1 => fs::remove_file(&installed).unwrap(),
                2 => fs::write(&installed, "another's").unwrap(),
                // A plugin that cannot be installed is an error, and that ends it.
                _ => fs::remove_file(&from).unwrap(),
            }
        });
        kept.await.unwrap_err();
        assert_eq!(times, 3);
        assert_eq!(fs::read(&installed).unwrap(), b"ours");
    }
}
