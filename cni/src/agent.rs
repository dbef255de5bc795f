//! The plugin's end of the agent's socket: one frame out, one frame in, and a deadline over all.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use rscni_plugin::error::Error;
use weir_cni::wire::{MAX_FRAME, Refused, Reply, Request};

use crate::failure;

/// A connection to the agent.
pub(crate) struct Agent {
    stream: BufReader<UnixStream>,
    deadline: Instant,
}

/// Why there is no answer to go on with.
#[derive(Debug)]
pub(crate) enum NoAnswer {
    /// No agent, or it does not speak: what it did with the request is unknown.
    Silent(String),
    /// It speaks, and refuses.
    Refused(Refused),
}

/// How an ADD that is not wanted any more ended in the agent.
#[derive(Debug)]
pub(crate) enum Withdrawn {
    Released,
    /// It had refused by itself, and why.
    Refused(Refused),
}

impl From<io::Error> for NoAnswer {
    fn from(error: io::Error) -> Self {
        Self::Silent(error.to_string())
    }
}

impl From<NoAnswer> for Error {
    fn from(no_answer: NoAnswer) -> Self {
        match no_answer {
            NoAnswer::Silent(why) => Error::TryAgainLater(why),
            NoAnswer::Refused(refused) => failure::refused(refused),
        }
    }
}

impl Agent {
    /// Connects; nothing it is asked later takes longer than `deadline` either.
    pub(crate) fn connect(path: &Path, deadline: Instant) -> Result<Self, NoAnswer> {
        let connected = || -> io::Result<UnixStream> {
            // A blocking connect would wait without limit for an agent that no longer accepts.
            let socket = socket::socket(
                AddressFamily::Unix,
                SockType::Stream,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                None,
            )?;
            socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
            let stream = UnixStream::from(socket);
            stream.set_nonblocking(false)?;
            Ok(stream)
        };
        let stream = connected().map_err(|error| {
            NoAnswer::Silent(format!(
                "connect to the agent at {}: {error}",
                path.display()
            ))
        })?;
        Ok(Self {
            stream: BufReader::new(stream),
            deadline,
        })
    }

    /// Sends a request and waits for its answer.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<Reply, NoAnswer> {
        self.tell(request)?;
        self.answer()
    }

    /// Sends a request; its answer is the next.
    pub(crate) fn tell(&mut self, request: &Request) -> Result<(), NoAnswer> {
        let mut frame = serde_json::to_vec(request).map_err(io::Error::from)?;
        frame.push(b'\n');
        self.stream
            .get_ref()
            .set_write_timeout(Some(self.remaining()?))?;
        self.stream.get_mut().write_all(&frame).map_err(spoken)
    }

    /// Waits for the answer to what was told.
    pub(crate) fn answer(&mut self) -> Result<Reply, NoAnswer> {
        match self.read()? {
            Reply::Refused(refused) => Err(NoAnswer::Refused(refused)),
            reply => Ok(reply),
        }
    }

    /// Ends an unfinished ADD. Says how the agent confirmed that nothing of it is left there; `None` if it did not within
    /// `patience`.
    pub(crate) fn withdraw(mut self, patience: Duration) -> Option<Withdrawn> {
        self.deadline = Instant::now() + patience;
        self.stream.get_ref().shutdown(Shutdown::Write).ok()?;
        loop {
            match self.read().ok()? {
                Reply::Released => return Some(Withdrawn::Released),
                Reply::Refused(refused) => return Some(Withdrawn::Refused(refused)),
                // The answer to a request we no longer wait for.
                Reply::Ok | Reply::Leased(_) => {}
            }
        }
    }

    fn read(&mut self) -> Result<Reply, NoAnswer> {
        let mut line = Vec::new();
        loop {
            self.stream
                .get_ref()
                .set_read_timeout(Some(self.remaining()?))?;
            let room = (MAX_FRAME - line.len()) as u64;
            let read = (&mut self.stream).take(room).read_until(b'\n', &mut line);
            match read {
                _ if line.ends_with(b"\n") => break,
                Ok(0) => return Err(NoAnswer::Silent("the agent closed the connection".into())),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(spoken(error)),
            }
        }
        serde_json::from_slice(&line)
            .map_err(|error| NoAnswer::Silent(format!("the agent's answer: {error}")))
    }

    fn remaining(&self) -> Result<Duration, NoAnswer> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(silent())
        } else {
            Ok(left)
        }
    }
}

fn spoken(error: io::Error) -> NoAnswer {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => silent(),
        _ => NoAnswer::Silent(format!("speak to the agent: {error}")),
    }
}

fn silent() -> NoAnswer {
    NoAnswer::Silent("the agent does not answer in time".into())
}
