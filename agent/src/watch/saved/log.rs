//! Writing the file: everything at once, and changes behind it.

use std::fs::{self, File, OpenOptions};
use std::hash::Hasher;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use siphasher::sip128::SipHasher13;

use super::{Changes, End, FORMAT, Header, Line, SavedObjects, digest, part};
use crate::model::{Object, ObjectId};

/// A log of less than this is not worth writing everything anew, in bytes.
const SMALL: u64 = 256 * 1024;

/// The file of this run, open behind what is in it.
#[derive(Debug)]
pub struct Log {
    to: BufWriter<File>,
    sum: SipHasher13,
    /// Bytes that everything took.
    whole: u64,
    /// Bytes of the changes since.
    changes: u64,
}

impl SavedObjects {
    /// Replaces what is saved. When it returns, the new file has reached the disk.
    ///
    /// # Errors
    /// The folder cannot be written; the old file stands.
    pub fn save<'a>(&self, objects: impl IntoIterator<Item = &'a Object>) -> io::Result<Log> {
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
        let mut log = Log {
            to: BufWriter::new(file),
            sum: SipHasher13::new(),
            whole: 0,
            changes: 0,
        };
        log.line(&Line::Header(Header {
            format: FORMAT,
            node: self.node.clone(),
        }))?;
        log.batch(objects.into_iter().map(Line::Object))?;
        log.to.get_ref().sync_all()?;
        fs::rename(&part, &self.path)?;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        File::open(folder)?.sync_all()?;
        log.whole = std::mem::take(&mut log.changes);
        Ok(log)
    }
}

impl Log {
    /// Adds what has changed. When it returns, that has reached the disk.
    ///
    /// # Errors
    /// It cannot be written, or somebody took the file away: everything has to be saved anew.
    pub fn append(&mut self, changes: &Changes) -> io::Result<()> {
        if self.to.get_ref().metadata()?.nlink() == 0 {
            return Err(ErrorKind::NotFound.into());
        }
        let line = |(id, object)| match object {
            Some(object) => Line::Object(object),
            None => Line::Gone(id),
        };
        self.batch(
            changes
                .iter()
                .map(|(id, object)| line((id, object.as_ref()))),
        )?;
        self.to.get_ref().sync_data()
    }

    /// Is it time to write everything anew? What that costs has then been written as changes, so that all
    /// that is ever written is at most three times what changes are.
    pub fn has_outgrown(&self) -> bool {
        self.changes > self.whole.max(SMALL)
    }

    fn batch<'a>(
        &mut self,
        lines: impl Iterator<Item = Line<&'a Object, &'a ObjectId>>,
    ) -> io::Result<()> {
        let mut objects = 0;
        for line in lines {
            self.line(&line)?;
            objects += 1;
        }
        let sum = digest(&self.sum);
        self.line(&Line::End(End { objects, sum }))?;
        self.to.flush()
    }

    fn line(&mut self, line: &Line<&Object, &ObjectId>) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        if !matches!(line, Line::End(_)) {
            self.sum.write(&text);
        }
        self.changes += text.len() as u64;
        self.to.write_all(&text)
    }
}
