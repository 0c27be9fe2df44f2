//! The KV cache of a stage: an array of pages of 64 positions, and which sequence has which.
//!
//! ```text
//! page = [layer of the stage][kv head][ K: 64 x head_dim | V: 64 x head_dim ]   f32
//! ```
//!
//! A page is also the block of the attention's online softmax, so a block is one contiguous read.
//! Which page holds which positions never changes a result. The scheduler of the first stage deals
//! out the page numbers for all stages; here they are followed, and checked: a page is written by
//! one sequence, and shared once it is full. Positions that hold drafts, and no others, may be written
//! again.

use std::collections::HashMap;

use thiserror::Error;

use crate::{
    model_file::ModelConfig,
    plan::{PageId, SequenceId},
};

/// Positions in a page.
pub const PAGE_POSITIONS: usize = 64;

/// Returns how many pages hold `positions` positions.
pub(crate) fn pages_for(positions: usize) -> usize {
    positions.div_ceil(PAGE_POSITIONS)
}

/// Shape of what is kept for one position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvShape {
    /// Layers of the stage.
    pub(crate) layers: usize,
    /// Key and value heads.
    pub(crate) kv_heads: usize,
    /// Elements of a head.
    pub(crate) head_dim: usize,
}

impl KvShape {
    /// Returns the shape for that many layers of a model.
    pub(crate) fn new(config: &ModelConfig, layers: usize) -> Self {
        Self { layers, kv_heads: config.kv_heads, head_dim: config.head_dim }
    }

    /// Returns the bytes of a page.
    pub(crate) fn page_bytes(&self) -> usize {
        self.page_floats() * size_of::<f32>()
    }

    fn page_floats(&self) -> usize {
        self.layers * self.kv_heads * 2 * self.half_block()
    }

    /// Elements of the K half, or the V half, of one head's block.
    fn half_block(&self) -> usize {
        PAGE_POSITIONS * self.head_dim
    }
}

/// A step asked for something that the stage cannot do: the first stage deals out the pages, so it
/// is a defect or a peer that does not keep to the protocol.
#[derive(Debug, Error)]
pub enum KvError {
    /// There is no such page.
    #[error("sequence {sequence} is given page {page} of {pages}: page numbers are below that")]
    NoPage {
        /// The sequence.
        sequence: SequenceId,
        /// The page.
        page: PageId,
        /// Pages of the stage.
        pages: usize,
    },
    /// A page to write is held by a sequence.
    #[error("sequence {sequence} is to write page {page}, which a sequence has already")]
    Taken {
        /// The sequence.
        sequence: SequenceId,
        /// The page.
        page: PageId,
    },
    /// A page to share has not been written to its end, or is named twice.
    #[error("sequence {sequence} is to share page {page}, which is not full or named twice")]
    NotShareable {
        /// The sequence.
        sequence: SequenceId,
        /// The page.
        page: PageId,
    },
    /// Rows and the pages for them do not match.
    #[error(
        "sequence {sequence} needs {due} more pages for {positions} positions, {got} are given"
    )]
    PageCount {
        /// The sequence.
        sequence: SequenceId,
        /// Positions after the run.
        positions: usize,
        /// Pages that came.
        got: usize,
        /// Pages that are needed.
        due: usize,
    },
    /// Rows must follow the positions already held, or come in place of drafts.
    #[error("sequence {sequence} continues at position {position}, but {held} positions are held")]
    Gap {
        /// The sequence.
        sequence: SequenceId,
        /// First position of the run.
        position: usize,
        /// Positions held.
        held: usize,
    },
}

/// The pages of one sequence, in order of position.
#[derive(Debug, Default)]
pub(crate) struct PageTable {
    pages: Vec<PageId>,
    positions: usize,
    /// The positions before this one are never written again; those after it hold drafts.
    settled: usize,
}

/// What is known of a page.
#[derive(Clone, Copy, Debug, Default)]
struct PageUse {
    /// Tables that hold it.
    users: u32,
    /// Written to its end.
    full: bool,
}

/// The KV cache of a stage.
#[derive(Debug)]
pub(crate) struct KvCache {
    shape: KvShape,
    floats: Vec<f32>,
    pages: Vec<PageUse>,
    in_use: usize,
    tables: HashMap<SequenceId, PageTable>,
}

