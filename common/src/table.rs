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

/// Every table that is pinned.
pub const TABLES: &[Table] = &[
    Table {
        name: "FRONTENDS",
        version: 4 + OTHER,
        owner: Owner::Agent,
    },
    Table {
        name: "BACKENDS",
        version: 3,
        owner: Owner::Agent,
    },
    Table {
        name: "LIVE",
        version: 3,
        owner: Owner::Agent,
    },
    Table {
        name: "NODES",
        version: 1,
        owner: Owner::Agent,
    },
    Table {
        name: "AFFINITY",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "SOCKETS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "UNUSED_PORTS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "HOSTNET_PORTS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "DEVICES",
        version: 1 + OTHER,
        owner: Owner::Agent,
    },
    Table {
        name: "PODS",
        version: 1,
        owner: Owner::Agent,
    },
    Table {
        name: "CLASSES",
        version: 1,
        owner: Owner::Agent,
    },
    Table {
        name: "VERDICTS",
        version: 1 + OTHER,
        owner: Owner::Agent,
    },
    Table {
        name: "PORTS",
        version: 1,
        owner: Owner::Agent,
    },
    Table {
        name: "EPOCH",
        version: 1,
        owner: Owner::Agent,
    },
    Table {
        name: "TCP_WAYS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "OTHER_WAYS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "TCP_PLANS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "OTHER_PLANS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "CHOICES",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "SHARES",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "FRAGMENTS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "UPLINKS",
        version: 1,
        owner: Owner::Agent,
    },
    Table {
        name: "CLUSTER",
        version: 1,
        owner: Owner::Agent,
    },
    Table {
        name: "COUNTERS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "DROPS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "EVENTS",
        version: 1,
        owner: Owner::Kernel,
    },
    Table {
        name: "EVENT_LIMITS",
        version: 1,
        owner: Owner::Kernel,
    },
];

/// Index of the policy epoch in `EPOCH`, an array of one `u32`.
pub const EPOCH_INDEX: u32 = 0;

/// What the tests of upgrades add to the versions and the lengths of `FRONTENDS`, `DEVICES` and `VERDICTS`: 0 but
/// with the feature `other-layout`. Each of these rows is then four bytes longer.
pub(crate) const OTHER: u32 = if cfg!(feature = "other-layout") { 1 } else { 0 };
/// [`OTHER`] in bytes.
pub(crate) const OTHER_BYTES: usize = 4 * OTHER as usize;
