//! What settings were before an agent changed them, in a file that outlives agents and goes at a reboot,
//! as the settings themselves do. It is written before a setting is.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tracing::warn;
use weir_cni::durable;

/// In the run folder.
const FILE: &str = "sysctls.json";

/// Settings in the order in which they were first changed.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    settings: Vec<Setting>,
}

/// One setting.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Setting {
    /// Where it usually is, below `/proc/sys`.
    pub(super) path: PathBuf,
    /// Before the first change, whoever made that.
    pub(super) before: String,
    /// As an agent set it last.
    pub(super) ours: String,
}

impl Record {
    /// The record in this run folder; an empty one if there is none.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn open(run_dir: &Path) -> Result<Self> {
        let path = run_dir.join(FILE);
        let settings = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            read => {
                let bytes = read.with_context(|| format!("read {}", path.display()))?;
                serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                    // A node must not be without its agent for what only matters once it has none.
                    warn!(path = %path.display(), %error, "not a record of settings: it begins anew");
                    Vec::new()
                })
            }
        };
        Ok(Self { path, settings })
    }

    pub(super) fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// A setting is about to be changed, and is `now`. What is remembered of it stays.
    pub(super) fn note(&mut self, path: &Path, now: &str, ours: &str) {
        match self.settings.iter_mut().find(|known| known.path == path) {
            Some(known) => known.ours = ours.to_owned(),
            None => self.settings.push(Setting {
                path: path.to_owned(),
                before: now.to_owned(),
                ours: ours.to_owned(),
            }),
        }
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// The run folder is not there or cannot be written.
    pub(super) fn save(&self) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.settings)?;
        durable::replace(&self.path, durable::PRIVATE_FILE, |file| {
            file.write_all(&text)
        })
        .with_context(|| format!("write {}", self.path.display()))
    }

    /// Forgets a setting, which is as it was before.
    ///
    /// # Errors
    /// As of [`Self::save`] and [`Self::remove`].
    pub(super) fn forget(&mut self, path: &Path) -> Result<()> {
        self.settings.retain(|known| known.path != path);
        match self.settings.is_empty() {
            true => self.remove(),
            false => self.save(),
        }
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub(super) fn remove(&self) -> Result<()> {
        durable::remove(&self.path).with_context(|| format!("remove {}", self.path.display()))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_before_the_first_agent_is_never_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let path = Path::new("/proc/sys/net/ipv4/ip_forward");
        for (now, ours) in [("0", "1"), ("2", "1"), ("1", "3")] {
            let mut record = Record::open(folder.path()).unwrap();
            record.note(path, now, ours);
            record.save().unwrap();
        }
        let record = Record::open(folder.path()).unwrap();
        let expected = Setting {
            path: path.to_owned(),
            before: "0".into(),
            ours: "3".into(),
        };
        assert_eq!(record.settings(), [expected]);
        record.remove().unwrap();
        assert!(Record::open(folder.path()).unwrap().settings().is_empty());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_record_that_cannot_be_understood_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), "{").unwrap();
        assert!(Record::open(folder.path()).unwrap().settings().is_empty());
    }
}
