//! Files that are there completely or not at all, and folders that nobody else can look into. What is in
//! them is not here.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The mode of a folder that is its owner's alone.
const PRIVATE_FOLDER: u32 = 0o700;
/// The mode of a file that is its owner's alone.
pub const PRIVATE_FILE: u32 = 0o600;
const MODE: u32 = 0o7777;

/// Sees to it that the folder is there and its owner's alone, whoever made it and however open.
///
/// # Errors
/// It cannot be made, or it is not ours to close.
pub fn private_folder(path: &Path) -> io::Result<()> {
    let is_new = !path.is_dir();
    DirBuilder::new()
        .recursive(true)
        .mode(PRIVATE_FOLDER)
        .create(path)?;
    close(path, PRIVATE_FOLDER)?;
    if is_new {
        sync_folder(parent(path))?;
    }
    Ok(())
}

/// Opens a file for reading and writing, and sees to it that it is its owner's alone; an empty one if there was
/// none.
///
/// # Errors
/// It cannot be made, or it is not ours to close.
pub fn private_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(PRIVATE_FILE)
        .open(path)?;
    close(path, PRIVATE_FILE)?;
    Ok(file)
}

/// Gives what is there already this mode, unless it has it.
///
/// # Errors
/// It is not there, or not ours to close.
pub fn close(path: &Path, mode: u32) -> io::Result<()> {
    if fs::metadata(path)?.permissions().mode() & MODE == mode {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Puts what `write` writes at `path` with this mode, in place of what was there. A reader sees the old file or
/// the new one, also after a power loss; what a crash leaves beside it is overwritten next time.
///
/// # Errors
/// `write` failed, or the folder cannot be written: the old file stands.
pub fn replace(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let part = beside(path)?;
    unlink(&part)?;
    let put = || {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&part)?;
        write(&mut file)?;
        // The mode of an opened file is cut down by the umask.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    if let Err(error) = put() {
        // It may be the lack of space that made this fail.
        unlink(&part)?;
        return Err(error);
    }
    sync_folder(parent(path))
}

/// Removes a file, and what a crash left beside it. False when there was none.
///
/// # Errors
/// It is there and cannot be removed.
pub fn remove(path: &Path) -> io::Result<bool> {
    unlink(&beside(path)?)?;
    unlink(path)
}

/// Makes names that came to a folder, or went from it, outlive a power loss.
///
/// # Errors
/// The disk fails.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn unlink(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        other => other.map(|()| true),
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        // The parent of a bare name.
        Some(_) => Path::new("."),
        None => Path::new("/"),
    }
}

/// Hidden, and of a name that no container runtime reads as a configuration or a plugin.
fn beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| io::Error::other("a path without the name of a file"))?;
    Ok(path.with_file_name(format!(".{name}.weir-part")))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & MODE
    }

    fn names(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn a_folder_is_closed_whoever_made_it() {
        let root = tempfile::tempdir().unwrap();
        let fresh = root.path().join("lib/weir");
        private_folder(&fresh).unwrap();
        assert_eq!(mode(&fresh), 0o700);
        let open = root.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, Permissions::from_mode(0o755)).unwrap();
        private_folder(&open).unwrap();
        assert_eq!(mode(&open), 0o700);
        fs::write(open.join("file"), "").unwrap();
        private_folder(&open.join("file")).unwrap_err();
    }

    #[test]
    fn a_file_is_closed_and_keeps_what_is_in_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("leases");
        private_file(&path).unwrap().write_all(b"one").unwrap();
        assert_eq!(mode(&path), 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let mut kept = String::new();
        let mut file = private_file(&path).unwrap();
        file.read_to_string(&mut kept).unwrap();
        assert_eq!((kept.as_str(), mode(&path)), ("one", 0o600));
    }

    #[test]
    fn a_file_is_replaced_whole_and_what_a_crash_left_is_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("plugin");
        fs::write(beside(&path).unwrap(), "half").unwrap();
        replace(&path, 0o755, |file| file.write_all(b"old")).unwrap();
        assert_eq!(
            (fs::read(&path).unwrap().as_slice(), mode(&path)),
            (&b"old"[..], 0o755)
        );
        let mut reader = File::open(&path).unwrap();
        replace(&path, 0o600, |file| file.write_all(b"new")).unwrap();
        let mut read = String::new();
        reader.read_to_string(&mut read).unwrap();
        assert_eq!(read, "old", "a reader of the old file keeps it");
        assert_eq!(
            (fs::read(&path).unwrap().as_slice(), mode(&path)),
            (&b"new"[..], 0o600)
        );
        assert_eq!(names(root.path()), 1);
    }

    #[test]
    fn what_cannot_be_written_leaves_the_old_file_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("plugin");
        replace(&path, 0o600, |file| file.write_all(b"old")).unwrap();
        let error = replace(&path, 0o600, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("no space"))
        });
        assert_eq!(error.unwrap_err().to_string(), "no space");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(root.path()), 1);
    }

    #[test]
    fn what_is_removed_leaves_nothing_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("plugin");
        assert!(!remove(&path).unwrap());
        fs::write(&path, "").unwrap();
        fs::write(beside(&path).unwrap(), "half").unwrap();
        assert!(remove(&path).unwrap());
        assert_eq!(names(root.path()), 0);
    }
}