impl KvCache {
    /// Reserves address space for `pages` pages; memory is touched as positions are written.
    pub(crate) fn new(shape: KvShape, pages: usize) -> Self {
        Self {
            shape,
            floats: vec![0.0; shape.page_floats() * pages],
            pages: vec![PageUse::default(); pages],
            in_use: 0,
            tables: HashMap::new(),
        }
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Returns the bytes of all pages.
    pub(crate) fn bytes(&self) -> usize {
        self.pages() * self.shape.page_bytes()
    }

    /// Returns how many pages open sequences have.
    pub(crate) fn pages_in_use(&self) -> usize {
        self.in_use
    }

    /// Begins `sequence` with `pages`, which hold its first positions.
    pub(crate) fn open(&mut self, sequence: SequenceId, pages: &[PageId]) -> Result<(), KvError> {
        if let Some(page) = twice(pages) {
            return Err(KvError::NotShareable { sequence, page });
        }
        for &page in pages {
            if !self.page_use(sequence, page)?.full {
                return Err(KvError::NotShareable { sequence, page });
            }
        }
        for &page in pages {
            self.take(page);
        }
        let positions = pages.len() * PAGE_POSITIONS;
        let table = PageTable { pages: pages.to_vec(), positions, settled: positions };
        self.tables.insert(sequence, table);
        Ok(())
    }

    /// Makes room for `rows` positions of `sequence` from `position` on, in `pages` where those
    /// that it has are full. The last `drafts` of them may be written again, by a later call that
    /// begins at one of them.
    pub(crate) fn extend(
        &mut self,
        sequence: SequenceId,
        position: usize,
        rows: usize,
        drafts: usize,
        pages: &[PageId],
    ) -> Result<(), KvError> {
        let table = self.tables.entry(sequence).or_default();
        let (held, positions) = (table.positions, position + rows);
        if position < table.settled || position > held {
            return Err(KvError::Gap { sequence, position, held });
        }
        let due = pages_for(positions).saturating_sub(table.pages.len());
        if pages.len() != due {
            return Err(KvError::PageCount { sequence, positions, got: pages.len(), due });
        }
        // Others may have come to share a page that drafts had filled.
        let mut again = table.pages.iter().skip(position / PAGE_POSITIONS);
        if let Some(&page) = again.find(|page| self.pages[page.0 as usize].users > 1) {
            return Err(KvError::Taken { sequence, page });
        }
        if let Some(page) = twice(pages) {
            return Err(KvError::Taken { sequence, page });
        }
        for &page in pages {
            if self.page_use(sequence, page)?.users > 0 {
                return Err(KvError::Taken { sequence, page });
            }
        }
        for &page in pages {
            self.take(page);
        }
        let table = self.tables.entry(sequence).or_default();
        table.pages.extend(pages);
        table.positions = positions;
        table.settled = positions - drafts;
        let full = positions / PAGE_POSITIONS;
        for (index, page) in table.pages.iter().enumerate().skip(position / PAGE_POSITIONS) {
            self.pages[page.0 as usize].full = index < full;
        }
        Ok(())
    }

    /// Takes the pages of `sequence` back; does nothing if it has none.
    pub(crate) fn release(&mut self, sequence: SequenceId) {
        for page in self.tables.remove(&sequence).into_iter().flat_map(|table| table.pages) {
            let page = &mut self.pages[page.0 as usize];
            page.users -= 1;
            self.in_use -= usize::from(page.users == 0);
        }
    }

    /// Takes all pages back, and forgets what they hold.
    pub(crate) fn clear(&mut self) {
        self.tables.clear();
        self.in_use = 0;
        self.pages.fill(PageUse::default());
    }

    fn page_use(&self, sequence: SequenceId, page: PageId) -> Result<PageUse, KvError> {
        let pages = self.pages();
        let known = self.pages.get(page.0 as usize).copied();
        known.ok_or(KvError::NoPage { sequence, page, pages })
    }

    /// Counts one more table that holds a page of the stage.
    fn take(&mut self, page: PageId) {
        let page = &mut self.pages[page.0 as usize];
        self.in_use += usize::from(page.users == 0);
        page.users += 1;
    }

    /// Returns the table of `sequence`, which is open.
    pub(crate) fn table(&self, sequence: SequenceId) -> &PageTable {
        &self.tables[&sequence]
    }

    /// Writes one position of one kv head.
    pub(crate) fn write(
        &mut self,
        sequence: SequenceId,
        layer: usize,
        position: usize,
        keys: &[f32],
        values: &[f32],
    ) {
        let head_dim = self.shape.head_dim;
        let half = self.shape.half_block();
        let page = self.tables[&sequence].pages[position / PAGE_POSITIONS];
        let inside = position % PAGE_POSITIONS * head_dim;
        for (kv_head, (key, value)) in
            keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim)).enumerate()
        {
            let start = self.block_start(page, layer, kv_head) + inside;
            self.floats[start..start + head_dim].copy_from_slice(key);
            self.floats[start + half..start + half + head_dim].copy_from_slice(value);
        }
    }

    /// Returns the K and V blocks of one kv head of one page: 64 x head_dim each, row-major; rows
    /// past the last written position hold garbage.
    pub(crate) fn block(
        &self,
        table: &PageTable,
        block: usize,
        layer: usize,
        kv_head: usize,
    ) -> (&[f32], &[f32]) {
        let half = self.shape.half_block();
        let start = self.block_start(table.pages[block], layer, kv_head);
        self.floats[start..start + 2 * half].split_at(half)
    }

    fn block_start(&self, page: PageId, layer: usize, kv_head: usize) -> usize {
        page.0 as usize * self.shape.page_floats()
            + (layer * self.shape.kv_heads + kv_head) * 2 * self.shape.half_block()
    }
}

