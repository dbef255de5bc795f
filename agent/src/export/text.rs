//! The older format of Prometheus (text, version 0.0.4), from the page in OpenMetrics: for whoever does
//! not ask for the newer, such as curl and `promtool check metrics`.

use std::collections::BTreeSet;

/// The same samples. OpenMetrics names a counter without `_total` where it is described and with it
/// where it is sampled; the older format has one name for both, and knows neither units nor an end.
pub fn text_of(page: &str) -> String {
    let described = |line: &str, what: &str| {
        let rest = line.strip_prefix(what)?;
        let (name, rest) = rest.split_once(' ')?;
        Some((name.to_owned(), rest.to_owned()))
    };
    let counters: BTreeSet<String> = page
        .lines()
        .filter_map(|line| described(line, "# TYPE "))
        .filter(|(_, kind)| kind == "counter")
        .map(|(name, _)| name)
        .collect();
    let mut text = String::with_capacity(page.len());
    for line in page.lines() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        let of_counter = ["# HELP ", "# TYPE "].iter().find_map(|what| {
            let (name, rest) = described(line, what)?;
            counters
                .contains(&name)
                .then(|| format!("{what}{name}_total {rest}"))
        });
        text.push_str(of_counter.as_deref().unwrap_or(line));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_has_one_name_and_all_else_stays() {
        let page = "# HELP weir_drops Packets dropped.\n# TYPE weir_drops counter\n\
                    weir_drops_total{reason=\"no_lease\"} 3\n# HELP weir_pods Pods.\n\
                    # TYPE weir_pods gauge\n# UNIT weir_pods pods\nweir_pods 2\n# EOF\n";
        let text = "# HELP weir_drops_total Packets dropped.\n# TYPE weir_drops_total counter\n\
                    weir_drops_total{reason=\"no_lease\"} 3\n# HELP weir_pods Pods.\n\
                    # TYPE weir_pods gauge\nweir_pods 2\n";
        assert_eq!(text_of(page), text);
    }
}
