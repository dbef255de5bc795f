//! What the tests of Weir share.

pub mod oracle;
