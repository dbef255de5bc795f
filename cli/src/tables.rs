//! Human tables of the views.

use std::net::SocketAddr;

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use weir_cli::views::{
    DropView, Drops, EndpointView, FlowEnd, FlowView, PolicyView, ServiceView, Status, Verify,
};

pub(crate) fn status(status: &Status) -> String {
    let mut out = format!(
        "node {}  weir {}  up {}",
        status.node,
        status.version,
        age(status.uptime_seconds)
    );
    match status.restarts {
        0 => {}
        1 => out.push_str(", killed and started again once"),
        times => out.push_str(&format!(", killed and started again {times} times")),
    }
    out.push('\n');
    if status.not_ready.is_empty() {
        out.push_str("ready\n");
    }
    for reason in &status.not_ready {
        out.push_str(&format!("NOT READY: {reason}\n"));
    }
    out.push_str(&format!(
        "{} nodes, {} pods, {} services, {} policies\n",
        status.nodes.known, status.pods, status.services, status.policies
    ));
    out.push('\n');
    let mut inputs = table(&["INPUT", "OBJECTS", "STATE"]);
    for input in &status.inputs {
        let state = match (&input.problem, input.synced) {
            (Some(problem), _) => problem.as_str(),
            (None, true) => "synced",
            (None, false) => "waiting for the first list",
        };
        inputs.add_row([input.kind.as_str(), &input.objects.to_string(), state]);
    }
    out.push_str(&format!("{inputs}\n\n"));
    let mut tables = table(&["TABLE", "ROWS", "CAPACITY", "FULL", "PROBLEM"]);
    for t in &status.tables {
        let percent = 100.0 * t.rows as f64 / t.capacity.max(1) as f64;
        tables.add_row([
            t.table.as_str(),
            &t.rows.to_string(),
            &t.capacity.to_string(),
            &format!("{percent:.1} %"),
            t.problem.as_deref().unwrap_or(""),
        ]);
    }
    out.push_str(&format!("{tables}\n\n"));
    if let Some(nat) = status.nat.as_ref().filter(|nat| !nat.peers.is_empty()) {
        let mut peers = table(&[
            "NAT PORTS TOWARDS",
            "PROTO",
            "PORTS",
            "FULL",
            "MOST BY",
            "PORTS",
        ]);
        for it in &nat.peers {
            let percent = 100.0 * it.ports as f64 / nat.capacity.max(1) as f64;
            peers.add_row([
                end(&it.peer).as_str(),
                &it.protocol,
                &it.ports.to_string(),
                &format!("{percent:.1} %"),
                it.pod.as_deref().unwrap_or(""),
                &it.pod_ports.to_string(),
            ]);
        }
        out.push_str(&format!("{peers}\n\n"));
    }
    let mut programs = table(&["PROGRAM", "ID", "HOOKS", "VERIFIED INSTRUCTIONS"]);
    for p in &status.programs {
        programs.add_row([
            p.name.as_str(),
            &p.id.to_string(),
            &p.hooks.to_string(),
            &p.verified_instructions
                .map_or_else(|| "unknown".into(), |n| n.to_string()),
        ]);
    }
    out.push_str(&format!("{programs}\n"));
    for c in &status.conditions {
        let effect = match &c.effect {
            Some(effect) => format!(" ({effect})"),
            None => String::new(),
        };
        out.push_str(&format!(
            "\n{} {}{effect}, since {}: {}\n    {}",
            c.fault, c.about, c.since, c.text, c.remedy
        ));
    }
    out
}

pub(crate) fn services(rows: &[ServiceView]) -> String {
    let mut out = table(&[
        "SERVICE", "KIND", "CLIENTS", "ADDRESS", "PROTO", "BACKENDS", "AFFINITY", "PROBLEM",
    ]);
    for row in rows {
        let backends = if row.backends.is_empty() {
            "none (refused)".to_owned()
        } else {
            row.backends
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("\n")
        };
        let affinity = match row.affinity_seconds {
            0 => String::new(),
            seconds => age(seconds.into()),
        };
        out.add_row([
            row.service.as_str(),
            &row.kind,
            &row.clients,
            &address(row.address),
            &row.protocol,
            &backends,
            &affinity,
            row.problem.as_deref().unwrap_or(""),
        ]);
    }
    out.to_string()
}

/// Ports of nodes have no address of their own.
fn address(at: SocketAddr) -> String {
    match (at, at.ip().is_unspecified()) {
        (SocketAddr::V4(_), true) => format!("nodes (IPv4):{}", at.port()),
        (SocketAddr::V6(_), true) => format!("nodes (IPv6):{}", at.port()),
        (_, false) => at.to_string(),
    }
}

