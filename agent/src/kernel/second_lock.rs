//! The second lock, outside of eBPF: what a pod's device sends without the mark of our program is
//! dropped by netfilter. It keeps pods closed when somebody else removes a program. What comes out of
//! a tunnel with the mark of a pod's packet is dropped, too. What its rules are, is in `rule`; how the kernel is spoken to, in `netfilter`.

mod netfilter;
mod rule;

use std::io::{self, ErrorKind};
use std::time::Duration;

use anyhow::{Context, Result};

use self::netfilter::Netfilter;
use crate::beat::beat;

/// How often rules are listed again that somebody changes while they are listed.
const LISTINGS: usize = 10;

/// How the lock was found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lock {
    Closed {
        /// Packets that it has dropped since it was closed.
        drops: u64,
    },
    /// There is none, or not the one that we put there.
    Open,
}

/// Sees to it that the rule is in place. One that is right is left alone, and so keeps counting; another
/// is replaced in one transaction. Returns what was found.
///
/// # Errors
/// The kernel has no nf_tables, or refuses.
pub fn close() -> Result<Lock> {
    let netfilter = open_netfilter()?;
    let found = look(&netfilter).context("look at the second lock")?;
    if found == Lock::Open && !cfg!(feature = "broken-open-first") {
        netfilter
            .ask(rule::replace())
            .context("close the second lock")?;
    }
    Ok(found)
}

/// What is in place now: table, chain, match, mark, mask and verdict are compared.
///
/// # Errors
/// The kernel has no nf_tables.
pub fn state() -> Result<Lock> {
    look(&open_netfilter()?).context("look at the second lock")
}

/// What the lock has dropped since it was closed, by one question. None if its rule is not as it should be; that
/// its chain is still hooked is for [`state`] to say, after a change.
///
/// # Errors
/// The kernel has no nf_tables.
pub fn drops() -> Result<Option<u64>> {
    count(&open_netfilter()?).context("read the counter of the second lock")
}

/// Takes the rule away. False when there was none.
///
/// # Errors
/// The kernel has no nf_tables, or refuses.
pub fn open() -> Result<bool> {
    let netfilter = open_netfilter()?;
    let table = there(netfilter.ask(rule::ask_table())).context("look for the second lock")?;
    if table.is_none() {
        return Ok(false);
    }
    netfilter
        .ask(rule::remove())
        .context("remove the second lock")?;
    Ok(true)
}

/// The number of the namespace's netfilter rules: another one after every change, whoever makes it.
/// Costs little, so that the rules themselves need to be looked at only after a change.
///
/// # Errors
/// The kernel has no nf_tables.
pub fn generation() -> Result<u32> {
    open_netfilter()?
        .generation()
        .context("ask for the generation of the netfilter rules")
}

/// Sees to it that the lock stays closed, until the future is dropped, and tells every state found. Looks
/// at the rules only when some have changed.
pub async fn keep(every: Duration, mut found: impl FnMut(Result<Lock>)) {
    let mut seen = None;
    loop {
        let before = seen;
        let looked = tokio::task::spawn_blocking(move || {
            let now = generation()?;
            if before == Some(now) {
                return Ok((before, None));
            }
            let lock = close()?;
            // Closing it is a change itself: the next look sees whether it held.
            Ok((Some(now), Some(lock)))
        });
        match looked.await.context("look at the second lock").flatten() {
            Ok((generation, lock)) => {
                seen = generation;
                if let Some(lock) = lock {
                    found(Ok(lock));
                }
            }
            Err(error) => {
                seen = None;
                found(Err(error));
            }
        }
        beat(every).await;
    }
}

fn open_netfilter() -> Result<Netfilter> {
    Netfilter::open().context("open a netfilter socket")
}

fn look(netfilter: &Netfilter) -> io::Result<Lock> {
    let table = there(netfilter.ask(rule::ask_table()))?;
    if !table.is_some_and(|table| rule::is_table(&table)) {
        return Ok(Lock::Open);
    }
    let chain = there(netfilter.ask(rule::ask_chain()))?;
    if !chain.is_some_and(|chain| rule::is_chain(&chain)) {
        return Ok(Lock::Open);
    }
    let drops = count(netfilter)?;
    Ok(drops.map_or(Lock::Open, |drops| Lock::Closed { drops }))
}

fn count(netfilter: &Netfilter) -> io::Result<Option<u64>> {
    let mut rules = netfilter.ask(rule::ask_rules());
    for _ in 0..LISTINGS {
        match &rules {
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                rules = netfilter.ask(rule::ask_rules());
            }
            _ => break,
        }
    }
    match rules {
        Ok(rules) => Ok(rule::drops(&rules)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The one answer; none if the kernel says that there is no such thing.
fn there(answers: io::Result<Vec<Vec<u8>>>) -> io::Result<Option<Vec<u8>>> {
    match answers {
        Ok(mut answers) => Ok(answers.pop()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
