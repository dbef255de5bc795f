//! What enters the line beside what the cluster says, and what it can be asked. Everything is data: nobody
//! else runs on the line.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot};
use weir_cli::views::{EndpointView, PolicyView, ServiceView, Status, Verify};

use super::Sample;
use crate::compile::masquerade::Outlet;
use crate::explain::Matter;
use crate::explain::diff::Told;
use crate::pods::{Attachment, Lease, LeaseTable};

/// How much may wait. Whoever brings more waits for room.
const QUEUE: usize = 256;

/// Something of this node that the line takes in.
#[derive(Debug)]
pub enum Input {
    /// The pods that an earlier agent opened. Comes once; until then nothing of the cluster is taken in, and no
    /// row of a pod is touched.
    Resumed(Vec<Arc<Lease>>),
    /// A pod whose device is there, and down. Answered when its packets are judged by its policy.
    Leased {
        lease: Arc<Lease>,
        opened: oneshot::Sender<Result<(), String>>,
    },
    /// A pod that ends. Answered when no packet passes its device and no table leads to it.
    Released {
        lease: Arc<Lease>,
        closed: oneshot::Sender<Result<(), String>>,
    },
    /// The devices of pods that exist on this node. Answered with the attachments that have neither a device nor
    /// a pod any more: their DEL never came.
    Devices {
        /// The leases as they were before the devices were listed: a later one's device is not among them.
        leases: Arc<LeaseTable>,
        /// Interface indices by name.
        devices: BTreeMap<String, u32>,
        orphans: oneshot::Sender<Vec<Attachment>>,
    },
    /// The node's own addresses, sorted.
    NodeAddresses(Vec<IpAddr>),
    /// The devices that could lead out of the node.
    Outlets(Vec<Outlet>),
    /// What addresses of pods are leased from.
    PodRanges(Vec<IpNet>),
    Question(Question),
}

impl Input {
    /// Can something follow from it? Not from a question, and kubelet asks all the time.
    pub(super) fn is_news(&self) -> bool {
        !matches!(self, Self::Question(_))
    }
}

/// What somebody wants to know of the line, and where the answer goes.
#[derive(Debug)]
pub enum Question {
    /// Does it still work?
    Alive(oneshot::Sender<()>),
    Status(oneshot::Sender<Status>),
    Services(oneshot::Sender<Vec<ServiceView>>),
    Endpoints(oneshot::Sender<Vec<EndpointView>>),
    Policy(oneshot::Sender<Vec<PolicyView>>),
    /// Every object that policy goes by, and where the node answers DNS.
    Objects(oneshot::Sender<Vec<Told>>),
    /// Why something may pass or not: what is needed to say so.
    Explain {
        question: weir_cli::question::Question,
        to: oneshot::Sender<Result<Matter, String>>,
    },
    Verify(oneshot::Sender<Result<Verify, String>>),
    Sample(oneshot::Sender<Sample>),
}

/// The way to the line. Clones lead to the same one.
#[derive(Clone, Debug)]
pub struct Handle {
    inputs: mpsc::Sender<Input>,
}

/// The line has ended: the agent is going down.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the agent is going down")]
pub struct Ended;

impl Handle {
    /// A handle, and where the line takes from what others bring.
    pub fn new() -> (Self, mpsc::Receiver<Input>) {
        let (inputs, queue) = mpsc::channel(QUEUE);
        (Self { inputs }, queue)
    }

    /// Brings something, without waiting until it is taken in.
    ///
    /// # Errors
    /// The line has ended.
    pub async fn bring(&self, input: Input) -> Result<(), Ended> {
        self.inputs.send(input).await.map_err(|_| Ended)
    }

    /// Brings something that is answered, and waits for the answer:
    /// `handle.ask(|to| Input::Question(Question::Alive(to)))`.
    ///
    /// # Errors
    /// The line has ended.
    pub async fn ask<T>(
        &self,
        input: impl FnOnce(oneshot::Sender<T>) -> Input,
    ) -> Result<T, Ended> {
        let (to, answer) = oneshot::channel();
        self.bring(input(to)).await?;
        answer.await.map_err(|_| Ended)
    }
}