pub(crate) fn endpoints(rows: &[EndpointView]) -> String {
    let mut out = table(&[
        "POD",
        "ADDRESSES",
        "DEVICE",
        "MAC",
        "STATE",
        "INGRESS",
        "EGRESS",
    ]);
    for row in rows {
        out.add_row([
            row.pod.as_str(),
            &row.addresses
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("\n"),
            &row.device,
            &row.mac,
            &row.state,
            &isolation(&row.ingress),
            &isolation(&row.egress),
        ]);
    }
    out.to_string()
}

pub(crate) fn policy(rows: &[PolicyView]) -> String {
    let mut out = table(&[
        "KIND",
        "POLICY",
        "TIER",
        "ENFORCEMENT",
        "DIRECTIONS",
        "PODS HERE",
        "NOT UNDERSTOOD",
    ]);
    for row in rows {
        out.add_row([
            row.kind.as_str(),
            &row.policy,
            row.tier.as_deref().unwrap_or_default(),
            &row.enforcement,
            &row.directions.join(","),
            &row.pods.join("\n"),
            &row.unsupported.join("\n"),
        ]);
    }
    out.to_string()
}

pub(crate) fn flows(rows: &[FlowView]) -> String {
    let mut out = table(&[
        "SOURCE",
        "DESTINATION",
        "PROTO",
        "STATE",
        "VIA",
        "PACKETS",
        "BYTES",
        "IDLE",
    ]);
    for row in rows {
        out.add_row([
            end(&row.source),
            end(&row.destination),
            row.protocol.clone(),
            row.state.clone(),
            row.via.map_or_else(String::new, |via| via.to_string()),
            format!("{} / {}", row.packets[0], row.packets[1]),
            format!("{} / {}", row.bytes[0], row.bytes[1]),
            age(row.idle_seconds),
        ]);
    }
    out.to_string()
}

pub(crate) fn drops(drops: &Drops) -> String {
    let mut totals = table(&["REASON", "PACKETS", "BYTES", "MEANING"]);
    for t in drops.totals.iter().filter(|t| t.packets > 0) {
        totals.add_row([
            t.reason.as_str(),
            &t.packets.to_string(),
            &t.bytes.to_string(),
            &t.help,
        ]);
    }
    let recent = events(&drops.recent);
    if drops.audited.is_empty() {
        return format!("{totals}\n\n{recent}");
    }
    let audited = events(&drops.audited);
    format!(
        "{totals}\n\n{recent}\n\nNot dropped, but would be if policies in audit were enforced:\n{audited}"
    )
}

fn events(events: &[DropView]) -> String {
    let mut out = table(&["TIME", "REASON", "SOURCE", "DESTINATION", "PROTO", "WHY"]);
    for event in events {
        out.add_row([
            event.time.as_str(),
            &event.reason,
            &end(&event.source),
            &end(&event.destination),
            &event.protocol,
            &event.why,
        ]);
    }
    out.to_string()
}

pub(crate) fn verify(verify: &Verify) -> String {
    let mut out = String::new();
    let mut tables = table(&[
        "TABLE",
        "DESIRED",
        "KERNEL",
        "MISSING",
        "UNEXPECTED",
        "DIFFERENT",
    ]);
    for t in &verify.tables {
        tables.add_row(
            [
                &t.table as &dyn std::fmt::Display,
                &t.desired,
                &t.kernel,
                &t.missing,
                &t.unexpected,
            ]
            .iter()
            .map(ToString::to_string)
            .chain([t.different.to_string()]),
        );
    }
    out.push_str(&format!("{tables}\n\n"));
    let mut hooks = table(&["HOOK", "PROGRAM", "PROBLEM"]);
    for h in &verify.hooks {
        hooks.add_row([
            h.hook.as_str(),
            h.program.as_deref().unwrap_or("none"),
            h.problem.as_deref().unwrap_or(""),
        ]);
    }
    out.push_str(&format!("{hooks}\n\n"));
    out.push_str(if verify.is_clean() {
        "The kernel holds exactly what it should."
    } else {
        "The kernel differs from what it should hold."
    });
    out
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().copied());
    table
}

fn end(end: &FlowEnd) -> String {
    let port = if end.address.is_ipv6() {
        format!("[{}]:{}", end.address, end.port)
    } else {
        format!("{}:{}", end.address, end.port)
    };
    match &end.name {
        Some(name) => format!("{name} ({port})"),
        None => port,
    }
}

fn isolation(policies: &[String]) -> String {
    if policies.is_empty() {
        "open".to_owned()
    } else {
        policies.join("\n")
    }
}

fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3600 % 24),
    }
}
