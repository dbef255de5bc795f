//! A list in JSON that is told in pieces while it is made. What is in it is not here.

use std::io;

use serde::Serialize;
use tokio::sync::mpsc;

/// Pieces of an answer, in their order; an error ends it.
pub type Pieces = mpsc::Receiver<io::Result<Vec<u8>>>;

/// About how long a piece is, in bytes.
const PIECE: usize = 64 * 1024;

/// Told to somebody who may be slow, and is waited for, or has stopped listening. Not for asynchronous tasks.
#[derive(Debug)]
pub struct JsonList {
    to: mpsc::Sender<io::Result<Vec<u8>>>,
    piece: Vec<u8>,
    /// What stands before the next row.
    separator: u8,
    outcome: io::Result<()>,
}

impl JsonList {
    pub fn new(to: mpsc::Sender<io::Result<Vec<u8>>>) -> Self {
        Self {
            to,
            piece: Vec::new(),
            separator: b'[',
            outcome: Ok(()),
        }
    }

    /// One more row. After a failure nothing is done any more.
    pub fn push(&mut self, row: &impl Serialize) {
        if self.outcome.is_ok() {
            self.outcome = self.write(row);
        }
    }

    fn write(&mut self, row: &impl Serialize) -> io::Result<()> {
        self.piece.push(self.separator);
        self.separator = b',';
        serde_json::to_writer(&mut self.piece, row)?;
        if self.piece.len() < PIECE {
            return Ok(());
        }
        let piece = std::mem::take(&mut self.piece);
        let sent = self.to.blocking_send(Ok(piece));
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// The last piece, which nobody was told yet.
    ///
    /// # Errors
    /// What has failed before.
    pub fn finish(mut self) -> io::Result<Vec<u8>> {
        self.outcome?;
        if self.separator == b'[' {
            self.piece.push(b'[');
        }
        self.piece.push(b']');
        Ok(self.piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_one_list() {
        for rows in [0, 1, 2, 50_000] {
            let (to, mut pieces) = mpsc::channel(64);
            let mut list = JsonList::new(to);
            (0..rows).for_each(|row| list.push(&[row]));
            let last = list.finish().unwrap();
            let mut text = Vec::new();
            while let Some(piece) = pieces.blocking_recv() {
                let piece = piece.unwrap();
                assert!(piece.len() < PIECE + 100);
                text.extend(piece);
            }
            assert!(rows < 50_000 || text.len() > PIECE);
            text.extend(last);
            let read: Vec<[u32; 1]> = serde_json::from_slice(&text).unwrap();
            let expected: Vec<_> = (0..rows).map(|row| [row]).collect();
            assert_eq!(read, expected);
        }
    }

    #[test]
    fn who_has_stopped_listening_is_told_nothing() {
        let (to, pieces) = mpsc::channel(64);
        drop(pieces);
        let mut list = JsonList::new(to);
        (0..50_000).for_each(|row| list.push(&row));
        assert!(list.piece.is_empty());
        list.finish().unwrap_err();
    }
}
