//! From the compute thread to one async reader: tokens pile up unread, nothing blocks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tercet_engine::{
    EventSink, SequenceEvent, SequenceFailure,
    plan::{Scores, TokenLogprobs},
};
use tokio::sync::Notify;

/// The reader's side of one sequence.
///
/// Bounded by the sequence itself: ids of at most one context, and one end.
#[derive(Debug)]
pub(crate) struct Mailbox(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Held for a few instructions on either side, so a blocking lock is the right one.
    mail: Mutex<Mail>,
    arrived: Notify,
}

/// What has come since the last reading.
#[derive(Debug, Default)]
pub(crate) struct Mail {
    /// Tokens that were cached when the sequence left the queue, if it did.
    pub(crate) scheduled: Option<usize>,
    /// Index in the completion of the first of `ids`.
    pub(crate) first_index: usize,
    /// New tokens.
    pub(crate) ids: Vec<u32>,
    /// How likely each of `ids` was, if that was asked for.
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// How the sequence ended; nothing follows.
    pub(crate) end: Option<End>,
}

/// How a sequence ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The completion is complete; why, is for the completion to know.
    Finished,
    /// The tokens are scored.
    Scores(Scores),
    /// It cannot go on.
    Failed(SequenceFailure),
    /// The engine dropped it without a word: a defect.
    Dropped,
}

/// Returns what an engine tells a sequence's events to, and where they are read.
pub(crate) fn mailbox() -> (EventSink, Mailbox) {
    let shared = Arc::new(Shared::default());
    let writer = Writer(Arc::clone(&shared));
    (Box::new(move |event| writer.write(event)), Mailbox(shared))
}

impl Mailbox {
    /// Returns what has come, waiting for something. Cancel-safe.
    pub(crate) async fn receive(&self) -> Mail {
        loop {
            let mail = std::mem::take(&mut *lock(&self.0.mail));
            if mail.scheduled.is_some() || !mail.ids.is_empty() || mail.end.is_some() {
                return mail;
            }
            self.0.arrived.notified().await;
        }
    }
}

/// The engine's side.
struct Writer(Arc<Shared>);

impl Writer {
    fn write(&self, event: SequenceEvent) {
        let mut mail = lock(&self.0.mail);
        match event {
            SequenceEvent::Scheduled { cached } => mail.scheduled = Some(cached),
            SequenceEvent::Token { index, id, logprobs } => {
                if mail.ids.is_empty() {
                    mail.first_index = index;
                }
                mail.ids.push(id);
                mail.logprobs.extend(logprobs);
            }
            SequenceEvent::Scores(scores) => mail.end = Some(End::Scores(scores)),
            SequenceEvent::Finished(_) => mail.end = Some(End::Finished),
            SequenceEvent::Failed(failure) => mail.end = Some(End::Failed(failure)),
        }
        drop(mail);
        self.0.arrived.notify_one();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After a regular end nobody reads this any more.
        lock(&self.0.mail).end.get_or_insert(End::Dropped);
        self.0.arrived.notify_one();
    }
}

fn lock(mail: &Mutex<Mail>) -> MutexGuard<'_, Mail> {
    mail.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tercet_engine::StopReason;

    use super::*;

    #[tokio::test]
    async fn unread_tokens_pile_up_in_order() {
        let (mut sink, mailbox) = mailbox();
        sink(SequenceEvent::Scheduled { cached: 0 });
        for index in 4..7 {
            sink(SequenceEvent::Token { index, id: 10, logprobs: None });
        }
        let mail = mailbox.receive().await;
        assert!(mail.scheduled == Some(0) && mail.end.is_none());
        assert_eq!((mail.first_index, mail.ids), (4, vec![10; 3]));
        sink(SequenceEvent::Finished(StopReason::Eos));
        drop(sink);
        let mail = mailbox.receive().await;
        assert!(matches!(mail.end, Some(End::Finished)), "{mail:?}");
    }

    #[tokio::test]
    async fn a_dropped_sink_is_noticed() {
        let (sink, mailbox) = mailbox();
        let (mail, ()) = tokio::join!(mailbox.receive(), async { drop(sink) });
        assert!(matches!(mail.end, Some(End::Dropped)), "{mail:?}");
    }
}
