//! The meeting point of the threads of one compute region.
//!
//! A step of a model is hundreds of short parallel parts with a little serial work between them.
//! Fork and join through a queue would cost more than some of the parts, so the threads stay
//! together for the whole step: one leads and publishes parts, the others follow, all through a
//! few atomics.
//!
//! Each follower has a slot:
//!
//! ```text
//!            leader: parts published        claimed by its follower,
//!                                           or by the leader if the follower is late
//!   IDLE ------------------------> READY ------------------------------> CLAIMED
//!    ^                                                                      |
//!    +----------------------------------------------------------------------+
//!                             claimer: part done (or panicked)
//! ```
//!
//! The published work lives on the leader's stack. It is read only between a successful claim and
//! the return to `IDLE`, and the leader waits for every slot to be `IDLE` before it goes on, so a
//! late follower finds nothing to claim and touches nothing. A follower that is not running costs
//! no wait at all: the leader does the part itself.

use std::{
    any::Any,
    cell::UnsafeCell,
    fmt,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    thread,
};

const IDLE: u8 = 0;
const READY: u8 = 1;
const CLAIMED: u8 = 2;

/// Spins before a waiting thread begins to yield: about 20 us, longer than the serial work between
/// most parts, much shorter than a time slice.
const SPINS: u32 = 1000;

/// The threads of a compute region: a leader, and followers that take parts from it.
///
/// The crew creates no thread. For each region, one thread calls [`lead`](Self::lead) and each of
/// the others calls [`serve`](Self::serve) once, in any order.
pub struct Crew {
    /// One slot a follower.
    slots: Vec<Slot>,
    /// The work whose parts may be claimed. Written only by the leader while every slot is `IDLE`;
    /// read only by a thread that has claimed a slot.
    work: UnsafeCell<Option<&'static dyn Work>>,
    /// Whether some thread leads.
    led: AtomicBool,
    /// Regions that have ended.
    ended: AtomicU64,
}

// SAFETY: `work` is the only field that is not `Sync`; its field documentation states when it is
// written and read, and the slots' acquire and release order these.
unsafe impl Sync for Crew {}

// SAFETY: the references in `work` are to `Sync` values.
unsafe impl Send for Crew {}

/// On a cache line of its own, since each follower watches its slot.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Slot {
    state: AtomicU8,
    /// Regions that the follower has served.
    served: AtomicU64,
}

/// Parts of a job, by index.
trait Work: Sync {
    /// Does one part; never unwinds.
    fn part(&self, index: usize);
}

impl Crew {
    /// Returns a crew of a leader and `threads - 1` followers.
    ///
    /// # Panics
    /// If `threads` is zero.
    pub fn new(threads: usize) -> Self {
        assert!(threads > 0, "a crew needs at least the leader");
        Self {
            slots: (1..threads).map(|_| Slot::default()).collect(),
            work: UnsafeCell::new(None),
            led: AtomicBool::new(false),
            ended: AtomicU64::new(0),
        }
    }

    /// Returns the number of threads, leader included.
    pub fn threads(&self) -> usize {
        self.slots.len() + 1
    }

