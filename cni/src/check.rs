//! CHECK and STATUS: look, change nothing.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use rscni_plugin::error::Error;
use rscni_plugin::types::{Args, CNIResult};
use weir_cni::wire::{Leased, Mac, Reply, Request, gateway};

use crate::add::open_netns;
use crate::agent::Agent;
use crate::config::{self, Config};
use crate::failure;
use crate::netlink::Netlink;

const PATIENCE: Duration = Duration::from_secs(2);

/// Error 50 when an ADD could not be served now.
pub(crate) fn status(args: &Args) -> Result<(), Error> {
    let config = Config::of(args.config())?;
    Agent::connect(&config.agent_socket, Instant::now() + PATIENCE)
        .and_then(|mut agent| agent.ask(&Request::Status))
        .map(drop)
        .map_err(|no_answer| Error::PluginNotAvailable(Error::from(no_answer).details().into()))
}

/// Compares what ADD reported, what the agent remembers and what the kernel has. Changes that later
/// plugins of a chain made to other things are not ours to judge.
pub(crate) fn check(args: &Args) -> Result<(), Error> {
    let conf = args.config();
    let config = Config::of(conf)?;
    let attachment = config::attachment(args)?;
    let Some(prev) = &conf.prev_result else {
        return Err(Error::InvalidNetworkConfig("CHECK needs prevResult".into()));
    };
    let netns = open_netns(args.netns().map_or(Path::new(""), |path| path.as_path()))?;

    let request = Request::Check {
        attachment: attachment.clone(),
    };
    let reply = Agent::connect(&config.agent_socket, Instant::now() + PATIENCE)?.ask(&request)?;
    let Reply::Leased(leased) = reply else {
        return Err(failure::broken("the agent has no lease"));
    };
    compare_result(prev, &leased, attachment.ifname(), leased.macs.pod)?;

    let step = || failure::step("look at the network");
    let mut node = Netlink::open().map_err(step())?;
    let mut pod = netns.enter().map_err(step())?;
    check_pod(&mut pod, &leased, attachment.ifname())?;
    check_node(&mut node, &leased)
}

/// What ADD reported must still be what the agent leased.
fn compare_result(prev: &CNIResult, leased: &Leased, ifname: &str, mac: Mac) -> Result<(), Error> {
    let reported = prev
        .interfaces
        .iter()
        .position(|it| it.name == ifname && it.sandbox.is_some())
        .ok_or_else(|| failure::broken(format!("prevResult has no interface {ifname}")))?;
    if prev.interfaces[reported].mac.parse() != Ok(mac) {
        return Err(failure::broken(format!(
            "prevResult: {ifname} is not {mac}"
        )));
    }
    for address in &leased.addresses {
        let ours = |ip: &&rscni_plugin::types::IpConfig| {
            ip.address == *address && ip.interface == Some(reported as u32)
        };
        if !prev.ips.iter().any(|ip| ours(&ip)) {
            return Err(failure::broken(format!("prevResult: {address} is missing")));
        }
    }
    Ok(())
}

fn check_pod(pod: &mut Netlink, leased: &Leased, ifname: &str) -> Result<(), Error> {
    let link = find(pod, ifname, leased.macs.pod)?;
    let step = || failure::step("look at the pod's interface");
    let found = pod.addresses(link).map_err(step())?;
    for address in leased.addresses.iter().map(|net| net.addr()) {
        if !found.contains(&address) {
            return Err(failure::broken(format!(
                "{ifname} has no address {address}"
            )));
        }
        let gateway = gateway(address);
        if pod.fixed_neighbour(link, gateway).map_err(step())? != Some(leased.macs.host) {
            return Err(failure::broken(format!(
                "{ifname} has no fixed neighbour {gateway} at {}",
                leased.macs.host
            )));
        }
        let is_default = pod.is_routed(link, address, None, Some(gateway));
        if !is_default.map_err(step())? {
            return Err(failure::broken(format!("no default route via {gateway}")));
        }
    }
    Ok(())
}

fn check_node(node: &mut Netlink, leased: &Leased) -> Result<(), Error> {
    let link = find(node, &leased.device, leased.macs.host)?;
    let step = || failure::step("look at the node's device");
    for address in leased.addresses.iter().map(|net| net.addr()) {
        let is_routed = |node: &mut Netlink, to: IpAddr| node.is_routed(link, to, Some(to), None);
        if !is_routed(node, address).map_err(step())? {
            return Err(failure::broken(format!(
                "no route to {address} over {}",
                leased.device
            )));
        }
        if node.fixed_neighbour(link, address).map_err(step())? != Some(leased.macs.pod) {
            return Err(failure::broken(format!("no fixed neighbour {address}")));
        }
    }
    Ok(())
}

/// The index of a device that is there, up, and has the right address.
fn find(netlink: &mut Netlink, name: &str, mac: Mac) -> Result<u32, Error> {
    let link = netlink
        .link(name)
        .map_err(failure::step(&format!("look at {name}")))?
        .ok_or_else(|| failure::broken(format!("there is no {name}")))?;
    if !link.up {
        return Err(failure::broken(format!("{name} is down")));
    }
    if link.mac != Some(mac) {
        return Err(failure::broken(format!(
            "{name} does not have the address {mac}"
        )));
    }
    Ok(link.index)
}
