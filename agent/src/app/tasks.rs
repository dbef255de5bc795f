//! The tasks of the agent. Each has a name, and an end that is noticed: none is meant to end before the agent.

use anyhow::{Error, anyhow};
use tokio::task::JoinSet;

/// Tasks that run as long as the agent does.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    running: JoinSet<&'static str>,
    /// Those that have something to do and then are done.
    passing: JoinSet<()>,
}

impl Tasks {
    /// Runs for as long as the agent does; its end is the agent's.
    pub(super) fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.running.spawn(async move {
            task.await;
            name
        });
    }

    /// Runs until it is done.
    pub(super) fn spawn_until_done(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.passing.spawn(task);
    }

    /// Waits until a task ends that should not, and says which.
    pub(super) async fn ended(&mut self) -> Error {
        match self.running.join_next().await {
            Some(Ok(name)) => {
                anyhow!("the task {name:?} has ended: nothing does its work any more")
            }
            Some(Err(error)) => Error::new(error).context("a task was ended"),
            None => anyhow!("no task was started"),
        }
    }

    /// Ends them all.
    pub(super) async fn shutdown(&mut self) {
        self.passing.shutdown().await;
        self.running.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_task_that_ends_is_named_and_one_that_is_done_is_not_missed() {
        let mut tasks = Tasks::default();
        tasks.spawn_until_done(async {});
        tasks.spawn("goes on", std::future::pending());
        tasks.spawn("ends", async {});
        assert!(tasks.ended().await.to_string().contains("\"ends\""));
    }
}
