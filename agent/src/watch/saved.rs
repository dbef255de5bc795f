//! The objects that the cluster last said, in a file. When it is written, and when it is gone by, is not
//! here.
//!
//! The file is lines of JSON: what it is, the objects, and at the end how many they are with a checksum of
//! every byte before. It is written beside and renamed, so that it is there as a whole or not at all. It
//! can be read by root alone: labels and names are nobody else's business. There is no secret among the
//! six kinds.

use std::fs::{self, File, OpenOptions};
use std::hash::Hasher;
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128, SipHasher13};
use thiserror::Error;
use tracing::warn;

use crate::model::Object;

/// Raised with every change of what a line means: nouns of the model that are renamed, or mean something
/// else, are such changes.
pub const FORMAT: u32 = 1;

/// The name of the file in the agent's state folder.
pub const SAVED_OBJECTS: &str = "objects.jsonl";

/// Where objects are saved.
#[derive(Clone, Debug)]
pub struct SavedObjects {
    path: PathBuf,
    node: Arc<str>,
}

/// Objects of an earlier run.
#[derive(Debug)]
pub struct Saved {
    pub objects: Vec<Object>,
    /// When all of it was last known to be so.
    pub of: SystemTime,
}

/// A line of the file.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Line<O> {
    Header(Header),
    Object(O),
    End(End),
}

#[derive(Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Header {
    format: u32,
    /// A disk that was another node's says nothing about this one.
    node: Arc<str>,
}

#[derive(Debug, Deserialize, Eq, PartialEq, Serialize)]
struct End {
    objects: usize,
    sum: String,
}

/// Why a file is not gone by.
#[derive(Debug, Error)]
enum Refused {
    #[error("its format is {0}, this agent reads {FORMAT}")]
    Format(u32),
    #[error("it is of node {0}")]
    OtherNode(Arc<str>),
    #[error("it is damaged: {0}")]
    Damaged(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl SavedObjects {
    /// A file of this node. Nothing is read yet.
    pub fn new(path: PathBuf, node: Arc<str>) -> Self {
        Self { path, node }
    }

    /// What an earlier run saved. A file that cannot be gone by is set aside, with a line in the log.
    pub fn load(&self) -> Option<Saved> {
        match self.read() {
            Ok(saved) => Some(saved),
            Err(Refused::Io(error)) if error.kind() == ErrorKind::NotFound => None,
            Err(why) => {
                let aside = aside(&self.path);
                let moved = fs::rename(&self.path, &aside);
                warn!(
                    file = %self.path.display(),
                    why = %why,
                    set_aside = %match &moved {
                        Ok(()) => aside.display().to_string(),
                        Err(error) => error.to_string(),
                    },
                    "saved objects are not used: until the API server answers, nothing is known"
                );
                None
            }
        }
    }

    /// Replaces what is saved. When it returns, the new file has reached the disk.
    ///
    /// # Errors
    /// The folder cannot be written; the old file stands.
    pub fn save<'a>(&self, objects: impl IntoIterator<Item = &'a Object>) -> io::Result<()> {
        let part = part(&self.path);
        match fs::remove_file(&part) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)?;
        let mut to = Summed {
            to: BufWriter::new(file),
            sum: SipHasher13::new(),
        };
        to.line(&Line::<&Object>::Header(Header {
            format: FORMAT,
            node: self.node.clone(),
        }))?;
        let mut count = 0;
        for object in objects {
            to.line(&Line::Object(object))?;
            count += 1;
        }
        let end = End {
            objects: count,
            sum: digest(&to.sum),
        };
        to.line(&Line::<&Object>::End(end))?;
        let file = to.to.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&part, &self.path)?;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        File::open(folder)?.sync_all()
    }

    /// What is saved is still so, as of `now`.
    ///
    /// # Errors
    /// The file is gone, or the disk is.
    pub fn confirm(&self, now: SystemTime) -> io::Result<()> {
        File::options()
            .write(true)
            .open(&self.path)?
            .set_modified(now)
    }

    fn read(&self) -> Result<Saved, Refused> {
        let file = File::open(&self.path)?;
        let of = file.metadata()?.modified()?;
        let mut lines = Lines {
            from: BufReader::new(file),
            text: Vec::new(),
        };
        let mut sum = SipHasher13::new();
        match lines.next()? {
            Some(Line::Header(Header { format, .. })) if format != FORMAT => {
                return Err(Refused::Format(format));
            }
            Some(Line::Header(Header { node, .. })) if node != self.node => {
                return Err(Refused::OtherNode(node));
            }
            Some(Line::Header(_)) => sum.write(&lines.text),
            _ => {
                return Err(Refused::Damaged(
                    "it does not begin as it should".to_owned(),
                ));
            }
        }
        let mut objects = Vec::new();
        let end = loop {
            match lines.next()? {
                Some(Line::Object(object)) => objects.push(object),
                Some(Line::End(end)) => break end,
                Some(Line::Header(_)) => {
                    return Err(Refused::Damaged("it begins twice".to_owned()));
                }
                None => return Err(Refused::Damaged("its end is missing".to_owned())),
            }
            sum.write(&lines.text);
        };
        let found = End {
            objects: objects.len(),
            sum: digest(&sum),
        };
        if end != found {
            return Err(Refused::Damaged(format!(
                "it says {end:?} and is {found:?}"
            )));
        }
        if lines.next()?.is_some() {
            return Err(Refused::Damaged("it goes on after its end".to_owned()));
        }
        Ok(Saved { objects, of })
    }
}

/// A file, and the sum of what was written to it.
struct Summed {
    to: BufWriter<File>,
    sum: SipHasher13,
}

impl Summed {
    fn line(&mut self, line: &Line<&Object>) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.sum.write(&text);
        self.to.write_all(&text)
    }
}

struct Lines {
    from: BufReader<File>,
    /// The last one, with its end.
    text: Vec<u8>,
}

impl Lines {
    fn next(&mut self) -> Result<Option<Line<Object>>, Refused> {
        self.text.clear();
        if self.from.read_until(b'\n', &mut self.text)? == 0 {
            return Ok(None);
        }
        let line = serde_json::from_slice(&self.text);
        line.map(Some)
            .map_err(|error| Refused::Damaged(error.to_string()))
    }
}

/// The keys are zero: it is to find damage, and not an enemy, who could write leases too.
fn digest(sum: &SipHasher13) -> String {
    format!("{:032x}", sum.finish128().as_u128())
}

fn part(path: &Path) -> PathBuf {
    path.with_added_extension("part")
}

fn aside(path: &Path) -> PathBuf {
    path.with_added_extension("set-aside")
}
