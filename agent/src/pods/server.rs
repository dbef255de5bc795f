//! The CNI server: one connection of the plugin at a time through lease, protection, policy and back.
//! What goes wrong half way is taken back here, whoever failed.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, block_in_place, spawn_blocking};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, info, warn};
use weir_cni::attachment::Attachment;
use weir_cni::wire::{ADD_DEADLINE_MS, Add, Mac, Macs, Refusal, Refused, Reply, Request};

use super::claims::{Claim, Claims, Key};
use super::frames::{Frames, NoRequest};
use super::{Datapath, Device, Lease, LeaseError, Leases};

/// Connections served at once. More wait in the listen queue, where the deadline of the plugin finds
/// them.
const PARALLEL: usize = 64;

/// The agent stops a little before the plugin does, so that the plugin hears why.
const ADD_DEADLINE: Duration = Duration::from_millis(ADD_DEADLINE_MS - 150);

/// How long a connection may take to say what it wants.
const FIRST_FRAME: Duration = Duration::from_secs(2);

/// How long after a failed `accept` (no file descriptors left) the next is tried.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a test of the first packet has to notice: the plugin is told that a device is open a little before it is.
const BROKEN_OPEN_FIRST: bool = cfg!(feature = "broken-open-first");

/// What the operator decides.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Of both devices of a pod, in bytes.
    pub mtu: u32,
}

/// The pods of this node.
#[derive(Debug)]
pub struct Pods<D> {
    pub(super) leases: Arc<Leases>,
    pub(super) datapath: Arc<D>,
    settings: Settings,
    claims: Claims,
    /// Whose notes of this agent's own DELs are on their way out.
    pub(super) settling: Mutex<HashSet<Attachment>>,
}

impl<D: Datapath> Pods<D> {
    pub fn new(leases: Arc<Leases>, datapath: Arc<D>, settings: Settings) -> Self {
        Self {
            leases,
            datapath,
            settings,
            claims: Claims::default(),
            settling: Mutex::default(),
        }
    }

