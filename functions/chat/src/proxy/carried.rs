//! Work that whoever waits for it carries out, and that goes on when they leave.
//!
//! As a task of its own from the start, every piece of a stream would cross one task more on its way.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Context;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::RecvError;

/// A future that is polled for what it sends meanwhile. Dropped before its end, it becomes a task.
pub(crate) struct Carried(Option<Pin<Box<dyn Future<Output = ()> + Send>>>);

impl Carried {
    pub(crate) fn new(work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Some(Box::pin(work)))
    }

    /// Goes on as far as it can now.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) {
        if let Some(work) = &mut self.0
            && work.as_mut().poll(context).is_ready()
        {
            self.0 = None;
        }
    }

    /// Waits for what the work sends.
    ///
    /// # Errors
    /// [`RecvError`] where it has dropped the sender.
    pub(crate) async fn until<T>(&mut self, mut sent: oneshot::Receiver<T>) -> Result<T, RecvError> {
        poll_fn(|context| {
            let first = Pin::new(&mut sent).poll(context);
            if first.is_ready() {
                return first;
            }
            self.poll(context);
            Pin::new(&mut sent).poll(context)
        })
        .await
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        if let (Some(rest), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Says "begun", then, after a moment, "ended".
    fn work(begun: oneshot::Sender<()>, ended: oneshot::Sender<()>) -> Carried {
        Carried::new(async {
            begun.send(()).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            ended.send(()).unwrap();
        })
    }

    #[tokio::test]
    async fn what_is_waited_for_comes() {
        let ((begin, begun), (end, ended)) = (oneshot::channel(), oneshot::channel());
        let mut work = work(begin, end);
        work.until(begun).await.unwrap();
        work.until(ended).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_left_before_its_end_is_done_all_the_same() {
        let ((begin, begun), (end, ended)) = (oneshot::channel(), oneshot::channel());
        let mut work = work(begin, end);
        work.until(begun).await.unwrap();
        drop(work);
        ended.await.unwrap();
    }

    #[tokio::test]
    async fn who_waits_for_what_is_never_sent_is_told() {
        let (sender, sent) = oneshot::channel::<()>();
        let mut work = Carried::new(async { drop(sender) });
        assert!(work.until(sent).await.is_err());
    }
}