    /// Leads one region: runs `f`, then lets the followers go, also when `f` panics.
    ///
    /// # Panics
    /// If another thread leads already.
    pub fn lead<R>(&self, f: impl FnOnce(&Lead<'_>) -> R) -> R {
        assert!(!self.led.swap(true, Ordering::Acquire), "the crew has a leader already");
        let lead = Lead { crew: self, not_sync: PhantomData };
        f(&lead)
    }

    /// Follows one region as thread `index`, from 1: takes parts until the leader ends it.
    ///
    /// Returns at once if the leader has ended the region before this call.
    ///
    /// # Panics
    /// If the crew has no such follower.
    pub fn serve(&self, index: usize) {
        assert!(
            (1..self.threads()).contains(&index),
            "no follower {index} in a crew of {} threads",
            self.threads()
        );
        let slot = &self.slots[index - 1];
        let served = slot.served.fetch_add(1, Ordering::Relaxed);
        let mut wait = Wait::default();
        while self.ended.load(Ordering::Acquire) <= served {
            if self.claim_and_run(index) {
                wait = Wait::default();
            } else {
                wait.turn();
            }
        }
    }

    /// Does the published part `index` unless another thread has claimed it or there is none.
    fn claim_and_run(&self, index: usize) -> bool {
        let state = &self.slots[index - 1].state;
        let claimed = state.load(Ordering::Relaxed) == READY
            && state.compare_exchange(READY, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok();
        if claimed {
            // SAFETY: the slot is claimed by this thread, so the leader does not write `work`.
            let work = unsafe { *self.work.get() };
            if let Some(work) = work {
                work.part(index);
            }
            state.store(IDLE, Ordering::Release);
        }
        claimed
    }

    /// Waits until part `index` is done; does it here if nobody has begun it.
    fn finish(&self, index: usize) {
        self.claim_and_run(index);
        let mut wait = Wait::default();
        while self.slots[index - 1].state.load(Ordering::Acquire) != IDLE {
            wait.turn();
        }
    }
}

impl fmt::Debug for Crew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew")
            .field("threads", &self.threads())
            .field("led", &self.led)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

/// The leader's side of a region.
pub struct Lead<'a> {
    crew: &'a Crew,
    /// A part must not publish parts itself: `run` belongs to the leader's thread, outside parts.
    not_sync: PhantomData<*const ()>,
}

impl Lead<'_> {
    /// Returns the number of threads, leader included.
    pub fn threads(&self) -> usize {
        self.crew.threads()
    }

    /// Runs `f(i, parts[i])` for every part, part `i` on thread `i` (the leader is thread 0),
    /// and returns when all are done.
    ///
    /// A part whose thread is late is done by the leader. No two calls share an `i`.
    ///
    /// # Panics
    /// If there are more parts than threads. A panic of a part goes on here, once the other parts
    /// are done; if several panic, it is one of them.
    pub fn run<T: Send>(&self, parts: Vec<T>, f: impl Fn(usize, T) + Sync) {
        assert!(
            parts.len() <= self.threads(),
            "{} parts for {} threads",
            parts.len(),
            self.threads()
        );
        let count = parts.len();
        let job = Job {
            parts: parts.into_iter().map(|part| Mutex::new(Some(part))).collect(),
            f,
            panic: Mutex::new(None),
        };
        if count > 1 {
            self.publish(&job, count);
        } else if count == 1 {
            job.part(0);
        }
        let panic = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Offers parts 1.. to the followers, does part 0, and returns when all are done.
    fn publish(&self, work: &dyn Work, count: usize) {
        // SAFETY: only the lifetime changes. The reference is read by claimers only, and this
        // function returns (it cannot unwind: parts catch panics) after every claimer is done.
        let work = unsafe { std::mem::transmute::<&dyn Work, &'static dyn Work>(work) };
        // SAFETY: every slot is idle (the previous call waited for that, and `led` excludes
        // another leader), so nobody reads it.
        unsafe { *self.crew.work.get() = Some(work) };
        for slot in &self.crew.slots[..count - 1] {
            slot.state.store(READY, Ordering::Release);
        }
        work.part(0);
        for index in 1..count {
            self.crew.finish(index);
        }
    }
}

impl fmt::Debug for Lead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lead({} threads)", self.threads())
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        self.crew.led.store(false, Ordering::Release);
        self.crew.ended.fetch_add(1, Ordering::Release);
    }
}

struct Job<T, F> {
    /// Each taken once; the lock is never contended.
    parts: Vec<Mutex<Option<T>>>,
    f: F,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<T: Send, F: Fn(usize, T) + Sync> Work for Job<T, F> {
    fn part(&self, index: usize) {
        let taken = self.parts[index].lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(part) = taken else { return };
        // The caller sees the panic again, with whatever state the part left behind, exactly as if
        // it had called the part itself.
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (self.f)(index, part))) {
            let first = self.panic.lock().unwrap_or_else(PoisonError::into_inner).replace(payload);
            // Dropping a payload may panic itself, which must not unwind from here.
            std::mem::forget(first);
        }
    }
}

/// Waiting that spins at first, then lets other threads have the core.
#[derive(Debug, Default)]
struct Wait {
    turns: u32,
}

