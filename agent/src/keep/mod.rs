//! A parent that keeps a program running: it starts it again when it is killed, and ends as it ends. It is
//! the first process of its container, so that the kubelet's back-off, which grows to minutes, is only for
//! a program that gives up by itself. What the program is told is `weir_dns::kept`.

mod pace;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::{Command, ExitCode};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use weir_dns::hand_over::Folder;
use weir_dns::kept;

use self::pace::Pace;

/// Signals that wait to be looked at. More of one kind say nothing new.
const NEWS: usize = 16;
/// What a shell adds to the number of the signal that ended a program.
const ENDED_BY_SIGNAL: u8 = 128;

/// A signal that we got, by its number.
type News = Receiver<i32>;

/// How the program ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Status {
    Code(i32),
    /// None for a real-time signal.
    Signal(Option<Signal>),
}

/// What was passed on to the program.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Told {
    Nothing,
    ToStop,
}

/// What follows from it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    /// It ended by itself, or because it was told to: so do we, with this code.
    ForGood(u8),
    /// By a signal that we did not pass on.
    Killed(Option<Signal>),
}

/// Runs a program, given with its arguments, until it exits or we are told to stop by SIGTERM or SIGINT,
/// which it is told too; meanwhile the sockets of a weir-dns on these addresses, which it offers in `folder`, stay
/// open. Returns the code that it exited with, or 128 and the number of its signal.
///
/// # Errors
/// It cannot be started.
pub fn keep(command: &[OsString], hold: &[SocketAddr], folder: &Folder) -> Result<ExitCode> {
    let Some((program, arguments)) = command.split_first() else {
        bail!("say which program to keep running");
    };
    let news = signals()?;
    weir_dns::hold::hold(hold, folder).context("hold the sockets of weir-dns")?;
    let mut pace = Pace::default();
    let mut restarts = 0u64;
    loop {
        let child = Command::new(program)
            .args(arguments)
            .env(kept::RESTARTS, restarts.to_string())
            .env(kept::KEEPER, std::process::id().to_string())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let began = Instant::now();
        let child = Pid::from_raw(child.id().try_into().context("a pid is positive")?);
        let signal = match run(child, &news)? {
            End::ForGood(code) => return Ok(code.into()),
            End::Killed(signal) => signal,
        };
        let lived = began.elapsed();
        let pause = pace.after(lived);
        restarts += 1;
        eprintln!(
            "weir-agent keep: {} was ended by {} after {:.1} s; restart {restarts}, in {} ms",
            program.display(),
            signal.map_or("a real-time signal", Signal::as_str),
            lived.as_secs_f64(),
            pause.as_millis()
        );
        if is_told_to_stop(&news, pause)? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// Every signal that concerns us, from here on. A thread of its own waits for them, so that we can wait for
/// them with a limit; the one that starts the program is the caller's, since the kernel tells the program
/// of *that* thread's end.
fn signals() -> Result<News> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGCHLD]).context("listen for signals")?;
    let (tell, news) = sync_channel(NEWS);
    let listener = thread::Builder::new().name("signals".to_owned());
    let listen = move || {
        for signal in signals.forever() {
            if tell.send(signal).is_err() {
                return;
            }
        }
    };
    listener
        .spawn(listen)
        .context("start the thread of signals")?;
    Ok(news)
}

/// Passes signals on to the program until it has ended.
fn run(child: Pid, news: &News) -> Result<End> {
    let mut told = Told::Nothing;
    loop {
        match news.recv().context("no signal can be heard any more")? {
            SIGCHLD => {
                if let Some(status) = reap(child)? {
                    return Ok(end(status, told));
                }
            }
            number => {
                told = Told::ToStop;
                let signal = Signal::try_from(number).context("a signal")?;
                // It has not been waited for, so the pid is still its own.
                kill(child, signal).with_context(|| format!("pass {signal} on"))?;
            }
        }
    }
}

/// Waits for whoever has ended: the first process of a container inherits the children of others. Returns
/// how the program ended, if it did.
fn reap(child: Pid) -> Result<Option<Status>> {
    let mut ended = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(ended),
            Ok(WaitStatus::Exited(pid, code)) if pid == child => ended = Some(Status::Code(code)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                ended = Some(Status::Signal(Some(signal)));
            }
            // Somebody ended by a real-time signal, which has no name: was it the program?
            Err(Errno::EINVAL) if kill(child, None) == Err(Errno::ESRCH) => {
                ended = Some(Status::Signal(None));
            }
            Ok(_) | Err(Errno::EINTR | Errno::EINVAL) => {}
            Err(error) => return Err(error).context("wait for what has ended"),
        }
    }
}

fn end(status: Status, told: Told) -> End {
    match (status, told) {
        (Status::Code(code), _) => End::ForGood(u8::try_from(code).unwrap_or(u8::MAX)),
        (Status::Signal(signal), Told::ToStop) => {
            let number = signal.and_then(|it| u8::try_from(it as i32).ok());
            End::ForGood(ENDED_BY_SIGNAL + number.unwrap_or_default())
        }
        (Status::Signal(signal), Told::Nothing) => End::Killed(signal),
    }
}

/// Is there word to stop before the pause is over?
fn is_told_to_stop(news: &News, pause: Duration) -> Result<bool> {
    let deadline = Instant::now() + pause;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match news.recv_timeout(left) {
            Ok(SIGCHLD) => {}
            Ok(_) => return Ok(true),
            Err(RecvTimeoutError::Timeout) => return Ok(false),
            Err(RecvTimeoutError::Disconnected) => bail!("no signal can be heard any more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_signal_that_nobody_passed_on_is_a_reason_to_go_on() {
        let killed = Status::Signal(Some(Signal::SIGKILL));
        for (status, told, expected) in [
            (Status::Code(0), Told::Nothing, End::ForGood(0)),
            (Status::Code(3), Told::Nothing, End::ForGood(3)),
            (Status::Code(3), Told::ToStop, End::ForGood(3)),
            (killed, Told::ToStop, End::ForGood(137)),
            (killed, Told::Nothing, End::Killed(Some(Signal::SIGKILL))),
            (Status::Signal(None), Told::Nothing, End::Killed(None)),
        ] {
            assert_eq!(end(status, told), expected, "{status:?} {told:?}");
        }
    }
}
