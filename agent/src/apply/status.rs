//! How far each object has come on its way to the kernel, and how full the tables are.

use std::collections::BTreeMap;

use crate::model::ObjectName;

/// How far an object is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Status {
    /// Not written yet; the next pass will.
    Pending,
    /// The kernel holds it as it should be.
    Done,
    /// It could not be written: what the kernel held of it before still holds.
    Failed(String),
}

impl Status {
    /// Why it could not be written.
    pub fn failure(&self) -> Option<&str> {
        match self {
            Self::Failed(why) => Some(why),
            Self::Pending | Self::Done => None,
        }
    }
}

/// The status of every object of a kind.
pub type Statuses<N = ObjectName> = BTreeMap<N, Status>;

/// How full a table is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fill {
    pub table: &'static str,
    pub rows: usize,
    pub capacity: usize,
}

impl Fill {
    /// From 0 to 1.
    pub fn ratio(&self) -> f64 {
        self.rows as f64 / self.capacity.max(1) as f64
    }
}

/// May rows be taken out? Not before every input is synced: what has not been said yet is not absent.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Deletes {
    #[default]
    Held,
    Allowed,
}

/// Where a table comes from.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Origin {
    /// What an earlier process wrote may be in it.
    #[default]
    Kept,
    /// This start has made it: there was none of its layout.
    Made,
}
