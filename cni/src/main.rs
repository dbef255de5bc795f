//! `weir-cni`: what the container runtime runs for each operation of the CNI specification (0.4.0,
//! 1.0.0, 1.1.0). It enters the pod's namespace and makes the devices; the agent decides everything
//! else. It is a process per operation, so it starts no runtime and blocks.

mod add;
mod agent;
mod check;
mod config;
mod del;
mod failure;
mod gc;
mod link;
mod netlink;
mod netns;

use std::process::ExitCode;

use rscni_plugin::cni::{Cni, Plugin};
use rscni_plugin::error::Error;
use rscni_plugin::types::{Args, CNIResult};
use weir_common::allocator::Allocator;

struct Weir;

impl Cni for Weir {
    fn add(&self, args: Args) -> Result<CNIResult, Error> {
        add::add(&args)
    }

    fn del(&self, args: Args) -> Result<(), Error> {
        del::del(&args)
    }

    fn check(&self, args: Args) -> Result<(), Error> {
        check::check(&args)
    }

    fn status(&self, args: Args) -> Result<(), Error> {
        check::status(&args)
    }

    fn gc(&self, args: Args) -> Result<(), Error> {
        gc::gc(&args)
    }
}

// docs/decisions/0020-an-allocator-of-our-own-choice.md
#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    let about = concat!(
        "weir-cni ",
        env!("CARGO_PKG_VERSION"),
        ": the CNI plugin of Weir"
    );
    // The error is on standard output by now, where the runtime looks for it.
    match Plugin::default().msg(about).run(&Weir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
