//! Ranges of addresses as the tries of the kernel key them.

use ipnet::IpNet;
use weir_common::Prefix;

/// The key of a range.
pub(super) fn prefix(range: &IpNet) -> Prefix {
    let extra = match range {
        IpNet::V4(_) => Prefix::V4_EXTRA,
        IpNet::V6(_) => 0,
    };
    Prefix {
        prefix_len: extra + u32::from(range.prefix_len()),
        addr: range.network().into(),
    }
}