    /// Serves the plugin until the future is dropped. Unfinished ADDs are then taken back by the next
    /// `reconcile`.
    pub async fn serve(self: Arc<Self>, listener: UnixListener) {
        let free = Arc::new(Semaphore::new(PARALLEL));
        let mut connections = JoinSet::new();
        loop {
            let Ok(permit) = free.clone().acquire_owned().await else {
                return;
            };
            while connections.try_join_next().is_some() {}
            match listener.accept().await {
                Ok((stream, _)) => {
                    let pods = self.clone();
                    connections.spawn(async move {
                        pods.converse(stream).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    warn!(%error, "cannot accept a connection of the CNI plugin");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn converse(self: Arc<Self>, stream: UnixStream) {
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 => {}
            peer => {
                warn!(?peer, "refused a CNI connection that is not root's");
                return;
            }
        }
        let deadline = Instant::now() + ADD_DEADLINE;
        let mut frames = Frames::new(stream);
        let (reply, leftover) = match timeout(FIRST_FRAME, frames.read()).await {
            Ok(Ok(Request::Add(add))) => self.add(&mut frames, add, deadline).await,
            Ok(Ok(Request::Del { attachment })) => {
                // Who asks for it may go while it waits for an ADD to end; then it leaves a note, and this one may not
                // come later and free what is leased by then.
                let claim = tokio::select! {
                    biased;
                    () = frames.ended() => return,
                    claim = self.claim(&attachment) => claim,
                };
                self.del(&attachment, claim).await
            }
            Ok(Ok(Request::Check { attachment })) => (self.lookup(&attachment), None),
            Ok(Ok(Request::Status)) => (self.status().await, None),
            Ok(Ok(Request::Gc { network, valid })) => (self.gc(&network, &valid).await, None),
            Ok(Ok(Request::Attach { .. } | Request::Done)) => {
                let why = "there is no ADD on this connection";
                (refuse(Refusal::Invalid, why), None)
            }
            Ok(Err(NoRequest::Invalid(why))) => (refuse(Refusal::Invalid, why), None),
            Ok(Err(NoRequest::Ended | NoRequest::Io(_))) | Err(_) => return,
        };
        if let Err(error) = frames.write(&reply).await {
            debug!(%error, "the CNI plugin did not wait for its answer");
        }
        if let Some(leftover) = leftover {
            self.settle(leftover).await;
        }
    }

    /// The whole conversation of an ADD; returns its last frame.
    async fn add(
        &self,
        frames: &mut Frames,
        add: Add,
        deadline: Instant,
    ) -> (Reply, Option<Leftover>) {
        let attachment = add.attachment.clone();
        let (lease, claim) = match self.lease(add, deadline).await {
            Ok(leased) => leased,
            Err(refused) => return (refused, None),
        };
        debug!(%attachment, addresses = ?lease.addresses, "leased");

        let opening = timeout_at(deadline, self.opening(frames, &lease, deadline));
        let ended = match opening.await.unwrap_or_else(|_| Err(not_finished())) {
            Ok(()) => self.done(frames, deadline).await,
            Err(stopped) => Err(stopped),
        };
        let stopped = match ended {
            Ok(()) => return (Reply::Ok, None),
            Err(stopped) => stopped,
        };
        if let Err(error) = self.free(&attachment).await {
            warn!(%attachment, error = format!("{error:#}"), "an unfinished ADD stays until DEL");
        }
        let leftover = Leftover {
            attachment,
            noted: false,
            claim,
        };
        (stopped, Some(leftover))
    }

    /// The lease of an ADD, and the claim that it needs. Where there is none, what the plugin has released meanwhile
    /// is taken in before that is said.
    async fn lease(&self, add: Add, deadline: Instant) -> Result<(Arc<Lease>, Claim), Reply> {
        if let Err(why) = self.datapath.ready() {
            return Err(refuse(Refusal::NotReady, why));
        }
        let macs = fresh_macs();
        let keys = [
            Key::Attachment(add.attachment.clone()),
            Key::Netns(add.netns),
        ];
        let claim = async || {
            let claim = timeout_at(deadline, self.claims.claim(keys.to_vec())).await;
            claim.map_err(|_| {
                let why = "another request about this container is still being served";
                refuse(Refusal::NotReady, why)
            })
        };
        {
            let claim = claim().await?;
            // A release of this very attachment would take back what is leased now. One of another can wait.
            let is_released = self.release_of(&add.attachment).exists();
            if !is_released && !self.leases.is_failing() {
                // In memory, so on this thread: each that is waked costs the pod a tenth of a millisecond.
                if let Ok(lease) = self.leases.lease(add.clone(), macs, now()) {
                    return Ok((lease, claim));
                }
            }
            // One may be of this very attachment, so its claim is free meanwhile.
        }
        timeout_at(deadline, self.take_in_releases())
            .await
            .map_err(|_| refuse(Refusal::NotReady, "releases are not taken in in time"))?
            .map_err(|error| refuse(Refusal::Storage, format!("{error:#}")))?;
        let claim = claim().await?;
        let release = self.release_of(&add.attachment);
        if release.exists() {
            // It would take back what is leased now.
            let why = format!("the release {} cannot be taken in", release.display());
            return Err(refuse(Refusal::Storage, why));
        }
        // What leases is always waited for: nobody else would know of the lease.
        let lease = move |leases: &Leases| lease_if_writable(leases, add, macs);
        let lease = self.blocking(lease).await;
        Ok((lease.map_err(|error| refuse_lease(&error))?, claim))
    }

    /// From the lease to the answer to `Attach`. An error is the answer that ends the conversation; the caller takes
    /// back what was done before it sends it.
    async fn opening(
        &self,
        frames: &mut Frames,
        lease: &Arc<Lease>,
        deadline: Instant,
    ) -> Result<(), Reply> {
        // Begun first: the plugin's thread may take this one's place.
        let durable = self.begin(Leases::make_durable);
        let leased = Reply::Leased(lease.answer(self.settings.mtu));
        frames.write(&leased).await.map_err(|_| Reply::Released)?;
        let host_ifindex = match frames.read().await {
            Ok(Request::Attach { host_ifindex }) => host_ifindex,
            ended => return Err(out_of_turn(ended)),
        };
        if BROKEN_OPEN_FIRST {
            let said = frames.write(&Reply::Ok).await;
            said.map_err(|_| Reply::Released)?;
            sleep(Duration::from_millis(20)).await;
        }
        let open = async {
            // Both ends stay down until the plugin hears of all of it, so that it may be done side by side. No address is
            // used before the disk knows of it: an agent that starts would lease it to another.
            let durable = async { durable.await.map_err(|error| refuse_lease(&error)) };
            let opened = async { Ok(self.open(lease, host_ifindex, deadline).await) };
            let ((), opened) = tokio::try_join!(durable, opened)?;
            Ok(opened)
        };
        let opened = tokio::select! {
            opened = open => opened?,
            () = frames.ended() => return Err(Reply::Released),
        };
        match opened {
            Ok(lease) => self.datapath.opened(&lease),
            Err(error) => {
                let error = format!("{error:#}");
                warn!(attachment = %lease.attachment, error, "not attached");
                return Err(refuse(Refusal::NotReady, error));
            }
        }
        match BROKEN_OPEN_FIRST {
            true => Ok(()),
            false => frames.write(&Reply::Ok).await.map_err(|_| Reply::Released),
        }
    }

    /// Opens a device that is down: returns when it is under the filters of all pods and its pod's policy is there.
    async fn open(
        &self,
        lease: &Arc<Lease>,
        host_ifindex: u32,
        deadline: Instant,
    ) -> Result<Arc<Lease>> {
        let device = lease.device();
        let lease = self.leases.attach(lease, host_ifindex)?;
        let devices = lease.devices().context("an attached lease has devices")?;
        let opened = async {
            timeout_at(deadline, self.datapath.open(&lease))
                .await
                .map_err(|_| anyhow!("this node does not know {} in time", named(&lease)))?
                .with_context(|| format!("open {device} for {}", named(&lease)))
        };
        // On this thread: waiting for another takes as long as the work.
        let protected = async {
            block_in_place(|| self.datapath.protect(&device, devices))
                .with_context(|| format!("protect {device}"))?;
            // Nothing else of this conversation could look at the clock meanwhile.
            if Instant::now() >= deadline {
                bail!("{device} is not under the filters of all pods in time");
            }
            Ok(())
        };
        // The line is asked first, and works while the kernel waits for its own readers.
        tokio::try_join!(biased; opened, protected)?;
        Ok(lease)
    }

    /// The last word of an ADD. The plugin ends without an answer, so what it could say counts.
    async fn done(&self, frames: &mut Frames, deadline: Instant) -> Result<(), Reply> {
        let (is_late, ended) = match timeout_at(deadline, frames.read()).await {
            Ok(ended) => (false, ended),
            Err(_) => {
                frames.hear_no_more();
                (true, frames.read().await)
            }
        };
        match ended {
            Ok(Request::Done) => Ok(()),
            Err(NoRequest::Ended) if is_late => Err(not_finished()),
            ended => Err(out_of_turn(ended)),
        }
    }

    /// Nobody waits for the disk: a note in a folder outlives this agent until the record of the lease is gone.
    async fn del(&self, attachment: &Attachment, claim: Claim) -> (Reply, Option<Leftover>) {
        let taken = match self.take_back(attachment).await {
            Ok(taken) => taken,
            Err(error) => return (refuse(Refusal::NotReady, format!("{error:#}")), None),
        };
        // Memory alone may know that nothing is leased: one that was refused for it comes again.
        let noted = if taken == Taken::Lease || self.leases.is_unrecorded(attachment) {
            match self.note(attachment).await {
                Ok(noted) => noted,
                Err(error) => return (refuse(Refusal::Storage, format!("{error:#}")), None),
            }
        } else {
            false
        };
        info!(%attachment, "released");
        let leftover = Leftover {
            attachment: attachment.clone(),
            noted,
            claim,
        };
        (Reply::Ok, Some(leftover))
    }

    fn lookup(&self, attachment: &Attachment) -> Reply {
        match self.leases.find(attachment) {
            Some(lease) => Reply::Leased(lease.answer(self.settings.mtu)),
            None => refuse_lease(&LeaseError::NotFound(attachment.clone())),
        }
    }

    async fn status(&self) -> Reply {
        if let Err(why) = self.datapath.ready() {
            return refuse(Refusal::NotReady, why);
        }
        if let Err(error) = self.take_in_releases().await {
            return refuse(Refusal::Storage, format!("{error:#}"));
        }
        match self.blocking(|it| it.check()).await {
            Ok(()) => Reply::Ok,
            Err(error) => refuse_lease(&error),
        }
    }

    /// Frees everything of `network` that is not in `valid`, and devices that nothing explains. Goes
    /// on after errors and reports them together.
    async fn gc(&self, network: &str, valid: &[Attachment]) -> Reply {
        let valid: HashSet<&Attachment> = valid.iter().collect();
        let mut errors = Vec::new();
        if let Err(error) = self.take_in_releases().await {
            errors.push(format!("{error:#}"));
        }
        for lease in self.leases.all().values() {
            if lease.network != network || valid.contains(&lease.attachment) {
                continue;
            }
            let _claim = self.claim(&lease.attachment).await;
            match self.free(&lease.attachment).await {
                Ok(()) => info!(attachment = %lease.attachment, "released by GC"),
                Err(error) => errors.push(format!("{}: {error:#}", lease.attachment)),
            }
            self.delete_device(&lease.device()).await;
        }
        // A device is made after its lease, so the devices are listed before the leases.
        match self.datapath.devices().await {
            Ok(devices) => {
                let mut explained: HashSet<String> = valid.iter().map(|it| it.device()).collect();
                explained.extend(self.leases.all().values().map(|it| it.device()));
                for Device { name, .. } in devices {
                    if !explained.contains(&name) {
                        match self.datapath.delete_device(&name).await {
                            Ok(()) => {
                                info!(device = name, "deleted by GC");
                                self.blocking(move |it| it.let_go(&name)).await;
                            }
                            Err(error) => errors.push(format!("delete {name}: {error:#}")),
                        }
                    }
                }
            }
            Err(error) => errors.push(format!("list our devices: {error:#}")),
        }
        if errors.is_empty() {
            Reply::Ok
        } else {
            refuse(Refusal::Storage, errors.join("; "))
        }
    }

    /// Closes the attachment's device and frees its addresses, in this order. Without a lease, the
    /// addresses of a held device are freed, after it is deleted. Needs the claim.
    pub(super) async fn free(&self, attachment: &Attachment) -> Result<()> {
        if self.take_back(attachment).await? == Taken::Lease {
            self.make_durable().await;
        }
        Ok(())
    }

    /// The same in memory.
    pub(super) async fn take_back(&self, attachment: &Attachment) -> Result<Taken> {
        let device = attachment.device();
        let Some(lease) = self.leases.find(attachment) else {
            let held = device.clone();
            if self.blocking(move |it| it.holds(&held)).await {
                self.datapath.delete_device(&device).await?;
                self.blocking(move |it| it.let_go(&device)).await;
            }
            return Ok(Taken::Nothing);
        };
        if let Err(error) = self.datapath.close(&lease).await {
            warn!(%attachment, error = format!("{error:#}"), "cannot close the device; deleting it");
            self.datapath.delete_device(&device).await?;
        }
        self.leases.release([attachment]);
        Ok(Taken::Lease)
    }

    /// Brings the disk to what memory holds. If it does not take it now, the record follows with the next write; and if there
    /// is none, an agent that starts finds a lease without a device and drops it.
    pub(super) async fn make_durable(&self) -> bool {
        let written = self.blocking(Leases::make_durable).await;
        if let Err(error) = &written {
            warn!(%error, "taken back in memory only");
        }
        written.is_ok()
    }

    /// Whether it is gone.
    pub(super) async fn delete_device(&self, name: &str) -> bool {
        let deleted = self.datapath.delete_device(name).await;
        if let Err(error) = &deleted {
            let error = format!("{error:#}");
            warn!(device = name, error, "cannot delete a device");
        }
        deleted.is_ok()
    }

    /// The attachment and the namespace it is in.
    pub(super) async fn claim(&self, attachment: &Attachment) -> Claim {
        let key = Key::Attachment(attachment.clone());
        match self.leases.find(attachment).map(|lease| lease.netns) {
            Some(netns) => self.claims.claim(vec![key, Key::Netns(netns)]).await,
            None => self.claims.claim(vec![key]).await,
        }
    }

    /// Runs something that writes to disk on a thread that may wait for it.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Leases) -> T + Send + 'static,
    ) -> T {
        self.begin(work).await
    }

    /// The same, begun at once.
    fn begin<T: Send + 'static, W: FnOnce(&Leases) -> T + Send + 'static>(
        &self,
        work: W,
    ) -> impl Future<Output = T> + use<T, W, D> {
        let leases = self.leases.clone();
        let begun = spawn_blocking(move || work(&leases));
        async {
            match begun.await {
                Ok(done) => done,
                Err(failed) => match failed.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    // The runtime is shutting down; whoever awaits this is dropped with it.
                    Err(_) => std::future::pending().await,
                },
            }
        }
    }
}

/// Where a write has failed, nothing is leased before one succeeds: no device is made for what would be refused.
fn lease_if_writable(leases: &Leases, add: Add, macs: Macs) -> Result<Arc<Lease>, LeaseError> {
    leases.ensure_writable()?;
    leases.lease(add, macs, now())
}

/// What is done after the answer: deleting a device takes the kernel tens of milliseconds. The claim
/// stays until then, so that the next ADD for the same namespace finds it empty.
pub(super) struct Leftover {
    pub(super) attachment: Attachment,
    /// Whether a note stands for it until the disk knows and the device is gone.
    pub(super) noted: bool,
    pub(super) claim: Claim,
}

/// What there was to take back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Taken {
    Lease,
    Nothing,
}

/// The answer to something that does not belong here: the end of the connection, most often.
fn out_of_turn(ended: Result<Request, NoRequest>) -> Reply {
    match ended {
        Ok(_) => refuse(Refusal::Invalid, "this request does not belong here"),
        Err(NoRequest::Invalid(why)) => refuse(Refusal::Invalid, why),
        Err(NoRequest::Ended | NoRequest::Io(_)) => Reply::Released,
    }
}

fn not_finished() -> Reply {
    refuse(Refusal::NotReady, "the plugin did not finish in time")
}

/// What an ADD waits for, in words.
fn named(lease: &Lease) -> String {
    match &lease.pod {
        Some(pod) => format!("pod {}/{} and its policy", pod.namespace, pod.name),
        None => format!("the policy of {}", lease.attachment),
    }
}

fn refuse(reason: Refusal, message: impl Into<String>) -> Reply {
    Reply::Refused(Refused {
        reason,
        message: message.into(),
    })
}

fn refuse_lease(error: &LeaseError) -> Reply {
    let reason = match error {
        LeaseError::NoRange => Refusal::NotReady,
        LeaseError::Exhausted(_) => Refusal::Exhausted,
        LeaseError::Exists(_) => Refusal::Exists,
        LeaseError::NotFound(_) => Refusal::NotFound,
        LeaseError::Store(_) => Refusal::Storage,
        LeaseError::Cidr(_) | LeaseError::Clash(..) => Refusal::Invalid,
    };
    refuse(reason, error.to_string())
}

/// Seconds since 1970; 0 before.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |it| it.as_secs())
}

/// Two random addresses: locally administered, unicast. Given rather than left to the kernel, because
/// udev replaces those that the kernel made up.
fn fresh_macs() -> Macs {
    let mac = || {
        let mut mac: [u8; 6] = std::array::from_fn(|_| fastrand::u8(..));
        mac[0] = (mac[0] & 0xfc) | 0x02;
        Mac(mac)
    };
    Macs {
        host: mac(),
        pod: mac(),
    }
}
