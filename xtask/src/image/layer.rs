//! The image's one layer: a tar that is the same whenever its files are.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Context;
use tar::{Builder, EntryType, Header};

/// Read and run by everyone, written by nobody but root; never setuid.
const MODE: u32 = 0o755;
/// Read by everyone.
const TEXT_MODE: u32 = 0o644;

/// One file of the image.
pub(crate) struct File {
    /// Without a leading slash.
    path: String,
    bytes: Vec<u8>,
    mode: u32,
    privilege: Privilege,
}

/// What running a file gives to who is not root.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Privilege {
    None,
    /// CAP_NET_BIND_SERVICE, if the container may have it.
    BindPorts,
}

impl File {
    pub(crate) fn program(path: String, bytes: Vec<u8>, privilege: Privilege) -> Self {
        Self {
            path,
            bytes,
            mode: MODE,
            privilege,
        }
    }

    /// One that is there to be read.
    pub(crate) fn text(path: String, bytes: Vec<u8>) -> Self {
        Self {
            path,
            bytes,
            mode: TEXT_MODE,
            privilege: Privilege::None,
        }
    }
}

impl Privilege {
    /// The extended attribute `security.capability`: `struct vfs_cap_data` of revision 2
    /// (include/uapi/linux/capability.h), little endian.
    fn attribute(self) -> Option<[u8; 20]> {
        const REVISION_2_EFFECTIVE: u32 = 0x0200_0001;
        const NET_BIND_SERVICE: u32 = 1 << 10;
        let permitted = match self {
            Self::None => return None,
            Self::BindPorts => NET_BIND_SERVICE,
        };
        let mut attribute = [0; 20];
        attribute[..4].copy_from_slice(&REVISION_2_EFFECTIVE.to_le_bytes());
        attribute[4..8].copy_from_slice(&permitted.to_le_bytes());
        Some(attribute)
    }
}

/// An uncompressed tar of the files and the folders that they are in, in the order of their paths,
/// everything root's and of the same time.
pub(crate) fn pack(mut files: Vec<File>) -> anyhow::Result<Vec<u8>> {
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let folders: BTreeSet<_> = files
        .iter()
        .flat_map(|file| Path::new(&file.path).ancestors().skip(1))
        .filter(|folder| !folder.as_os_str().is_empty())
        .collect();
    let mut tar = Builder::new(Vec::new());
    for folder in folders {
        let mut header = header(EntryType::Directory, 0);
        // A folder's name ends with a slash in a tar.
        tar.append_data(&mut header, folder.join(""), &[][..])
            .with_context(|| format!("pack {}", folder.display()))?;
    }
    for file in &files {
        if let Some(attribute) = file.privilege.attribute() {
            let name = "SCHILY.xattr.security.capability";
            tar.append_pax_extensions([(name, attribute.as_slice())])?;
        }
        let mut header = header(EntryType::Regular, file.bytes.len() as u64);
        header.set_mode(file.mode);
        tar.append_data(&mut header, &file.path, file.bytes.as_slice())
            .with_context(|| format!("pack {}", file.path))?;
    }
    tar.into_inner().context("end the layer")
}

/// Of root, of 1970, and with all that differs between two machines left out.
pub(crate) fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(MODE);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn file(path: &str, privilege: Privilege) -> File {
        File::program(path.into(), path.as_bytes().to_vec(), privilege)
    }

    #[test]
    fn the_same_files_make_the_same_layer_in_any_order() {
        let one = || file("usr/bin/a", Privilege::None);
        let other = || file("lib/b", Privilege::BindPorts);
        assert_eq!(
            pack(vec![one(), other()]).unwrap(),
            pack(vec![other(), one()]).unwrap()
        );
    }

    #[test]
    fn everything_is_roots_and_only_the_server_may_bind_ports() {
        let files = vec![
            file("usr/bin/weir-dns", Privilege::BindPorts),
            file("usr/bin/weir", Privilege::None),
        ];
        let layer = pack(files).unwrap();
        let mut archive = tar::Archive::new(layer.as_slice());
        let mut seen = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let capability = entry
                .pax_extensions()
                .unwrap()
                .into_iter()
                .flatten()
                .map(|extension| extension.unwrap().value_bytes().to_vec())
                .next();
            let header = entry.header();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            assert_eq!(
                (header.mode().unwrap(), header.mtime().unwrap()),
                (0o755, 0)
            );
            let path = entry.path().unwrap().display().to_string();
            let mut content = String::new();
            entry.read_to_string(&mut content).unwrap();
            seen.push((path, content, capability));
        }
        let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        let folder = |path: &str| (path.to_owned(), String::new(), None);
        let program = |path: &str, capability| (path.to_owned(), path.to_owned(), capability);
        assert_eq!(
            seen,
            [
                folder("usr/"),
                folder("usr/bin/"),
                program("usr/bin/weir", None),
                program("usr/bin/weir-dns", Some(capability)),
            ]
        );
    }
}
