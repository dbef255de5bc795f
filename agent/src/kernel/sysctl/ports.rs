//! Lists of ports as the kernel writes them: `8080,9000-9100`, in order, none twice.

use std::num::ParseIntError;

use weir_common::nat::PortRange;

/// A list with these ports, too.
pub(super) fn with(list: &str, ports: PortRange) -> Result<String, ParseIntError> {
    let mut ranges = vec![(ports.first, ports.last)];
    for range in list.split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        ranges.push((first.trim().parse()?, last.trim().parse()?));
    }
    ranges.sort_unstable();
    let mut apart: Vec<(u16, u16)> = Vec::new();
    for (first, last) in ranges {
        match apart.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => apart.push((first, last)),
        }
    }
    let written = apart.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    Ok(written.collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_written_as_the_kernel_writes_them() {
        let (first, last) = (20_000, 20_009);
        for (list, expected) in [
            ("", "20000-20009"),
            ("8080", "8080,20000-20009"),
            ("30000-30001,80", "80,20000-20009,30000-30001"),
            ("19990-19999", "19990-20009"),
            ("20010", "20000-20010"),
            ("1-65535", "1-65535"),
            ("20003-20030,65535", "20000-20030,65535"),
        ] {
            assert_eq!(with(list, PortRange { first, last }).unwrap(), expected);
        }
        for list in ["x", "1-", "-", "70000"] {
            with(list, PortRange { first, last }).unwrap_err();
        }
    }
}
