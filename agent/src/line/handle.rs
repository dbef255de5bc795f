//! How others reach the line: they hand it work, and it answers when it gets there.

use tokio::sync::{mpsc, oneshot};

use super::Line;

/// Work for the line, done between two passes.
pub type Work = Box<dyn FnOnce(&mut Line) + Send>;

/// How much work may wait. Whoever brings more waits for room.
const QUEUE: usize = 256;

/// The way to the line. Clones lead to the same one.
#[derive(Clone, Debug)]
pub struct Handle {
    work: mpsc::Sender<Work>,
}

/// The line has ended: the agent is going down.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the agent is going down")]
pub struct Ended;

impl Handle {
    /// A handle, and where the line takes its work from.
    pub fn new() -> (Self, mpsc::Receiver<Work>) {
        let (work, queue) = mpsc::channel(QUEUE);
        (Self { work }, queue)
    }

    /// Has the line compute something, and waits for the answer.
    ///
    /// # Errors
    /// The line has ended.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Line) -> T + Send + 'static,
    ) -> Result<T, Ended> {
        let (reply, answer) = oneshot::channel();
        self.tell(move |line| {
            // Who asked may have stopped waiting.
            drop(reply.send(question(line)));
        })
        .await?;
        answer.await.map_err(|_| Ended)
    }

    /// Has the line do something, without waiting until it is done.
    ///
    /// # Errors
    /// The line has ended.
    pub async fn tell(&self, work: impl FnOnce(&mut Line) + Send + 'static) -> Result<(), Ended> {
        self.work.send(Box::new(work)).await.map_err(|_| Ended)
    }
}
