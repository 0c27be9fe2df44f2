//! The compute threads of the process.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};
use tercet_kernels::{Crew, Lead};
use thiserror::Error;

use crate::model_file::{LoadProgress, ModelError, Report, StageWeights};

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

/// The compute threads, for all engines and stages of a process. Clones are handles to the same
/// threads.
///
/// Whoever computes a step waits for its turn first and keeps it to the end of the step, so no more
/// threads compute than the pool has. Turns are given in the order in which they were asked for:
/// an engine that has just had one comes after all that wait.
#[derive(Clone, Debug)]
pub struct ComputePool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    crew: Crew,
    threads: ThreadPool,
    turns: Mutex<Turns>,
    /// Told whenever a turn ends.
    ended: Condvar,
}

/// Numbers as at a counter.
#[derive(Debug, Default)]
struct Turns {
    /// Whose turn it is.
    serving: u64,
    /// What the next to come gets.
    next: u64,
}

/// Weights whose digests are those that a native file tells, to be compared with the weights.
#[derive(Debug)]
pub struct Unverified {
    pool: ComputePool,
    weights: Arc<StageWeights>,
}

impl Unverified {
    pub(crate) fn new(pool: &ComputePool, weights: &Arc<StageWeights>) -> Option<Self> {
        weights.claims.as_ref()?;
        Some(Self { pool: pool.clone(), weights: Arc::clone(weights) })
    }

    /// Hashes the weights, in turns with the steps of requests, and tells `report` how far it is.
    ///
    /// # Errors
    /// If the file has lied, and [`ModelError::Interrupted`].
    pub fn verify(self, report: Report<'_>) -> Result<(), ModelError> {
        let mut progress = LoadProgress::of(self.weights.hashed_bytes());
        self.weights.verify_by(&mut |bytes, piece| {
            self.pool.install(piece);
            progress.advance(bytes, report)
        })
    }
}

/// The right to compute, until dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Shared);

impl ComputePool {
    /// Starts `threads` compute threads.
    ///
    /// # Errors
    /// If `threads` is 0, or the operating system starts none.
    pub fn new(threads: usize) -> Result<Self, PoolError> {
        if threads == 0 {
            return Err(PoolError::NoThreads);
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("tercet-compute-{index}"))
            .build()
            .map_err(|source| PoolError::Start { threads, source })?;
        Ok(Self(Arc::new(Shared {
            crew: Crew::new(threads),
            threads: pool,
            turns: Mutex::default(),
            ended: Condvar::new(),
        })))
    }

    /// Returns the number of compute threads.
    pub fn threads(&self) -> usize {
        self.0.crew.threads()
    }

    /// Waits for a turn.
    pub(crate) fn turn(&self) -> Turn<'_> {
        let mut turns = lock(&self.0.turns);
        let own = turns.next;
        turns.next += 1;
        let waited = self.0.ended.wait_while(turns, |turns| turns.serving != own);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        Turn(&self.0)
    }

    /// Returns the digests of weights, hashed in turns, and tells `report` how far it is; those that
    /// a native file tells are not computed.
    pub(crate) fn part_digests(
        &self,
        weights: &StageWeights,
        report: Report<'_>,
    ) -> Result<Vec<(String, [u8; 32])>, ModelError> {
        if let Some(claims) = &weights.claims {
            return Ok(claims.digests.clone());
        }
        let mut progress = LoadProgress::of(weights.hashed_bytes());
        weights.part_digests_by(&mut |bytes, piece| {
            self.install(piece);
            progress.advance(bytes, report)
        })
    }

    /// Takes a turn and runs something in it that is parallel by itself.
    pub(crate) fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        let _turn = self.turn();
        self.0.threads.install(f)
    }

    /// Runs `f` as the leader of a region of all threads. The caller has a turn.
    ///
    /// A region is one `broadcast`: its first thread leads, the others follow it through the crew's
    /// atomics, so that the hundreds of products of a step cost hand-overs between spinning threads
    /// and no fork and join each.
    pub(crate) fn region<R: Send>(&self, f: impl FnOnce(&Lead<'_>) -> R + Send) -> R {
        let Shared { crew, threads, .. } = &*self.0;
        if crew.threads() == 1 {
            // Saves the hand-over: the caller waits in any case.
            return crew.lead(f);
        }
        let leader = Mutex::new(Some(f));
        let results = threads.broadcast(|thread| {
            if thread.index() > 0 {
                crew.serve(thread.index());
                return None;
            }
            let f = leader.lock().ok().and_then(|mut slot| slot.take());
            f.map(|f| crew.lead(f))
        });
        results.into_iter().flatten().next().expect("exactly one thread of a broadcast has index 0")
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.0.turns).serving += 1;
        self.0.ended.notify_all();
    }
}

/// Locks; nothing above can panic half way.
fn lock(turns: &Mutex<Turns>) -> MutexGuard<'_, Turns> {
    turns.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        thread,
    };

    use super::*;

    fn waiting(pool: &ComputePool) -> u64 {
        let turns = lock(&pool.0.turns);
        turns.next - turns.serving
    }

    #[test]
    fn turns_are_given_in_the_order_they_were_asked_for() {
        let pool = ComputePool::new(1).unwrap();
        let log = Mutex::new(Vec::new());
        let first = pool.turn();
        thread::scope(|scope| {
            for id in 0..8 {
                let (pool, log) = (&pool, &log);
                scope.spawn(move || {
                    for _ in 0..3 {
                        let _turn = pool.turn();
                        log.lock().unwrap().push(id);
                    }
                });
                while waiting(pool) < id + 2 {
                    thread::yield_now();
                }
            }
            drop(first);
        });
        let log = log.into_inner().unwrap();
        assert_eq!(log[..8], [0, 1, 2, 3, 4, 5, 6, 7], "who comes again comes after who waits");
        assert_eq!(log.len(), 24);
    }

    #[test]
    fn a_panic_in_a_turn_leaves_the_pool_usable() {
        for threads in [1, 3] {
            let pool = ComputePool::new(threads).unwrap();
            let ended = catch_unwind(AssertUnwindSafe(|| {
                let _turn = pool.turn();
                pool.region(|lead| {
                    lead.run(vec![(); threads], |part, ()| assert!(part > 0, "on purpose"));
                });
            }));
            assert!(ended.is_err());
            assert_eq!(waiting(&pool), 0);
            let _turn = pool.turn();
            let sum = Mutex::new(0);
            pool.region(|lead| {
                lead.run((0..threads).collect(), |_, part| *sum.lock().unwrap() += part);
            });
            assert_eq!(sum.into_inner().unwrap(), (0..threads).sum::<usize>());
        }
    }
}
