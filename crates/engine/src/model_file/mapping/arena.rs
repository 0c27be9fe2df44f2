//! Memory of huge pages that weights are copied to.
//!
//! A step reads every weight once, far more than the address cache of a CPU covers in pages of
//! 4 KiB: each needs a walk of the page tables, two of them inside each other in a virtual machine.
//! The pages of a mapped file cannot be huge on the usual file systems; anonymous memory can.

use std::fmt;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{Advice, MmapMut, MmapRaw};
use tercet_kernels::WeightBytes;

/// Where each copy starts: a cache line.
const ALIGNMENT: usize = 64;
/// Least bytes that are worth it: a few huge pages.
const LEAST: usize = 8 << 20;
/// What the system says of transparent huge pages, such as `always [madvise] never`.
const POLICY: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// One piece of anonymous memory, given away part by part.
pub(crate) struct Arena {
    map: MmapRaw,
    used: AtomicUsize,
}

impl Arena {
    /// Returns room for `parts` parts of `bytes` bytes together, `None` if that is little, or the
    /// system has no huge pages or not the memory.
    pub(crate) fn new(bytes: usize, parts: usize) -> Option<Arc<Self>> {
        let policy = fs::read_to_string(POLICY).ok()?;
        if bytes < LEAST || policy.contains("[never]") {
            return None;
        }
        let map = MmapMut::map_anon(bytes.checked_add(parts * ALIGNMENT)?).ok()?;
        map.advise(Advice::HugePage).ok()?;
        Some(Arc::new(Self { map: map.into(), used: AtomicUsize::new(0) }))
    }

    /// Returns a copy of `bytes` that lives here, `None` if the room is used up.
    pub(crate) fn copy(self: &Arc<Self>, bytes: &[u8]) -> Option<WeightBytes> {
        let room = bytes.len().next_multiple_of(ALIGNMENT);
        let take = |used: usize| used.checked_add(room).filter(|end| *end <= self.map.len());
        let start = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        // SAFETY: `start` is inside the mapping, by the bound on `used`.
        let place = unsafe { self.map.as_mut_ptr().add(start) };
        // SAFETY: the room from `start` was taken by this call alone and is at least as long as
        // `bytes`, which cannot overlap with it since nobody has a reference to it yet.
        unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        let part = Part { arena: Arc::clone(self), start, len: bytes.len() };
        WeightBytes::shared(Arc::new(part), 0..bytes.len())
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena")
            .field("len", &self.map.len())
            .field("used", &self.used)
            .finish_non_exhaustive()
    }
}

/// Bytes of an arena that were written once and are never written again.
struct Part {
    arena: Arc<Arena>,
    start: usize,
    len: usize,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `start` is inside the mapping.
        let place = unsafe { self.arena.map.as_ptr().add(self.start) };
        // SAFETY: the part was initialised before this value was made; no other part overlaps it.
        unsafe { std::slice::from_raw_parts(place, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_apart_and_end_with_the_room() {
        // A system without huge pages has no arena; there is nothing to test then.
        let Some(arena) = Arena::new(LEAST, 2) else { return };
        let first = arena.copy(&vec![1; LEAST - 100]).unwrap();
        let second = arena.copy(&[2; 100]).unwrap();
        assert!(arena.copy(&[3; 65]).is_none());
        drop(arena);
        assert!(first.iter().all(|byte| *byte == 1));
        assert_eq!(second[..], [2; 100]);
        assert_eq!(second.as_ptr().addr() % ALIGNMENT, 0);
        assert!(Arena::new(LEAST - 1, 1).is_none());
    }
}
