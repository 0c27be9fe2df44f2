//! What goes on at a synthetic worker.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use tercet_proto::Reason;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::Instant,
};
use tonic::Status;

use super::Options;

/// When a caller that was refused may come back.
const RETRY_AFTER: std::time::Duration = std::time::Duration::from_secs(1);

/// Slots, the queue before them, and counts of both.
#[derive(Debug)]
pub(super) struct Load {
    slots: Arc<Semaphore>,
    /// Since when slots are free, by the schedules of those who had them.
    free: Mutex<VecDeque<Instant>>,
    queue: u32,
    waiting: AtomicU32,
    running: AtomicU32,
    outstanding: AtomicU64,
    steps: AtomicU64,
    /// Requests aboard; changes with them.
    pub(super) aboard: watch::Sender<u32>,
}

/// A request aboard, until dropped.
#[derive(Debug)]
pub(super) struct Aboard {
    load: Arc<Load>,
    boarded: Instant,
    slot: Option<OwnedSemaphorePermit>,
    /// When its slot is free again, by its schedule; `None` if it has not ended by itself.
    until: Option<Instant>,
    tokens: u64,
}

/// The counts at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) running: u32,
    pub(super) waiting: u32,
    pub(super) outstanding: u64,
    pub(super) steps: u64,
}

impl Load {
    pub(super) fn new(options: &Options) -> Arc<Self> {
        let slots = usize::try_from(options.slots).unwrap_or(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            slots: Arc::new(Semaphore::new(slots)),
            free: Mutex::default(),
            queue: options.queue,
            waiting: AtomicU32::new(0),
            running: AtomicU32::new(0),
            outstanding: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            aboard: watch::Sender::new(0),
        })
    }

    /// Takes a request that may take `tokens` tokens, into a free slot or the queue.
    pub(super) fn board(self: &Arc<Self>, tokens: u32) -> Result<Aboard, Status> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().ok();
        if slot.is_some() {
            self.running.fetch_add(1, Ordering::Relaxed);
        } else {
            let queued =
                self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |waiting| {
                    (waiting < self.queue).then_some(waiting + 1)
                });
            if queued.is_err() {
                let message = format!("{} requests wait already", self.queue);
                return Err(Reason::Overloaded.status_retry_after(message, RETRY_AFTER));
            }
        }
        let tokens = u64::from(tokens);
        self.outstanding.fetch_add(tokens, Ordering::Relaxed);
        self.aboard.send_modify(|aboard| *aboard += 1);
        let boarded = Instant::now();
        Ok(Aboard { load: Arc::clone(self), boarded, slot, until: None, tokens })
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            running: self.running.load(Ordering::Relaxed),
            waiting: self.waiting.load(Ordering::Relaxed),
            outstanding: self.outstanding.load(Ordering::Relaxed),
            steps: self.steps.load(Ordering::Relaxed),
        }
    }
}

impl Aboard {
    /// Waits for a slot, and returns since when it was there for the taking.
    ///
    /// That may be a moment ago: what this machine takes to wake a stream up is not the time of the
    /// machine that is made believe, and in long queues it would add up.
    pub(super) async fn slot(&mut self) -> Instant {
        if self.slot.is_none() {
            let slots = Arc::clone(&self.load.slots);
            self.slot = Some(slots.acquire_owned().await.expect("nobody closes the slots"));
            self.load.waiting.fetch_sub(1, Ordering::Relaxed);
            self.load.running.fetch_add(1, Ordering::Relaxed);
        }
        let free = self.load.free.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        // A slot that nobody has had yet.
        free.map_or(self.boarded, |free| free.max(self.boarded))
    }

    /// Frees the slot at that time, when it is dropped.
    pub(super) fn plan(&mut self, until: Instant) {
        self.until = Some(until);
    }

    /// Counts a token.
    pub(super) fn step(&mut self) {
        self.load.steps.fetch_add(1, Ordering::Relaxed);
        let counted = self.tokens.min(1);
        self.tokens -= counted;
        self.load.outstanding.fetch_sub(counted, Ordering::Relaxed);
    }
}

impl Drop for Aboard {
    fn drop(&mut self) {
        let count = if self.slot.is_some() { &self.load.running } else { &self.load.waiting };
        if self.slot.is_some() {
            let mut free = self.load.free.lock().unwrap_or_else(PoisonError::into_inner);
            free.push_back(self.until.unwrap_or_else(Instant::now));
        }
        count.fetch_sub(1, Ordering::Relaxed);
        self.load.outstanding.fetch_sub(self.tokens, Ordering::Relaxed);
        self.load.aboard.send_modify(|aboard| *aboard -= 1);
    }
}
