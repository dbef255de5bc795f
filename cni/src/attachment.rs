//! An attachment: one interface of one container. Its checked names, and what is derived from them.
//! Nothing here touches the kernel.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest container id we take, in bytes. Runtimes use 64; a file name must hold it together
/// with an interface name.
pub const MAX_CONTAINER_ID: usize = 200;

/// The longest interface name, in bytes (`IFNAMSIZ` without the final zero).
pub const MAX_IFNAME: usize = 15;

/// What the names of our devices on the node begin with.
pub const DEVICE_PREFIX: &str = "weir";

/// Stands between the container id and the interface name where both are written as one string.
/// A container id cannot contain it.
const SEPARATOR: char = '@';

/// Container id and interface name: what the CNI specification tells attachments apart by.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Deserialize, Serialize)]
#[serde(try_from = "Unchecked")]
pub struct Attachment {
    container_id: String,
    ifname: String,
}

/// Why two strings are not an attachment.
#[derive(Clone, Debug, Eq, PartialEq, Error)]
pub enum InvalidAttachment {
    #[error(
        "the container id must begin with a letter or digit, hold only letters, digits, '_', '.' \
         and '-', and be at most {MAX_CONTAINER_ID} bytes long"
    )]
    ContainerId,
    #[error(
        "the interface name must be printable ASCII without '/', ':', '%' or blanks, not '.' or \
         '..', and at most {MAX_IFNAME} bytes long"
    )]
    Ifname,
    #[error("not a container id and an interface name with '{SEPARATOR}' between them")]
    Unseparated,
}

#[derive(Deserialize)]
struct Unchecked {
    container_id: String,
    ifname: String,
}

impl TryFrom<Unchecked> for Attachment {
    type Error = InvalidAttachment;

    fn try_from(unchecked: Unchecked) -> Result<Self, InvalidAttachment> {
        Self::new(unchecked.container_id, unchecked.ifname)
    }
}

impl Attachment {
    /// Checks both names. The specification rules the characters of the container id; the kernel's
    /// `dev_valid_name` rules those of the interface, and we refuse `%` too, which it expands.
    ///
    /// # Errors
    /// Which of the two is not usable.
    pub fn new(
        container_id: impl Into<String>,
        ifname: impl Into<String>,
    ) -> Result<Self, InvalidAttachment> {
        let (container_id, ifname) = (container_id.into(), ifname.into());
        let begins = container_id.starts_with(|c: char| c.is_ascii_alphanumeric());
        let in_set = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if !begins || !container_id.chars().all(in_set) || container_id.len() > MAX_CONTAINER_ID {
            return Err(InvalidAttachment::ContainerId);
        }
        let allowed = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
        if ifname.is_empty()
            || ifname.len() > MAX_IFNAME
            || matches!(ifname.as_str(), "." | "..")
            || !ifname.chars().all(allowed)
        {
            return Err(InvalidAttachment::Ifname);
        }
        Ok(Self {
            container_id,
            ifname,
        })
    }

    /// Reads what `Display` writes.
    ///
    /// # Errors
    /// When it is not two valid names with the separator between them.
    pub fn parse(text: &str) -> Result<Self, InvalidAttachment> {
        let (container_id, ifname) = text
            .split_once(SEPARATOR)
            .ok_or(InvalidAttachment::Unseparated)?;
        Self::new(container_id, ifname)
    }

    pub fn container_id(&self) -> &str {
        &self.container_id
    }

    /// The name of the interface inside the container.
    pub fn ifname(&self) -> &str {
        &self.ifname
    }

    /// The name of the node's end: the prefix and 40 bits of a hash. Whoever knows the attachment
    /// knows the device, so DEL needs no record of it.
    pub fn device(&self) -> String {
        let hash = fnv1a(self.to_string().as_bytes());
        format!(
            "{DEVICE_PREFIX}{:010x}",
            (hash ^ (hash >> 40)) & 0xff_ffff_ffff
        )
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{SEPARATOR}{}", self.container_id, self.ifname)
    }
}

/// Whether a device of the node carries a name that `Attachment::device` makes.
pub fn is_device(name: &str) -> bool {
    name.strip_prefix(DEVICE_PREFIX).is_some_and(|hex| {
        hex.len() == 10 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// FNV-1a, 64 bits. The result is a name, so it must never change.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_safe_names_make_an_attachment() {
        use InvalidAttachment::{ContainerId, Ifname};
        let long = "a".repeat(MAX_CONTAINER_ID);
        let too_long = "a".repeat(MAX_CONTAINER_ID + 1);
        let cases: &[(&str, &str, Option<InvalidAttachment>)] = &[
            ("c1", "eth0", None),
            ("0.a_b-c", "net-1.2", None),
            (&long, "123456789012345", None),
            ("", "eth0", Some(ContainerId)),
            ("../etc", "eth0", Some(ContainerId)),
            (".hidden", "eth0", Some(ContainerId)),
            ("a/b", "eth0", Some(ContainerId)),
            ("a b", "eth0", Some(ContainerId)),
            ("a@b", "eth0", Some(ContainerId)),
            ("é", "eth0", Some(ContainerId)),
            (&too_long, "eth0", Some(ContainerId)),
            ("c1", "", Some(Ifname)),
            ("c1", ".", Some(Ifname)),
            ("c1", "..", Some(Ifname)),
            ("c1", "a/b", Some(Ifname)),
            ("c1", "a:b", Some(Ifname)),
            ("c1", "a b", Some(Ifname)),
            ("c1", "eth%d", Some(Ifname)),
            ("c1", "a\u{7f}", Some(Ifname)),
            ("c1", "1234567890123456", Some(Ifname)),
        ];
        for (id, ifname, expected) in cases {
            assert_eq!(
                Attachment::new(*id, *ifname).err(),
                *expected,
                "{id:?} {ifname:?}"
            );
        }
    }

    #[test]
    fn a_frame_cannot_carry_an_unchecked_attachment() {
        let bad = r#"{"container_id":"../x","ifname":"eth0"}"#;
        assert!(serde_json::from_str::<Attachment>(bad).is_err());
    }

    #[test]
    fn the_device_of_an_attachment_never_changes() {
        let attachment = Attachment::new("c1", "eth0").unwrap();
        assert_eq!(attachment.device(), "weire6dbcac1b1");
    }

    #[test]
    fn only_our_devices_are_ours() {
        for (name, ours) in [
            ("weir0123456789", true),
            ("weirabcdefabcd", true),
            ("weirabcdefabc", false),
            ("weirABCDEFABCD", false),
            ("weir-node", false),
            ("eth0", false),
        ] {
            assert_eq!(is_device(name), ours, "{name}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(id in "[a-zA-Z0-9][a-zA-Z0-9_.-]{0,80}", ifname in "[!-~]{1,15}") {
            if let Ok(attachment) = Attachment::new(id, ifname) {
                prop_assert_eq!(Attachment::parse(&attachment.to_string()).unwrap(), attachment.clone());
                prop_assert!(is_device(&attachment.device()));
                prop_assert!(attachment.device().len() <= MAX_IFNAME);
            }
        }
    }
}
