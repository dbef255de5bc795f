//! Files that are installed: put there as they should be, compared, taken away. How a file is put whole or
//! not at all is `weir_cni::durable`'s.

use std::fs;
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use weir_cni::durable;

/// Puts `bytes` at `path` with this mode, in place of what was there. A reader sees the old file or the
/// new one.
///
/// # Errors
/// The folder cannot be written, or what was written does not read back as it should.
pub(super) fn put(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    durable::replace(path, mode, |file| {
        file.write_all(bytes)?;
        file.rewind()?;
        let mut read = Vec::with_capacity(bytes.len());
        file.read_to_end(&mut read)?;
        if read != bytes {
            let path = path.display();
            return Err(io::Error::other(format!(
                "{path} does not read back as it was written"
            )));
        }
        Ok(())
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_with_these_bytes_and_this_mode_or_it_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weir-cni");
        assert!(!is(&path, b"whole", 0o755).unwrap());
        put(&path, b"whole", 0o755).unwrap();
        assert!(is(&path, b"whole", 0o755).unwrap());
        assert!(!is(&path, b"other", 0o755).unwrap());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
        assert!(!is(&path, b"whole", 0o755).unwrap());
    }
}
