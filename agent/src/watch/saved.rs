//! What the sources said, on disk, for an agent that starts while none of them answers: one file of our
//! nouns. It begins with all of them, written beside and renamed, so that they are there as a whole or not
//! at all; what changes afterwards is a `log` behind them, of which a torn end is left out. It can be read
//! by root alone: labels and names are nobody else's business. There is no secret among the seven kinds.

mod log;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::Hasher;
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128, SipHasher13};
use thiserror::Error;
use tracing::{info, warn};

use crate::model::{Object, ObjectId};

pub use self::log::Log;

/// Raised with every change of what a line means: nouns of the model that are renamed, or mean something
/// else, are such changes.
pub const FORMAT: u32 = 2;

/// Without a log, and otherwise the same.
const FORMAT_WITHOUT_LOG: u32 = 1;

/// The name of the file in the agent's state folder.
pub const SAVED_OBJECTS: &str = "objects.jsonl";

/// Where objects are saved.
#[derive(Clone, Debug)]
pub struct SavedObjects {
    path: PathBuf,
    node: Arc<str>,
}

/// What has become of objects; `None` is gone.
pub type Changes = BTreeMap<ObjectId, Option<Object>>;

/// Objects of an earlier run.
#[derive(Debug)]
pub struct Saved {
    pub objects: Vec<Object>,
    /// When all of it was last known to be so.
    pub of: SystemTime,
}

/// A line of the file. After the header come batches, each with its end: the first is all there is, and the
/// following ones are changes.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Line<O, I> {
    Header(Header),
    Object(O),
    Gone(I),
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
    /// Lines of this batch.
    objects: usize,
    /// Of the whole file up to here, without the ends of batches.
    sum: String,
}

/// Why a file is not gone by.
#[derive(Debug, Error)]
enum Refused {
    #[error("its format is {0}, this agent reads {FORMAT} and {FORMAT_WITHOUT_LOG}")]
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
            sum: SipHasher13::new(),
        };
        match lines.next()? {
            Some(Line::Header(Header { format, .. }))
                if format != FORMAT && format != FORMAT_WITHOUT_LOG =>
            {
                return Err(Refused::Format(format));
            }
            Some(Line::Header(Header { node, .. })) if node != self.node => {
                return Err(Refused::OtherNode(node));
            }
            Some(Line::Header(_)) => {}
            _ => return Err(damaged("it does not begin as it should")),
        }
        let mut objects = BTreeMap::new();
        take(lines.batch()?, &mut objects);
        while !lines.is_over()? {
            match lines.batch() {
                Ok(batch) => take(batch, &mut objects),
                Err(Refused::Damaged(why)) => {
                    // What was being written when the power went is the last there is.
                    if lines.has_another_end()? {
                        return Err(Refused::Damaged(why));
                    }
                    info!(
                        why,
                        "the end of the saved objects was not written; they are used without it"
                    );
                    break;
                }
                Err(other) => return Err(other),
            }
        }
        let objects = objects.into_values().collect();
        Ok(Saved { objects, of })
    }
}

fn take(batch: Vec<(ObjectId, Option<Object>)>, objects: &mut BTreeMap<ObjectId, Object>) {
    for (id, object) in batch {
        match object {
            Some(object) => objects.insert(id, object),
            None => objects.remove(&id),
        };
    }
}

struct Lines {
    from: BufReader<File>,
    /// The last one, with its end.
    text: Vec<u8>,
    sum: SipHasher13,
}

impl Lines {
    fn is_over(&mut self) -> io::Result<bool> {
        Ok(self.from.fill_buf()?.is_empty())
    }

    fn next(&mut self) -> Result<Option<Line<Object, ObjectId>>, Refused> {
        self.text.clear();
        if self.from.read_until(b'\n', &mut self.text)? == 0 {
            return Ok(None);
        }
        let line: Line<Object, ObjectId> =
            serde_json::from_slice(&self.text).map_err(|error| damaged(&error.to_string()))?;
        if !matches!(line, Line::End(_)) {
            self.sum.write(&self.text);
        }
        Ok(Some(line))
    }

    /// Up to its end, which has to be right. What is wrong with a line is said when its end is read.
    fn batch(&mut self) -> Result<Vec<(ObjectId, Option<Object>)>, Refused> {
        let mut batch = Vec::new();
        let mut wrong = None;
        let end = loop {
            match self.next() {
                Ok(Some(Line::Object(object))) => batch.push((object.id(), Some(object))),
                Ok(Some(Line::Gone(id))) => batch.push((id, None)),
                Ok(Some(Line::End(end))) => break end,
                Ok(Some(Line::Header(_))) => wrong = Some(damaged("it begins twice")),
                Ok(None) => return Err(wrong.unwrap_or(damaged("its end is missing"))),
                Err(refused @ Refused::Damaged(_)) => wrong = Some(refused),
                Err(other) => return Err(other),
            }
        };
        let found = End {
            objects: batch.len(),
            sum: digest(&self.sum),
        };
        match wrong {
            Some(wrong) => Err(wrong),
            None if end != found || self.text.last() != Some(&b'\n') => {
                Err(damaged(&format!("it says {end:?} and is {found:?}")))
            }
            None => Ok(batch),
        }
    }

    /// Is there an end of a batch in what is left?
    fn has_another_end(&mut self) -> Result<bool, Refused> {
        loop {
            match self.next() {
                Ok(Some(Line::End(_))) => return Ok(true),
                Ok(None) => return Ok(false),
                Ok(Some(_)) | Err(Refused::Damaged(_)) => {}
                Err(other) => return Err(other),
            }
        }
    }
}

fn damaged(why: &str) -> Refused {
    Refused::Damaged(why.to_owned())
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
