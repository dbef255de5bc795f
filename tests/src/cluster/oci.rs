//! An archive of container images in the OCI image layout, written without a container engine: layers
//! that images share are in it once. <https://github.com/opencontainers/image-spec>

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// An archive being written.
pub(super) struct Archive {
    tar: Builder<File>,
    written: BTreeSet<String>,
    manifests: Vec<Value>,
}

/// How an image runs, besides its files.
#[derive(Debug, Clone, Default)]
pub(super) struct Running<'a> {
    pub(super) entrypoint: &'a [&'a str],
    pub(super) command: &'a [&'a str],
    /// `uid:gid`, or empty for root.
    pub(super) user: &'a str,
}

/// A layer in the archive.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    digest: String,
    size: u64,
}

/// The files of a layer to be: an uncompressed tar in memory.
pub(super) struct Files(Builder<Vec<u8>>);

impl Archive {
    /// # Errors
    /// The file cannot be created.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self {
            tar: Builder::new(file),
            written: BTreeSet::new(),
            manifests: Vec::new(),
        })
    }

    /// A layer from an uncompressed tar on disk.
    ///
    /// # Errors
    /// It cannot be read, or the archive not be written.
    pub(super) fn layer_from(&mut self, path: &Path) -> Result<Layer> {
        let open = || File::open(path).with_context(|| format!("open {}", path.display()));
        let mut hash = Sha256::new();
        let mut file = BufReader::with_capacity(1 << 16, open()?);
        let mut size = 0;
        loop {
            let piece = file.fill_buf()?;
            if piece.is_empty() {
                break;
            }
            hash.update(piece);
            let length = piece.len();
            file.consume(length);
            size += length as u64;
        }
        self.blob(hex(&hash.finalize()), size, open()?)
    }

    /// # Errors
    /// The archive cannot be written.
    pub(super) fn layer(&mut self, files: Files) -> Result<Layer> {
        let bytes = files.0.into_inner()?;
        self.bytes(&bytes)
    }

    /// An image of these layers, the lowest first, under each of these names.
    ///
    /// # Errors
    /// The archive cannot be written.
    pub(super) fn image(
        &mut self,
        names: &[&str],
        layers: &[&Layer],
        running: &Running<'_>,
    ) -> Result<()> {
        let mut how = json!({
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "WorkingDir": "/",
            "User": running.user,
        });
        if !running.entrypoint.is_empty() {
            how["Entrypoint"] = json!(running.entrypoint);
        }
        if !running.command.is_empty() {
            how["Cmd"] = json!(running.command);
        }
        let diffs: Vec<_> = layers.iter().map(|l| &l.digest).collect();
        let config = json!({
            "architecture": ARCHITECTURE,
            "os": "linux",
            "config": how,
            "rootfs": { "type": "layers", "diff_ids": diffs },
        });
        let config = self.bytes(&serde_json::to_vec(&config)?)?;
        let of = |kind: &str, layer: &Layer| {
            json!({
                "mediaType": format!("application/vnd.oci.image.{kind}"),
                "digest": layer.digest,
                "size": layer.size,
            })
        };
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": of("config.v1+json", &config),
            "layers": layers.iter().map(|l| of("layer.v1.tar", l)).collect::<Vec<_>>(),
        });
        let manifest = self.bytes(&serde_json::to_vec(&manifest)?)?;
        for name in names {
            let mut entry = of("manifest.v1+json", &manifest);
            entry["platform"] = json!({ "architecture": ARCHITECTURE, "os": "linux" });
            // containerd's own key, for a name that is more than a tag.
            entry["annotations"] = json!({ "io.containerd.image.name": name });
            self.manifests.push(entry);
        }
        Ok(())
    }

    /// Writes the index: without it there is no image in the archive.
    ///
    /// # Errors
    /// The archive cannot be written.
    pub(super) fn finish(mut self) -> Result<()> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": self.manifests,
        });
        let layout = json!({ "imageLayoutVersion": "1.0.0" });
        for (name, content) in [("index.json", index), ("oci-layout", layout)] {
            let bytes = serde_json::to_vec(&content)?;
            append(
                &mut self.tar,
                name,
                0o644,
                bytes.len() as u64,
                bytes.as_slice(),
            )?;
        }
        self.tar
            .into_inner()?
            .sync_all()
            .context("write the archive")
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<Layer> {
        self.blob(hex(&Sha256::digest(bytes)), bytes.len() as u64, bytes)
    }

    fn blob(&mut self, hash: String, size: u64, content: impl Read) -> Result<Layer> {
        if self.written.insert(hash.clone()) {
            append(
                &mut self.tar,
                &format!("blobs/sha256/{hash}"),
                0o644,
                size,
                content,
            )?;
        }
        Ok(Layer {
            digest: format!("sha256:{hash}"),
            size,
        })
    }
}

impl Files {
    #[must_use]
    pub(super) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// # Errors
    /// The path is no relative path.
    pub(super) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        append(&mut self.0, path, mode, content.len() as u64, content)
    }

    /// A file of this machine.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn copy(&mut self, from: &Path, path: &str, mode: u32) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("read {}", from.display()))?;
        self.file(path, mode, &content)
    }

    /// # Errors
    /// The path is no relative path.
    pub(super) fn folder(&mut self, path: &str, mode: u32) -> Result<()> {
        let mut header = header(mode, 0);
        header.set_entry_type(EntryType::Directory);
        self.0.append_data(&mut header, path, io::empty())?;
        Ok(())
    }

    /// # Errors
    /// The path is no relative path.
    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = header(0o777, 0);
        header.set_entry_type(EntryType::Symlink);
        self.0.append_link(&mut header, path, target)?;
        Ok(())
    }
}

impl Default for Files {
    fn default() -> Self {
        Self::new()
    }
}

const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") {
    "arm64"
} else {
    "amd64"
};

fn append<W: io::Write>(
    tar: &mut Builder<W>,
    path: &str,
    mode: u32,
    size: u64,
    content: impl Read,
) -> Result<()> {
    tar.append_data(&mut header(mode, size), path, content)
        .with_context(|| format!("write {path}"))
}

/// Of root, from 1970: the same files make the same layer.
fn header(mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_images_share_is_in_the_archive_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.tar");
        let mut archive = Archive::create(&path).unwrap();
        let files = |name| {
            let mut files = Files::new();
            files.file(name, 0o644, b"content").unwrap();
            files
        };
        let base = archive.layer(files("base")).unwrap();
        let again = archive.layer(files("base")).unwrap();
        let top = archive.layer(files("top")).unwrap();
        let running = Running::default();
        archive
            .image(&["a/b:1", "a/b:2"], &[&base], &running)
            .unwrap();
        archive
            .image(&["c/d:1"], &[&again, &top], &running)
            .unwrap();
        archive.finish().unwrap();

        let mut tar = tar::Archive::new(File::open(&path).unwrap());
        let names: Vec<String> = tar
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        // Two layers, two configurations, two manifests, the index and the mark.
        assert_eq!(names.len(), 8, "{names:?}");
        assert_eq!(base.digest, again.digest);
    }
}
