//! The compute threads of the process.

use std::sync::Mutex;

use rayon::{ThreadPool, ThreadPoolBuilder};
use tercet_kernels::{Crew, Lead};
use thiserror::Error;

/// The compute threads could not be made.
#[derive(Debug, Error)]
pub enum PoolError {
    /// At least one thread computes.
    #[error("threads must be at least 1")]
    NoThreads,
    /// The operating system refused.
    #[error("start {threads} compute threads")]
    Start {
        /// Threads asked for.
        threads: usize,
        /// Why.
        source: rayon::ThreadPoolBuildError,
    },
}

/// Threads that compute one region at a time.
///
/// A region is one `broadcast`: its first thread leads, the others follow it through the crew's
/// atomics, so that the hundreds of products of a step cost hand-overs between spinning threads
/// and no fork and join each.
#[derive(Debug)]
pub(crate) struct ComputePool {
    crew: Crew,
    /// Absent for one thread: the caller's own thread then does everything.
    threads: Option<ThreadPool>,
}

impl ComputePool {
    /// Starts `threads` compute threads.
    pub(crate) fn new(threads: usize) -> Result<Self, PoolError> {
        if threads == 0 {
            return Err(PoolError::NoThreads);
        }
        let pool = (threads > 1)
            .then(|| {
                ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|index| format!("tercet-compute-{index}"))
                    .build()
            })
            .transpose()
            .map_err(|source| PoolError::Start { threads, source })?;
        Ok(Self { crew: Crew::new(threads), threads: pool })
    }

    /// Runs `f` as the leader of a region of all threads.
    pub(crate) fn region<R: Send>(&self, f: impl FnOnce(&Lead<'_>) -> R + Send) -> R {
        let Some(threads) = &self.threads else { return self.crew.lead(f) };
        let leader = Mutex::new(Some(f));
        let results = threads.broadcast(|thread| {
            if thread.index() > 0 {
                self.crew.serve(thread.index());
                return None;
            }
            let f = leader.lock().ok().and_then(|mut slot| slot.take());
            f.map(|f| self.crew.lead(f))
        });
        results.into_iter().flatten().next().expect("exactly one thread of a broadcast has index 0")
    }
}
