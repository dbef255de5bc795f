//! GC: the agent frees every attachment of this network that the runtime no longer lists.

use std::time::{Duration, Instant};

use rscni_plugin::error::Error;
use rscni_plugin::types::Args;
use weir_cni::attachment::Attachment;
use weir_cni::wire::Request;

use crate::agent::Agent;
use crate::config::Config;

/// Freeing hundreds of attachments takes a while, and no pod waits for it.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn gc(args: &Args) -> Result<(), Error> {
    let conf = args.config();
    let config = Config::of(conf)?;
    let listed = conf
        .valid_attachments
        .as_ref()
        .ok_or_else(|| Error::InvalidNetworkConfig("GC needs cni.dev/valid-attachments".into()))?;
    // A name that we would have refused at ADD is not one of ours.
    let valid = listed
        .iter()
        .filter_map(|it| Attachment::new(&it.container_id, &it.ifname).ok())
        .collect();
    let request = Request::Gc {
        network: conf.name.clone(),
        valid,
    };
    Agent::connect(&config.agent_socket, Instant::now() + PATIENCE)?.ask(&request)?;
    Ok(())
}
