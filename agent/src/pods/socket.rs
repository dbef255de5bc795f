//! The socket of the CNI plugin: for root only, in a directory for root only.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tokio::net::UnixListener;
use weir_cni::durable::private_folder;

/// Listens at `path`. A socket that nobody listens to any more is replaced.
///
/// # Errors
/// When another agent listens there, or the directory is not ours alone to use.
pub fn listen(path: &Path) -> Result<UnixListener> {
    let dir = path.parent().context("the CNI socket needs a directory")?;
    private_folder(dir).with_context(|| format!("keep {} for root alone", dir.display()))?;
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("another agent listens at {}; stop it first", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).with_context(|| format!("replace {}", path.display()))?;
        }
        Err(error) => return Err(error).with_context(|| format!("look at {}", path.display())),
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("listen at {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .with_context(|| format!("keep others out of {}", path.display()))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_is_roots_alone_and_one_agents() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("weir/cni.sock");
        let listener = listen(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        let second = listen(&path).unwrap_err().to_string();
        assert!(second.contains("another agent listens"), "{second}");
        // What a killed agent leaves is replaced.
        drop(listener);
        assert!(path.exists());
        listen(&path).unwrap();
    }
}