/// Returns a page that is listed more than once.
fn twice(pages: &[PageId]) -> Option<PageId> {
    let mut sorted = pages.to_vec();
    sorted.sort_unstable();
    sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape { layers: 2, kv_heads: 2, head_dim: 4 };

    fn pages(numbers: impl IntoIterator<Item = u32>) -> Vec<PageId> {
        numbers.into_iter().map(PageId).collect()
    }

    #[test]
    fn positions_are_found_where_they_were_written() {
        let mut kv = KvCache::new(SHAPE, 4);
        let (a, b) = (SequenceId(1), SequenceId(2));
        for position in 0..70 {
            for (sequence, first) in [(a, 3), (b, 0)] {
                let page = if position == 0 { first } else { (first + 2) % 4 };
                let due = if position % 64 == 0 { pages([page]) } else { vec![] };
                kv.extend(sequence, position, 1, 0, &due).unwrap();
                for layer in 0..2 {
                    let tag = (sequence.0 * 1000 + layer as u64 * 500) as f32 + position as f32;
                    let keys: Vec<f32> = (0..8).map(|i| tag + i as f32 / 16.0).collect();
                    let values: Vec<f32> = keys.iter().map(|key| -key).collect();
                    kv.write(sequence, layer, position, &keys, &values);
                }
            }
        }
        // A third one shares a full page.
        let c = SequenceId(3);
        kv.open(c, &pages([0])).unwrap();
        for (sequence, owner, positions) in [(a, a, 70), (b, b, 70), (c, b, 64)] {
            let table = kv.table(sequence);
            assert_eq!(table.positions, positions);
            for position in 0..positions {
                let (keys, values) = kv.block(table, position / 64, 1, 1);
                let expected = (owner.0 * 1000 + 500) as f32 + position as f32 + 4.0 / 16.0;
                assert_eq!(keys[position % 64 * 4], expected);
                assert_eq!(values[position % 64 * 4], -expected);
            }
        }
        assert_eq!(kv.pages_in_use(), 4);
        kv.release(b);
        assert_eq!(kv.pages_in_use(), 3, "the shared page is still in use");
        kv.release(c);
        kv.release(a);
        assert_eq!(kv.pages_in_use(), 0);
    }

    #[test]
    fn rows_without_the_right_pages_are_refused() {
        let mut kv = KvCache::new(SHAPE, 3);
        let a = SequenceId(1);
        kv.extend(a, 0, 3, 0, &pages([2])).unwrap();
        assert!(matches!(
            kv.extend(a, 5, 1, 0, &[]),
            Err(KvError::Gap { position: 5, held: 3, .. })
        ));
        for given in [&pages([])[..], &pages([0, 1])] {
            assert!(matches!(
                kv.extend(a, 3, 62, 0, given),
                Err(KvError::PageCount { due: 1, positions: 65, .. })
            ));
        }
        for (given, expected) in [(3, "below"), (2, "has already"), (u32::MAX, "below")] {
            let error = kv.extend(a, 3, 62, 0, &pages([given])).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        kv.extend(a, 3, 62, 0, &pages([0])).unwrap();
    }

    #[test]
    fn only_full_pages_are_shared() {
        let mut kv = KvCache::new(SHAPE, 3);
        let (a, b) = (SequenceId(1), SequenceId(2));
        let refused = |kv: &mut KvCache, given: &[u32]| {
            let error = kv.open(b, &pages(given.iter().copied())).unwrap_err();
            matches!(error, KvError::NotShareable { .. } | KvError::NoPage { .. })
        };
        kv.extend(a, 0, 127, 0, &pages([0, 1])).unwrap();
        assert!(refused(&mut kv, &[1]), "half written");
        assert!(refused(&mut kv, &[2]), "never written");
        assert!(refused(&mut kv, &[0, 0]) && refused(&mut kv, &[9]));
        assert_eq!(kv.pages_in_use(), 2, "a refusal takes nothing");
        kv.open(b, &pages([0])).unwrap();
        assert!(matches!(
            kv.extend(b, 64, 1, 0, &pages([0])),
            Err(KvError::Taken { page: PageId(0), .. })
        ));
        kv.release(a);
        kv.release(b);
        assert!(refused(&mut kv, &[0, 1]), "half written when it was given up");
        kv.open(b, &pages([0])).unwrap();
        kv.extend(b, 64, 1, 0, &pages([1])).unwrap();
        kv.release(b);
        kv.extend(a, 0, 1, 0, &pages([0])).unwrap();
        assert!(refused(&mut kv, &[0]), "written anew");
        kv.release(a);
        kv.extend(a, 0, 64, 0, &pages([0])).unwrap();
        kv.clear();
        assert!(refused(&mut kv, &[0]), "forgotten");
        assert_eq!(kv.pages_in_use(), 0);
    }

    #[test]
    fn only_drafts_are_written_again() {
        let mut kv = KvCache::new(SHAPE, 3);
        let (a, b) = (SequenceId(1), SequenceId(2));
        kv.extend(a, 0, 60, 0, &pages([0])).unwrap();
        kv.extend(a, 60, 4, 3, &[]).unwrap();
        for position in [0, 59, 60, 65] {
            let refused = kv.extend(a, position, 1, 0, &[]);
            assert!(matches!(refused, Err(KvError::Gap { held: 64, .. })), "{position}");
        }
        // One of the drafts was right; two more follow it, into the next page.
        kv.extend(a, 62, 4, 2, &pages([1])).unwrap();
        assert!(matches!(kv.extend(a, 63, 1, 0, &[]), Err(KvError::Gap { .. })), "settled");
        kv.extend(a, 64, 1, 0, &[]).unwrap();
        kv.open(b, &pages([0])).unwrap();
        kv.release(b);
        kv.extend(a, 65, 63, 1, &[]).unwrap();
        kv.open(b, &pages([0, 1])).unwrap();
        let shared = kv.extend(a, 127, 1, 0, &[]);
        assert!(matches!(shared, Err(KvError::Taken { page: PageId(1), .. })), "{shared:?}");
        kv.release(b);
        kv.extend(a, 127, 1, 0, &[]).unwrap();
        kv.release(a);
        kv.open(b, &pages([0, 1])).unwrap();
    }

    #[test]
    fn a_page_is_full_no_longer_when_its_drafts_are_given_up() {
        let mut kv = KvCache::new(SHAPE, 2);
        let (a, b) = (SequenceId(1), SequenceId(2));
        kv.extend(a, 0, 64, 3, &pages([0])).unwrap();
        kv.extend(a, 61, 1, 0, &[]).unwrap();
        assert!(matches!(kv.open(b, &pages([0])), Err(KvError::NotShareable { .. })));
        kv.extend(a, 62, 2, 0, &[]).unwrap();
        kv.open(b, &pages([0])).unwrap();
    }
}
