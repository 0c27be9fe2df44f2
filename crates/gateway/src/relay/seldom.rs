//! A future that rarely has news, awaited beside one that always has.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};

use futures::task::AtomicWaker;

/// Polls its future only when that has asked for it. A `select!` polls all its branches with each
/// message of a stream: timers and waiters would cost more than the message.
pub(super) struct Seldom<T> {
    future: Pin<Box<dyn Future<Output = T> + Send + Sync>>,
    bell: Arc<Bell>,
}

/// Wakes the task and remembers for which of its futures.
#[derive(Debug)]
struct Bell {
    rung: AtomicBool,
    task: AtomicWaker,
}

impl<T> Seldom<T> {
    pub(super) fn new(future: impl Future<Output = T> + Send + Sync + 'static) -> Self {
        // The first time it is polled unasked.
        let bell = Bell { rung: AtomicBool::new(true), task: AtomicWaker::new() };
        Self { future: Box::pin(future), bell: Arc::new(bell) }
    }
}

impl<T> Future for Seldom<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        // Before the look, so that a ring between the two wakes the task.
        self.bell.task.register(cx.waker());
        if !self.bell.rung.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        let waker = Waker::from(Arc::clone(&self.bell));
        let output = ready!(self.future.as_mut().poll(&mut Context::from_waker(&waker)));
        Poll::Ready(output)
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<T> fmt::Debug for Seldom<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seldom").field("bell", &self.bell).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use tokio::time;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_polled_only_when_it_asks() {
        let polls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&polls);
        let mut sleep = Box::pin(time::sleep(Duration::from_secs(3600)));
        let mut seldom = Seldom::new(std::future::poll_fn(move |cx| {
            counted.fetch_add(1, Ordering::Relaxed);
            sleep.as_mut().poll(cx)
        }));
        for _ in 0..100 {
            assert!(futures::poll!(&mut seldom).is_pending());
        }
        assert_eq!(polls.load(Ordering::Relaxed), 1);
        // Wakes this task, whichever polled it last.
        time::timeout(Duration::from_secs(7200), &mut seldom).await.unwrap();
        assert_eq!(polls.load(Ordering::Relaxed), 2);
    }
}
