//! The canonical bytes of what is numbered, and the number that the bytes ask for. Which number they
//! get is in `number`.
//!
//! The encoding is fixed: a tag for every variant, a length before every text and list, integers with
//! the least significant byte first. The hash is SipHash-1-3 with the key below; a number is the low 32
//! bits. Changing either renumbers every table of a running node at its next update, so don't.

use std::sync::Arc;

use siphasher::sip::SipHasher13;
use weir_common::Protocol;

use crate::model::{ObjectName, Operator, RuleAction, Selector, Tier};

const KEY: (u64, u64) = (0x7765_6972_2e70_6f6c, 0x6963_792e_636c_6173);

/// Something with canonical bytes: equal contents give equal bytes, different ones different bytes.
pub(super) trait Canonical {
    fn encode(&self, to: &mut Encoder);
}

/// The number that a content asks for.
pub(super) fn preferred(content: &impl Canonical) -> u32 {
    long_hash(content) as u32
}

/// A hash that nearly always tells contents apart.
pub(super) fn long_hash(content: &impl Canonical) -> u64 {
    let mut encoder = Encoder(Vec::new());
    content.encode(&mut encoder);
    SipHasher13::new_with_keys(KEY.0, KEY.1).hash(&encoder.0)
}

/// Canonical bytes being written.
pub(super) struct Encoder(Vec<u8>);

impl Encoder {
    pub(super) fn tag(&mut self, tag: u8) {
        self.0.push(tag);
    }

    pub(super) fn integer(&mut self, integer: u32) {
        self.0.extend_from_slice(&integer.to_le_bytes());
    }

    /// As many as there are always.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn text(&mut self, text: &str) {
        self.length(text.len());
        self.0.extend_from_slice(text.as_bytes());
    }

    pub(super) fn list<'a, T: Canonical + 'a>(
        &mut self,
        items: impl ExactSizeIterator<Item = &'a T>,
    ) {
        self.length(items.len());
        for item in items {
            item.encode(self);
        }
    }

    pub(super) fn optional<T: Canonical>(&mut self, item: Option<&T>) {
        self.tag(item.is_some().into());
        if let Some(item) = item {
            item.encode(self);
        }
    }

    pub(super) fn length(&mut self, length: usize) {
        self.0.extend_from_slice(&(length as u64).to_le_bytes());
    }
}

impl<T: Canonical> Canonical for Arc<T> {
    fn encode(&self, to: &mut Encoder) {
        (**self).encode(to);
    }
}

impl Canonical for Arc<str> {
    fn encode(&self, to: &mut Encoder) {
        to.text(self);
    }
}

impl Canonical for ObjectName {
    fn encode(&self, to: &mut Encoder) {
        to.text(&self.namespace);
        to.text(&self.name);
    }
}

impl Canonical for Protocol {
    fn encode(&self, to: &mut Encoder) {
        to.tag(self.0);
    }
}

impl Canonical for Tier {
    fn encode(&self, to: &mut Encoder) {
        to.tag(match self {
            Self::Admin => 0,
            Self::Baseline => 1,
        });
    }
}

impl Canonical for RuleAction {
    fn encode(&self, to: &mut Encoder) {
        to.tag(match self {
            Self::Accept => 0,
            Self::Deny => 1,
            Self::Pass => 2,
        });
    }
}

impl Canonical for Selector {
    fn encode(&self, to: &mut Encoder) {
        to.length(self.requirements.len());
        for requirement in &self.requirements {
            to.text(&requirement.key);
            match &requirement.operator {
                Operator::In(values) => {
                    to.tag(0);
                    to.list(values.iter());
                }
                Operator::NotIn(values) => {
                    to.tag(1);
                    to.list(values.iter());
                }
                Operator::Exists => to.tag(2),
                Operator::DoesNotExist => to.tag(3),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_a_content_never_changes() {
        assert_eq!(
            preferred(&ObjectName::new("shop", "deny-all")),
            2_031_637_417
        );
    }

    #[test]
    fn a_boundary_between_texts_is_part_of_the_content() {
        assert_ne!(
            preferred(&ObjectName::new("ab", "c")),
            preferred(&ObjectName::new("a", "bc"))
        );
    }
}