impl Wait {
    fn turn(&mut self) {
        if self.turns < SPINS {
            self.turns += 1;
            std::hint::spin_loop();
        } else {
            thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Runs regions on real threads: `f` leads each of them.
    fn regions(threads: usize, count: usize, f: impl Fn(&Lead<'_>, usize) + Sync) {
        let crew = Crew::new(threads);
        thread::scope(|scope| {
            for index in 1..threads {
                let crew = &crew;
                scope.spawn(move || (0..count).for_each(|_| crew.serve(index)));
            }
            // All regions are led, whatever happens: a follower that waits for one would keep a
            // failed test from ending.
            let led: Vec<_> = (0..count)
                .map(|region| catch_unwind(AssertUnwindSafe(|| crew.lead(|lead| f(lead, region)))))
                .collect();
            if let Some(payload) = led.into_iter().find_map(Result::err) {
                resume_unwind(payload);
            }
        });
    }

    #[test]
    fn every_part_runs_once_in_many_tiny_runs() {
        for threads in [1, 2, 4] {
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            let (regions_count, runs) = (200, 100);
            regions(threads, regions_count, |lead, region| {
                for run in 0..runs {
                    // Written by the parts without atomics: a lost hand-over would show.
                    let mut cells = vec![usize::MAX; threads];
                    let parts: Vec<_> = cells.iter_mut().collect();
                    lead.run(parts, |index, cell| {
                        *cell = region * runs + run + index;
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    });
                    for (index, cell) in cells.into_iter().enumerate() {
                        assert_eq!(cell, region * runs + run + index);
                    }
                }
            });
            for count in counts {
                assert_eq!(count.into_inner(), regions_count * runs);
            }
        }
    }

    #[test]
    fn fewer_parts_than_threads_leave_the_others_alone() {
        regions(4, 50, |lead, _| {
            for parts in 0..=4_usize {
                let sum = AtomicUsize::new(0);
                lead.run((0..parts).collect(), |index, part| {
                    assert_eq!(index, part);
                    sum.fetch_add(part + 1, Ordering::Relaxed);
                });
                assert_eq!(sum.into_inner(), parts * (parts + 1) / 2);
            }
        });
    }

    #[test]
    fn absent_followers_are_not_waited_for() {
        let crew = Crew::new(3);
        let sum = AtomicUsize::new(0);
        crew.lead(|lead| {
            lead.run(vec![1, 2, 4], |_, part: usize| {
                sum.fetch_add(part, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 7);
        // The region is over: a follower that arrives now returns at once.
        crew.serve(1);
        crew.serve(2);
    }

    #[test]
    fn a_panic_of_any_part_reaches_the_leader() {
        for panicking in 0..3_usize {
            let done = AtomicUsize::new(0);
            regions(3, 20, |lead, _| {
                let caught = catch_unwind(AssertUnwindSafe(|| {
                    lead.run(vec![(); 3], |index, ()| {
                        if index == panicking {
                            // Not `panic!`: the hook would print a message for each.
                            resume_unwind(Box::new(index));
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    });
                }));
                let payload = caught.expect_err("the part panicked");
                assert_eq!(payload.downcast_ref(), Some(&panicking));
                // The crew is as good as new.
                lead.run(vec![(); 3], |_, ()| {});
            });
            assert_eq!(done.into_inner(), 2 * 20);
        }
    }

    #[test]
    fn followers_leave_when_the_leader_panics() {
        let crew = Crew::new(2);
        thread::scope(|scope| {
            scope.spawn(|| crew.serve(1));
            let caught = catch_unwind(AssertUnwindSafe(|| {
                crew.lead(|_| resume_unwind(Box::new("leader")));
            }));
            assert!(caught.is_err());
        });
    }

    #[test]
    fn a_second_leader_is_refused() {
        let crew = Crew::new(1);
        crew.lead(|_| {
            let second = catch_unwind(AssertUnwindSafe(|| crew.lead(|_| {})));
            assert!(second.is_err());
        });
        crew.lead(|_| {});
    }

    #[test]
    #[should_panic(expected = "3 parts for 2 threads")]
    fn more_parts_than_threads_are_refused() {
        Crew::new(2).lead(|lead| lead.run(vec![(); 3], |_, ()| {}));
    }
}
