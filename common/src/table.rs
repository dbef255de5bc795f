//! Every table by name, with the version of its layout. The version is part of the path under which the
//! table is pinned: another layout is another file, and the old one stays until the new one serves.
//!
//! Whoever raises a version also raises those of the tables whose rows point into that one, because programs
//! of the version before go on reading theirs meanwhile: `FRONTENDS` with `BACKENDS`, both with `LIVE`. What remembers
//! backends by number (ways and plans, `SOCKETS`, `AFFINITY`) does not count: it checks what it remembers. Numbers of
//! policy stand for the same content in every version; who changes how they are made raises `DEVICES`, `CLASSES`,
//! `VERDICTS` and `PORTS` together.

/// A pinned table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Table {
    /// The name in the BPF object, at most 15 characters as the kernel keeps it.
    pub name: &'static str,
    /// Raised whenever key, value, type, flags or meaning changes. See above for what is raised with it.
    pub version: u32,
    pub owner: Owner,
}

/// Who writes a table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Owner {
    /// Filled from what should be, and reconciled.
    Agent,
    /// Filled by programs; the agent only reads and sweeps.
    Kernel,
}

const _: () = {
    let mut at = 0;
    while at < TABLES.len() {
        assert!(TABLES[at].name.len() <= 15);
        at += 1;
    }
};

const fn agent(name: &'static str, version: u32) -> Table {
    let owner = Owner::Agent;
    Table {
        name,
        version,
        owner,
    }
}

const fn kernel(name: &'static str, version: u32) -> Table {
    let owner = Owner::Kernel;
    Table {
        name,
        version,
        owner,
    }
}

/// Every table that is pinned.
pub const TABLES: &[Table] = &[
    agent("FRONTENDS", 4 + OTHER),
    agent("BACKENDS", 3),
    agent("LIVE", 3),
    agent("NODES", 1),
    kernel("AFFINITY", 1),
    kernel("SOCKETS", 1),
    kernel("CONNECTED", 1),
    kernel("UNUSED_PORTS", 1),
    kernel("HOSTNET_PORTS", 1),
    agent("DEVICES", 1 + OTHER),
    agent("PODS", 1),
    agent("CLASSES", 1),
    agent("CIDRS", 1),
    agent("VERDICTS", 3 + OTHER),
    agent("PORTS", 2),
    agent("EPOCH", 1),
    kernel("TCP_WAYS", 1),
    kernel("OTHER_WAYS", 1),
    kernel("TCP_PLANS", 1),
    kernel("OTHER_PLANS", 1),
    kernel("CHOICES", 1),
    kernel("SHARES", 1),
    kernel("FRAGMENTS", 1),
    agent("UPLINKS", 1),
    agent("CLUSTER", 1),
    kernel("COUNTERS", 1),
    kernel("DROPS", 1),
    kernel("EVENTS", 1),
    kernel("EVENT_LIMITS", 1),
];

/// Index of the policy epoch in `EPOCH`, an array of one `u32`.
pub const EPOCH_INDEX: u32 = 0;

/// What the tests of upgrades add to the versions and the lengths of `FRONTENDS`, `DEVICES` and `VERDICTS`: 0 but
/// with the feature `other-layout`. Each of these rows is then four bytes longer.
pub(crate) const OTHER: u32 = if cfg!(feature = "other-layout") { 1 } else { 0 };
/// [`OTHER`] in bytes.
pub(crate) const OTHER_BYTES: usize = 4 * OTHER as usize;
