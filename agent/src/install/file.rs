//! Files that are there completely or not at all: written beside, then renamed.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Puts `bytes` at `path` with this mode, in place of what was there. A reader sees the old file or the
/// new one; what a crash leaves beside it is overwritten next time.
///
/// # Errors
/// The folder cannot be written, or what was written does not read back as it should.
pub(super) fn put(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let part = beside(path)?;
    remove(&part)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&part)?;
    file.write_all(bytes)?;
    // The mode of an opened file is cut down by the umask.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()?;
    if fs::read(&part)? != bytes {
        return Err(io::Error::other(format!(
            "{} does not read back as it was written",
            part.display()
        )));
    }
    fs::rename(&part, path)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    File::open(folder)?.sync_all()
}

/// True if `path` is a file with these bytes and this mode.
///
/// # Errors
/// It is there and cannot be read.
pub(super) fn is(path: &Path, bytes: &[u8], mode: u32) -> io::Result<bool> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        found => found?,
    };
    Ok(found.is_file()
        && found.permissions().mode() & 0o7777 == mode
        && found.len() == bytes.len() as u64
        && fs::read(path)? == bytes)
}

/// Removes a file, and what a crash left beside it. False when there was none.
///
/// # Errors
/// It is there and cannot be removed.
pub(super) fn take(path: &Path) -> io::Result<bool> {
    remove(&beside(path)?)?;
    remove(path)
}

fn remove(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        other => other.map(|()| true),
    }
}

/// Hidden, and of a name that no runtime reads as a configuration or a plugin.
fn beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| io::Error::other("a path without the name of a file"))?;
    Ok(path.with_file_name(format!(".{name}.weir-part")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_put_whole_and_what_a_crash_left_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weir-cni");
        fs::write(beside(&path).unwrap(), "half").unwrap();
        assert!(!is(&path, b"whole", 0o755).unwrap());
        put(&path, b"whole", 0o755).unwrap();
        assert!(is(&path, b"whole", 0o755).unwrap());
        assert!(!is(&path, b"other", 0o755).unwrap());
        fs::set_permissions(&path, Permissions::from_mode(0o4755)).unwrap();
        assert!(!is(&path, b"whole", 0o755).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_reader_of_the_old_file_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weir-cni");
        put(&path, b"old", 0o755).unwrap();
        let mut reader = File::open(&path).unwrap();
        put(&path, b"new", 0o755).unwrap();
        let mut read = String::new();
        io::Read::read_to_string(&mut reader, &mut read).unwrap();
        assert_eq!(read, "old");
        assert!(take(&path).unwrap());
        assert!(!take(&path).unwrap());
    }
}
