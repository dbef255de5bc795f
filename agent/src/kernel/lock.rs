//! One agent for one pin folder: two would undo each other's work.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;
use weir_cni::durable::private_folder;

/// Held for as long as the agent lives; the kernel lets go of it however the agent ends.
#[derive(Debug)]
pub struct OnlyAgent {
    _held: Flock<File>,
}

/// Why this agent may not start.
#[derive(Debug, Error)]
pub enum LockError {
    #[error(
        "another weir-agent serves this node ({0} is locked): stop it first; two agents would undo \
         each other's work"
    )]
    Taken(PathBuf),
    #[error("lock {path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Becomes the agent of this run folder.
///
/// # Errors
/// Another one is, or the folder cannot be written.
pub fn lock(run_dir: &Path) -> Result<OnlyAgent, LockError> {
    let path = run_dir.join("agent.lock");
    let io = |source| LockError::Io {
        path: path.clone(),
        source,
    };
    private_folder(run_dir).map_err(io)?;
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(io)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => Ok(OnlyAgent { _held: held }),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(LockError::Taken(path)),
        Err((_, errno)) => Err(io(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_told_and_a_third_may_follow_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path()).unwrap();
        let second = lock(folder.path()).unwrap_err();
        assert!(matches!(second, LockError::Taken(_)), "{second}");
        drop(first);
        lock(folder.path()).unwrap();
    }
}
