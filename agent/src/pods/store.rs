//! The leases on disk: one redb file, each change one durable transaction. What a lease means, and
//! which address is next, is not here.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use redb::{
    CommitError, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError,
    TableDefinition, TableError, TransactionError,
};
use thiserror::Error;
use weir_cni::attachment::Attachment;
use weir_cni::durable::{PRIVATE_FILE, close, private_file, private_folder, sync_folder};

use super::Lease;

/// `format` is the version of everything below.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const FORMAT: u64 = 1;
/// The attachment as text, and the lease as JSON.
const LEASES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("leases");
/// The addresses that are free again, in the order in which they were freed.
const FREED: TableDefinition<'_, u64, &str> = TableDefinition::new("freed");
/// The pod CIDRs that were last served, when the cluster said them. Absent before the first.
const RANGES: TableDefinition<'_, u64, &str> = TableDefinition::new("ranges");

/// Why leases cannot be read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Nothing may be leased from it. Existing pods are not affected.
    #[error(
        "the lease store {path} is damaged ({why}): no address is handed out, so that none is used \
         twice. Drain this node, move the file away, start the agent again, and uncordon the node"
    )]
    Damaged { path: PathBuf, why: String },
    #[error("the lease store {path} is in use by another agent; stop it first")]
    Busy { path: PathBuf },
    /// It may work later: the disk is full, or not there.
    #[error("the lease store {path}: {why}")]
    Unavailable { path: PathBuf, why: String },
}

/// One step of a transaction.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Lease(Arc<Lease>),
    Release(Attachment),
    Free {
        order: u64,
        address: IpAddr,
    },
    /// The address of this order is in use again, or too old to remember.
    Forget {
        order: u64,
    },
    /// These pod CIDRs are served, and no other.
    Serve(Vec<IpNet>),
}

/// Everything that is on disk.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Contents {
    pub(super) leases: Vec<Lease>,
    pub(super) freed: Vec<(u64, IpAddr)>,
    pub(super) ranges: Vec<IpNet>,
}

#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    /// `None` after a failed write: redb then wants to be opened anew.
    db: Option<Database>,
}

impl Store {
    /// Opens the store at `path`, or makes an empty one when there is no file.
    pub(super) fn open(path: &Path) -> Result<(Self, Contents), StoreError> {
        if let Some(dir) = path.parent() {
            private_folder(dir).map_err(|e| unavailable(path, e))?;
        }
        if !path.try_exists().map_err(|e| unavailable(path, e))? {
            create(path)?;
        }
        let db = open(path)?;
        let contents = read(&db).map_err(|why| why.at(path))?;
        let store = Self {
            path: path.into(),
            db: Some(db),
        };
        Ok((store, contents))
    }

    /// Makes all changes durable, or says that this is not known. After a failure the file may
    /// hold them or not: the next write must be a `rewrite`.
    pub(super) fn write(
        &mut self,
        changes: impl IntoIterator<Item = Change>,
    ) -> Result<(), StoreError> {
        self.commit(changes, Keep::Everything)
    }

    /// As `write`, onto nothing.
    pub(super) fn rewrite(
        &mut self,
        changes: impl IntoIterator<Item = Change>,
    ) -> Result<(), StoreError> {
        self.commit(changes, Keep::Nothing)
    }

    fn commit(
        &mut self,
        changes: impl IntoIterator<Item = Change>,
        keep: Keep,
    ) -> Result<(), StoreError> {
        let db = match &mut self.db {
            Some(db) => db,
            closed => closed.insert(open(&self.path)?),
        };
        commit(db, changes, keep).map_err(|why| {
            self.db = None;
            why.at(&self.path)
        })
    }
}

/// What of the earlier contents a transaction keeps.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Keep {
    Everything,
    Nothing,
}

/// A failure that does not know its file yet.
#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Redb(#[from] redb::Error),
    #[error("{0}")]
    Contents(String),
}

macro_rules! from_redb {
    ($($error:ty),*) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::Redb(error.into())
            }
        })*
    };
}
from_redb!(
    CommitError,
    DatabaseError,
    StorageError,
    TableError,
    TransactionError
);

impl Failure {
    fn at(self, path: &Path) -> StoreError {
        match self {
            Self::Redb(redb::Error::DatabaseAlreadyOpen) => StoreError::Busy { path: path.into() },
            // What redb says about a file that is too short.
            Self::Redb(redb::Error::Io(error))
                if !matches!(
                    error.kind(),
                    io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
                ) =>
            {
                unavailable(path, error)
            }
            Self::Redb(redb::Error::PreviousIo) => unavailable(path, "an earlier write failed"),
            damaged => StoreError::Damaged {
                path: path.into(),
                why: damaged.to_string(),
            },
        }
    }
}

fn unavailable(path: &Path, why: impl ToString) -> StoreError {
    StoreError::Unavailable {
        path: path.into(),
        why: why.to_string(),
    }
}

