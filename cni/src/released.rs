//! Releases left on disk: when the agent does not answer, DEL writes one, and the agent itself does until its record of
//! leases is on disk. It takes them in when it starts, every minute, when the runtime asks for STATUS or GC, before it
//! leases anything to the same attachment, and before it says that no address is free.
//!
//! A release is an empty file; its name is the attachment. Creating a name is atomic, so there is
//! no half-written release.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use crate::attachment::Attachment;
use crate::durable::{private_file, private_folder, sync_folder};

/// Writes a release durably. Writing it twice is writing it once.
///
/// # Errors
/// When it may not survive a power loss; the caller must not say that the address is free.
pub fn write(dir: &Path, attachment: &Attachment) -> io::Result<()> {
    private_folder(dir)?;
    private_file(&dir.join(attachment.to_string()))?.sync_all()?;
    sync_folder(dir)
}

/// Writes a release that outlives whoever writes it, and not a power loss, which ends all pods. Writing it twice is
/// writing it once.
///
/// # Errors
/// It is not there.
pub fn note(dir: &Path, attachment: &Attachment) -> io::Result<()> {
    let path = dir.join(attachment.to_string());
    match private_file(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            private_folder(dir)?;
            private_file(&path)?;
        }
        noted => drop(noted?),
    }
    Ok(())
}

/// The reverse of [`note`]. One that is already gone is no error.
///
/// # Errors
/// It is still there.
pub fn forget(dir: &Path, attachment: &Attachment) -> io::Result<()> {
    match fs::remove_file(dir.join(attachment.to_string())) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        forgotten => forgotten,
    }
}

/// The releases in `dir`, in no particular order; none when it does not exist. Files with other
/// names are not ours and stay.
///
/// # Errors
/// When the directory cannot be read.
pub fn list(dir: &Path) -> io::Result<Vec<Attachment>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        if let Some(name) = entry?.file_name().to_str()
            && let Ok(attachment) = Attachment::parse(name)
        {
            found.push(attachment);
        }
    }
    Ok(found)
}

/// Removes releases whose effect is durable elsewhere. One that is already gone is no error.
///
/// # Errors
/// When one may still be there after a power loss.
pub fn remove<'a>(
    dir: &Path,
    attachments: impl IntoIterator<Item = &'a Attachment>,
) -> io::Result<()> {
    let mut removed = 0;
    for attachment in attachments {
        match fs::remove_file(dir.join(attachment.to_string())) {
            Ok(()) => removed += 1,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    if removed == 0 {
        Ok(())
    } else {
        sync_folder(dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_found_once_and_then_gone() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("released");
        assert_eq!(list(&dir).unwrap(), []);

        // Joined by '_' these two would be one file.
        let one = Attachment::new("a_b", "c").unwrap();
        let two = Attachment::new("a", "b_c").unwrap();
        write(&dir, &one).unwrap();
        write(&dir, &one).unwrap();
        write(&dir, &two).unwrap();
        fs::write(dir.join("README"), "not ours").unwrap();
        let mut found = list(&dir).unwrap();
        found.sort();
        assert_eq!(found, [two.clone(), one.clone()]);

        let noted = Attachment::new("noted", "eth0").unwrap();
        note(&dir, &noted).unwrap();
        note(&dir, &noted).unwrap();
        assert!(list(&dir).unwrap().contains(&noted));
        forget(&dir, &noted).unwrap();
        forget(&dir, &noted).unwrap();
        assert!(!list(&dir).unwrap().contains(&noted));

        remove(&dir, [&one, &two]).unwrap();
        remove(&dir, [&one]).unwrap();
        assert_eq!(list(&dir).unwrap(), []);
        assert!(dir.join("README").exists());
    }
}
