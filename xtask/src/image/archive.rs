//! The archive of an image: the OCI image layout (image-spec 1.1, image-layout.md) in a tar, with the
//! names that containerd looks for and the `manifest.json` that older `docker load` reads.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::{Context, bail};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType};

use super::layer::header;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// What goes into an archive.
pub(crate) struct Image {
    /// `[REGISTRY/]REPOSITORY:TAG`.
    pub(crate) name: String,
    pub(crate) version: String,
    /// As Go calls it.
    pub(crate) architecture: &'static str,
    /// An uncompressed tar.
    pub(crate) layer: Vec<u8>,
}

/// An archive, and the digest that the image is known by once it is loaded.
pub(crate) struct Packed {
    pub(crate) bytes: Vec<u8>,
    pub(crate) manifest: String,
}

/// The repository and the tag of an image's name.
///
/// # Errors
/// It has no tag, or characters that no name has.
pub(crate) fn split(name: &str) -> anyhow::Result<(&str, &str)> {
    let is_plain = |text: &str, more: &str| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || more.contains(c);
        !text.is_empty() && text.chars().all(is_plain)
    };
    match name.rsplit_once(':') {
        Some((repository, tag)) if is_plain(repository, "._-/:") && is_plain(tag, "._-") => {
            Ok((repository, tag))
        }
        _ => bail!("{name:?} is no name of an image: it is [REGISTRY/]REPOSITORY:TAG"),
    }
}

/// Makes the archive. The same image makes the same bytes.
pub(crate) fn pack(image: &Image) -> anyhow::Result<Packed> {
    let (_, tag) = split(&image.name)?;
    let layer = Blob::new(compress(&image.layer)?);
    let config = Blob::json(&json!({
        "architecture": image.architecture,
        "os": "linux",
        "config": {
            "Entrypoint": ["/usr/bin/weir-agent"],
            "Env": ["PATH=/usr/bin:/usr/sbin"],
            "WorkingDir": "/",
            "Labels": {
                "org.opencontainers.image.title": "Weir",
                "org.opencontainers.image.version": image.version,
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(&image.layer)]},
        "history": [{"created_by": "cargo xtask image"}],
    }));
    let manifest = Blob::json(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor(CONFIG),
        "layers": [layer.descriptor(LAYER)],
    }));
    let mut entry = manifest.descriptor(MANIFEST);
    entry["annotations"] = json!({
        "io.containerd.image.name": image.name,
        "org.opencontainers.image.ref.name": tag,
    });
    entry["platform"] = json!({"architecture": image.architecture, "os": "linux"});
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
    let docker = json!([{
        "Config": config.path(),
        "RepoTags": [image.name],
        "Layers": [layer.path()],
    }]);
    let layout = json!({"imageLayoutVersion": "1.0.0"});

    let mut tar = Builder::new(Vec::new());
    let mut add = |path: &str, bytes: &[u8]| {
        let mut header = header(EntryType::Regular, bytes.len() as u64);
        tar.append_data(&mut header, path, bytes)
            .with_context(|| format!("pack {path}"))
    };
    add("oci-layout", layout.to_string().as_bytes())?;
    add("index.json", index.to_string().as_bytes())?;
    add("manifest.json", docker.to_string().as_bytes())?;
    for blob in [&manifest, &config, &layer] {
        add(&blob.path(), &blob.bytes)?;
    }
    Ok(Packed {
        bytes: tar.into_inner().context("end the archive")?,
        manifest: manifest.digest,
    })
}

/// Something that is named by its digest.
struct Blob {
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            digest: digest(&bytes),
            bytes,
        }
    }

    fn json(value: &Value) -> Self {
        Self::new(value.to_string().into_bytes())
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest, "size": self.bytes.len()})
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }
}

fn digest(bytes: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        // Writing to a String cannot fail.
        write!(text, "{byte:02x}").ok();
    }
    text
}

fn compress(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    // Its header has neither a name nor a time.
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(bytes).context("compress the layer")?;
    gzip.finish().context("compress the layer")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use flate2::read::GzDecoder;

    use super::*;

    fn image() -> Image {
        Image {
            name: "weir.local/weir:1.2.3".into(),
            version: "1.2.3".into(),
            architecture: "amd64",
            layer: b"a layer".to_vec(),
        }
    }

    fn read(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(archive).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            files.insert(path, bytes);
        }
        files
    }

    /// The blob that a descriptor names; its size and its digest are those stated.
    fn follow(files: &BTreeMap<String, Vec<u8>>, descriptor: &Value) -> Vec<u8> {
        let stated = descriptor["digest"].as_str().unwrap();
        let blob = &files[&format!("blobs/{}", stated.replace(':', "/"))];
        assert_eq!(digest(blob), stated);
        assert_eq!(descriptor["size"], blob.len());
        blob.clone()
    }

    #[test]
    fn an_archive_leads_from_its_index_to_the_layer() {
        let packed = pack(&image()).unwrap();
        let files = read(&packed.bytes);
        let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        let index = parse(&files["index.json"]);
        let entry = &index["manifests"][0];
        assert_eq!(entry["digest"], packed.manifest);
        assert_eq!(
            entry["annotations"],
            json!({
                "io.containerd.image.name": "weir.local/weir:1.2.3",
                "org.opencontainers.image.ref.name": "1.2.3",
            })
        );
        let manifest = parse(&follow(&files, entry));
        let config = parse(&follow(&files, &manifest["config"]));
        let mut layer = Vec::new();
        let compressed = follow(&files, &manifest["layers"][0]);
        GzDecoder::new(compressed.as_slice())
            .read_to_end(&mut layer)
            .unwrap();
        assert_eq!(layer, image().layer);
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&layer));
        assert_eq!(config["config"]["Entrypoint"][0], "/usr/bin/weir-agent");
        let docker = parse(&files["manifest.json"]);
        assert!(files.contains_key(docker[0]["Layers"][0].as_str().unwrap()));
        assert!(files.contains_key(docker[0]["Config"].as_str().unwrap()));
        assert_eq!(files.len(), 6, "{:?}", files.keys());
    }

    #[test]
    fn the_same_image_is_the_same_archive() {
        assert_eq!(pack(&image()).unwrap().bytes, pack(&image()).unwrap().bytes);
        let mut other = image();
        other.layer.push(0);
        assert_ne!(
            pack(&image()).unwrap().manifest,
            pack(&other).unwrap().manifest
        );
    }

    #[test]
    fn a_name_has_a_repository_and_a_tag() {
        let cases = [
            ("weir:1", Some(("weir", "1"))),
            ("a.b:5000/weir:v1.0-x", Some(("a.b:5000/weir", "v1.0-x"))),
            ("weir", None),
            ("weir:", None),
            (":1", None),
            ("a:5000/weir", None),
            ("we ir:1", None),
        ];
        for (name, expected) in cases {
            assert_eq!(split(name).ok(), expected, "{name}");
        }
    }
}