/// A store that exists under its name is complete: it gets the name last.
fn create(path: &Path) -> Result<(), StoreError> {
    let new = path.with_extension("new");
    let made = || -> Result<(), Failure> {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StorageError::from(error).into());
            }
            _ => {}
        }
        let file = private_file(&new).map_err(StorageError::from)?;
        let db = Database::builder().create_file(file)?;
        commit(&db, [], Keep::Nothing)?;
        fs::rename(&new, path).map_err(StorageError::from)?;
        if let Some(dir) = path.parent() {
            sync_folder(dir).map_err(StorageError::from)?;
        }
        Ok(())
    };
    made().map_err(|why| why.at(path))
}

fn open(path: &Path) -> Result<Database, StoreError> {
    let opened = || -> Result<Database, Failure> {
        // An earlier agent left it open to others.
        close(path, PRIVATE_FILE).map_err(StorageError::from)?;
        // A transaction that ended is whole (see `commit`), so anything to repair is damage.
        let mut db = Database::open(path)?;
        if !db.check_integrity()? {
            return Err(Failure::Contents("checksums do not match".into()));
        }
        Ok(db)
    };
    opened().map_err(|why| why.at(path))
}

fn commit(
    db: &Database,
    changes: impl IntoIterator<Item = Change>,
    keep: Keep,
) -> Result<(), Failure> {
    let mut transaction = db.begin_write()?;
    // With one phase, redb cannot tell a damaged last transaction from an unfinished one and would
    // silently go back to the one before, whose leases are not all.
    transaction.set_two_phase_commit(true);
    {
        if keep == Keep::Nothing {
            transaction.delete_table(LEASES)?;
            transaction.delete_table(FREED)?;
            transaction.open_table(META)?.insert("format", FORMAT)?;
        }
        let mut leases = transaction.open_table(LEASES)?;
        let mut freed = transaction.open_table(FREED)?;
        for change in changes {
            match change {
                Change::Lease(lease) => {
                    let record = serde_json::to_vec(&*lease)
                        .map_err(|error| Failure::Contents(error.to_string()))?;
                    leases.insert(lease.attachment.to_string().as_str(), record.as_slice())?;
                }
                Change::Release(attachment) => {
                    leases.remove(attachment.to_string().as_str())?;
                }
                Change::Free { order, address } => {
                    freed.insert(order, address.to_string().as_str())?;
                }
                Change::Forget { order } => {
                    freed.remove(order)?;
                }
                Change::Serve(ranges) => {
                    transaction.delete_table(RANGES)?;
                    let mut table = transaction.open_table(RANGES)?;
                    for (i, range) in (0..).zip(&ranges) {
                        table.insert(i, range.to_string().as_str())?;
                    }
                }
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

fn read(db: &Database) -> Result<Contents, Failure> {
    let transaction = db.begin_read()?;
    let format = transaction
        .open_table(META)?
        .get("format")?
        .map(|it| it.value());
    if format != Some(FORMAT) {
        return Err(Failure::Contents(format!(
            "its format is {format:?}, this agent reads {FORMAT}"
        )));
    }
    let mut contents = Contents::default();
    let mut addresses = HashSet::new();
    for entry in transaction.open_table(LEASES)?.iter()? {
        let (key, record) = entry?;
        let lease: Lease = serde_json::from_slice(record.value())
            .map_err(|error| Failure::Contents(format!("lease {}: {error}", key.value())))?;
        if lease.attachment.to_string() != key.value() {
            return Err(Failure::Contents(format!(
                "lease {} is filed as {}",
                lease.attachment,
                key.value()
            )));
        }
        for address in &lease.addresses {
            if !addresses.insert(*address) {
                return Err(Failure::Contents(format!("{address} is leased twice")));
            }
        }
        contents.leases.push(lease);
    }
    for entry in transaction.open_table(FREED)?.iter()? {
        let (order, address) = entry?;
        let address = address
            .value()
            .parse()
            .map_err(|error| Failure::Contents(format!("freed {}: {error}", address.value())))?;
        contents.freed.push((order.value(), address));
    }
    match transaction.open_table(RANGES) {
        Err(TableError::TableDoesNotExist(_)) => {}
        table => {
            for entry in table?.iter()? {
                let (_, range) = entry?;
                let parsed = range.value().parse();
                contents.ranges.push(parsed.map_err(|error| {
                    Failure::Contents(format!("range {}: {error}", range.value()))
                })?);
            }
        }
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_leases_are_nobody_elses_whoever_made_their_folder() {
        let node = tempfile::tempdir().unwrap();
        let folder = node.path().join("weir");
        let path = folder.join("leases.redb");
        let set = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        // As kubelet makes the folder of a volume.
        fs::create_dir(&folder).unwrap();
        set(&folder, 0o755);
        drop(Store::open(&path).unwrap());
        assert_eq!((mode(&folder), mode(&path)), (0o700, 0o600));
        // As an earlier agent left both.
        set(&folder, 0o755);
        set(&path, 0o644);
        drop(Store::open(&path).unwrap());
        assert_eq!((mode(&folder), mode(&path)), (0o700, 0o600));
    }
}
