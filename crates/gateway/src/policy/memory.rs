//! Which workers were sent which pages: bounded, and the oldest is forgotten first.

use std::collections::HashMap;

use tercet_text::prefix::PageName;

/// Workers that are remembered for a page, the latest first.
pub(super) type Holders = [Option<u64>; 2];

/// The workers of the pages used last.
///
/// Two generations instead of one exact order: what is used moves to the young one, and when that
/// is full the old one is forgotten. Each use costs one look-up, nothing is ever sorted or linked.
#[derive(Debug)]
pub(super) struct Memory {
    /// Most pages of a generation.
    room: usize,
    young: HashMap<u128, Holders>,
    old: HashMap<u128, Holders>,
}

impl Memory {
    /// Returns a memory of at most `pages` pages, of which half are sure to be the latest.
    pub(super) fn new(pages: usize) -> Self {
        Self { room: (pages / 2).max(1), young: HashMap::new(), old: HashMap::new() }
    }

    /// Returns the workers that hold a page.
    pub(super) fn holders(&self, page: &PageName) -> Holders {
        let key = key(page);
        self.young.get(&key).or_else(|| self.old.get(&key)).copied().unwrap_or_default()
    }

    /// Remembers that a worker gets a page.
    pub(super) fn put(&mut self, page: &PageName, worker: u64) {
        let mut holders = self.holders(page);
        if holders[0] != Some(worker) {
            holders = [Some(worker), holders[0]];
        }
        if self.young.len() >= self.room && !self.young.contains_key(&key(page)) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key(page), holders);
    }
}

/// Returns half of the name: enough to be distinct.
fn key(page: &PageName) -> u128 {
    let (half, _) = page.as_bytes().split_first_chunk().expect("a name has 32 bytes");
    u128::from_le_bytes(*half)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_pages_are_remembered_and_no_more() {
        let mut memory = Memory::new(100);
        let ids: Vec<u32> = (0..64 * 1000).collect();
        let pages: Vec<_> = PageName::root(b"model", "").chain(&ids).collect();
        let hot = pages[0];
        for (at, page) in pages.iter().enumerate() {
            memory.put(page, at as u64);
            memory.put(&hot, 7);
            assert!(memory.young.len() + memory.old.len() <= 100);
            let from = at.saturating_sub(40);
            for (recent, page) in (from..=at).zip(&pages[from..]) {
                let expected = if recent == 0 { 7 } else { recent as u64 };
                assert_eq!(memory.holders(page)[0], Some(expected));
            }
        }
        assert_eq!(memory.holders(&pages[500]), [None; 2]);
        assert_eq!(memory.holders(&hot)[0], Some(7), "what is used stays");
    }

    #[test]
    fn the_last_two_workers_of_a_page_are_known() {
        let mut memory = Memory::new(10);
        let page = PageName::root(b"model", "");
        for worker in [1, 2, 2, 3] {
            memory.put(&page, worker);
        }
        assert_eq!(memory.holders(&page), [Some(3), Some(2)]);
        memory.put(&page, 2);
        assert_eq!(memory.holders(&page), [Some(2), Some(3)]);
    }
}
