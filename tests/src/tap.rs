//! A cable made of two TAP devices. At its near end frames arrive as some network cards deliver them: what programs can read
//! directly ends with the Ethernet header, and the rest is in pages of its own, cut in the midst of headers. The only
//! `unsafe` of the tests is the call that names a device.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, IoSlice, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::libc::{IFF_NAPI, IFF_NAPI_FRAGS, IFF_NO_PI, IFF_TAP, TUNSETIFF, ioctl};

use crate::netns::Netns;

/// Where frames are cut, in bytes from their start: behind the Ethernet header, then within every header that there can be.
const CUTS: [usize; 9] = [14, 15, 27, 34, 41, 54, 61, 75, 1000];
/// `struct ifreq`, and where its flags are.
const REQUEST: usize = 40;
const FLAGS: usize = 16;

/// Two devices with a cable between. It goes on drop, and has to go before the namespaces.
#[derive(Debug)]
pub struct Cable {
    ends: [(String, String); 2],
    threads: Vec<JoinHandle<()>>,
    cut: Arc<AtomicU64>,
}

impl Cable {
    /// Makes a device in each of two namespaces, neither up yet, and carries frames between them.
    ///
    /// # Errors
    /// Not root, no `/dev/net/tun`, a device of that name is there, or its name is longer than 15 bytes.
    pub fn between(near: (&Netns, &str), far: (&Netns, &str)) -> Result<Self> {
        let in_pieces = IFF_TAP | IFF_NO_PI | IFF_NAPI | IFF_NAPI_FRAGS;
        let near_file = near.0.run(|| open(near.1, in_pieces))??;
        let far_file = far.0.run(|| open(far.1, IFF_TAP | IFF_NO_PI))??;
        // What is merged on the way in has its headers put where programs read: without, they stay where they came.
        let mut ethtool = near.0.command("ethtool");
        let output = ethtool.args(["-K", near.1, "gro", "off"]).output()?;
        ensure!(output.status.success(), "ethtool: {output:?}");
        let cut = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        let (from, to, count) = (far_file.try_clone()?, near_file.try_clone()?, cut.clone());
        threads.push(std::thread::spawn(move || carry(&from, &to, &CUTS, &count)));
        let (from, to) = (near_file, far_file);
        let uncounted = AtomicU64::new(0);
        threads.push(std::thread::spawn(move || {
            carry(&from, &to, &[], &uncounted);
        }));
        let name = |(netns, device): (&Netns, &str)| (netns.name().to_owned(), device.to_owned());
        Ok(Self {
            ends: [near, far].map(name),
            threads,
            cut,
        })
    }

    /// How many frames have arrived at the near end.
    #[must_use]
    pub fn arrived(&self) -> u64 {
        self.cut.load(Ordering::Relaxed)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        let mut are_gone = true;
        for (netns, device) in &self.ends {
            // Without its device a file answers an error, which ends the thread that reads it.
            let removed = Command::new("ip")
                .args(["-n", netns, "link", "del", device])
                .status();
            are_gone &= removed.is_ok_and(|status| status.success());
        }
        for thread in self.threads.drain(..).filter(|_| are_gone) {
            thread.join().ok();
        }
    }
}

/// Makes a device in the namespace of the caller's thread.
fn open(device: &str, flags: i32) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("open /dev/net/tun")?;
    ensure!(device.len() < FLAGS, "{device} is too long");
    let mut request = [0_u8; REQUEST];
    request[..device.len()].copy_from_slice(device.as_bytes());
    request[FLAGS..FLAGS + 2].copy_from_slice(&(flags as i16).to_ne_bytes());
    // SAFETY: the request is as long as the kernel's, which reads it, and writes the name into it, during the call.
    let answer = unsafe { ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    Errno::result(answer).with_context(|| format!("make the device {device}"))?;
    Ok(file)
}

/// Carries frames until a device is gone. One that is not up takes none, and loses them as a cable would.
fn carry(mut from: &File, mut to: &File, cuts: &[usize], count: &AtomicU64) {
    let mut frame = vec![0; 1 << 16];
    loop {
        let length = match from.read(&mut frame) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if to.write_vectored(&pieces(&frame[..length], cuts)).is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn pieces<'a>(frame: &'a [u8], cuts: &[usize]) -> Vec<IoSlice<'a>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    for end in cuts.iter().copied().chain([frame.len()]) {
        let end = end.min(frame.len());
        if end > start {
            pieces.push(IoSlice::new(&frame[start..end]));
            start = end;
        }
    }
    pieces
}
