//! Bytes of the ring to records.

use thiserror::Error;
use weir_common::event::{DropEvent, EventKind};
use zerocopy::FromBytes;

/// A record that this agent does not know.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum Undecodable {
    #[error("an event of {0} bytes is of another layout")]
    Length(usize),
    #[error("an event of the unknown kind {0}")]
    Kind(u8),
}

/// Decodes one record of the ring.
///
/// # Errors
/// The record is of another length or kind: programs of another version wrote it.
pub fn decode(record: &[u8]) -> Result<DropEvent, Undecodable> {
    let event =
        DropEvent::read_from_bytes(record).map_err(|_| Undecodable::Length(record.len()))?;
    match event.kind {
        EventKind::DROP | EventKind::AUDIT => Ok(event),
        EventKind(other) => Err(Undecodable::Kind(other)),
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    #[test]
    fn a_record_reads_as_it_was_written() {
        let event = DropEvent {
            kind: EventKind::DROP,
            reason: 11,
            len: 60,
            ..Default::default()
        };
        assert_eq!(decode(event.as_bytes()), Ok(event));
    }

    #[test]
    fn records_of_another_version_are_refused() {
        assert_eq!(decode(&[1; 10]), Err(Undecodable::Length(10)));
        assert_eq!(
            decode(DropEvent::default().as_bytes()),
            Err(Undecodable::Kind(0))
        );
    }
}
