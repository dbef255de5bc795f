//! How a protocol stands in what is saved: by its number. `common` itself knows nothing of serde.

use serde::{Deserialize, Serialize};
use weir_common::Protocol;

/// For `#[serde(with = "…")]`: the number of IANA's registry.
#[derive(Deserialize, Serialize)]
#[serde(remote = "Protocol")]
pub(super) struct Number(pub(super) u8);
