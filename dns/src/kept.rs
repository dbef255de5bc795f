//! What a program is told by the parent that keeps it running, `weir-agent keep`. Every program of Weir that
//! runs for long reads it.

use std::io;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// The environment variable with the number of restarts.
pub const RESTARTS: &str = "WEIR_RESTARTS";
/// The environment variable with the parent's pid.
pub const KEEPER: &str = "WEIR_KEEPER";

/// Nobody types these: they come from the environment.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Kept {
    /// How often the program was killed and started again.
    #[arg(long, env = RESTARTS, default_value_t = 0, hide = true)]
    pub restarts: u64,
    /// The pid of the parent.
    #[arg(long, env = KEEPER, hide = true)]
    pub keeper: Option<i32>,
}

impl Kept {
    /// Has the kernel end this process when the parent ends. To be called once the process is who it will
    /// be: another user or other capabilities undo it, and so does a file with capabilities that is run.
    ///
    /// # Errors
    /// The parent has ended already.
    pub fn end_with_keeper(&self) -> io::Result<()> {
        match self.keeper {
            // With the first process of a container the kernel ends all others.
            None | Some(1) => Ok(()),
            Some(keeper) => {
                set_pdeathsig(Signal::SIGKILL)?;
                match getppid() == Pid::from_raw(keeper) {
                    true => Ok(()),
                    false => Err(io::Error::other("the parent has ended")),
                }
            }
        }
    }
}
