//! The KV cache of a stage: pages of 64 positions, shared out to sequences.
//!
//! ```text
//! page = [layer of the stage][kv head][ K: 64 x head_dim | V: 64 x head_dim ]   f32
//! ```
//!
//! A page is also the block of the attention's online softmax, so a block is one contiguous read.
//! Which physical page holds which positions never changes a result. Every stage keeps its own
//! tables; the scheduler only counts pages, and all stages have at least as many as it counts.

use std::collections::HashMap;

use thiserror::Error;

use crate::plan::SequenceId;

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

/// A step asked for something that the stage cannot hold: the head counts pages, so it is a defect
/// or a peer that does not keep to the protocol.
#[derive(Debug, Error)]
pub enum KvError {
    /// More pages are needed than the stage has.
    #[error("sequence {sequence} needs a KV page and all {pages} are in use")]
    Full {
        /// The sequence.
        sequence: SequenceId,
        /// Pages of the stage.
        pages: usize,
    },
    /// Rows must follow the positions already held.
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
    pages: Vec<usize>,
    positions: usize,
}

/// The KV cache of a stage.
#[derive(Debug)]
pub(crate) struct KvCache {
    shape: KvShape,
    floats: Vec<f32>,
    pages: usize,
    free: Vec<usize>,
    tables: HashMap<SequenceId, PageTable>,
}

impl KvCache {
    /// Reserves address space for `pages` pages; memory is touched as positions are written.
    pub(crate) fn new(shape: KvShape, pages: usize) -> Self {
        Self {
            shape,
            floats: vec![0.0; shape.page_floats() * pages],
            pages,
            free: (0..pages).rev().collect(),
            tables: HashMap::new(),
        }
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Returns the bytes of all pages.
    pub(crate) fn bytes(&self) -> usize {
        self.pages * self.shape.page_bytes()
    }

    pub(crate) fn pages_in_use(&self) -> usize {
        self.pages - self.free.len()
    }

    /// Makes room for `rows` positions of `sequence` from `position` on.
    pub(crate) fn extend(
        &mut self,
        sequence: SequenceId,
        position: usize,
        rows: usize,
    ) -> Result<(), KvError> {
        let table = self.tables.entry(sequence).or_default();
        if position != table.positions {
            return Err(KvError::Gap { sequence, position, held: table.positions });
        }
        let positions = position + rows;
        while table.pages.len() < pages_for(positions) {
            let page = self.free.pop().ok_or(KvError::Full { sequence, pages: self.pages })?;
            table.pages.push(page);
        }
        table.positions = positions;
        Ok(())
    }

    /// Takes the pages of `sequence` back; does nothing if it has none.
    pub(crate) fn release(&mut self, sequence: SequenceId) {
        if let Some(table) = self.tables.remove(&sequence) {
            self.free.extend(table.pages.into_iter().rev());
        }
    }

    /// Returns the table of `sequence`, which `extend` has seen.
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

    fn block_start(&self, page: usize, layer: usize, kv_head: usize) -> usize {
        page * self.shape.page_floats()
            + (layer * self.shape.kv_heads + kv_head) * 2 * self.shape.half_block()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape { layers: 2, kv_heads: 2, head_dim: 4 };

    #[test]
    fn positions_are_found_where_they_were_written() {
        let mut kv = KvCache::new(SHAPE, 4);
        let (a, b) = (SequenceId(1), SequenceId(2));
        for position in 0..70 {
            for sequence in [a, b] {
                kv.extend(sequence, position, 1).unwrap();
                for layer in 0..2 {
                    let tag = (sequence.0 * 1000 + layer as u64 * 500) as f32 + position as f32;
                    let keys: Vec<f32> = (0..8).map(|i| tag + i as f32 / 16.0).collect();
                    let values: Vec<f32> = keys.iter().map(|key| -key).collect();
                    kv.write(sequence, layer, position, &keys, &values);
                }
            }
        }
        for sequence in [a, b] {
            let table = kv.table(sequence);
            for position in 0..70 {
                let (keys, values) = kv.block(table, position / 64, 1, 1);
                let expected = (sequence.0 * 1000 + 500) as f32 + position as f32 + 4.0 / 16.0;
                assert_eq!(keys[position % 64 * 4], expected);
                assert_eq!(values[position % 64 * 4], -expected);
            }
        }
        assert_eq!(kv.pages_in_use(), 4);
    }

    #[test]
    fn a_full_cache_is_an_error_and_released_pages_come_back() {
        let mut kv = KvCache::new(SHAPE, 2);
        kv.extend(SequenceId(1), 0, 128).unwrap();
        assert!(matches!(kv.extend(SequenceId(2), 0, 1), Err(KvError::Full { pages: 2, .. })));
        kv.release(SequenceId(2));
        kv.release(SequenceId(1));
        assert_eq!(kv.pages_in_use(), 0);
        kv.extend(SequenceId(2), 0, 65).unwrap();
        assert_eq!(kv.pages_in_use(), 2);
    }

    #[test]
    fn a_gap_is_an_error() {
        let mut kv = KvCache::new(SHAPE, 2);
        kv.extend(SequenceId(1), 0, 3).unwrap();
        assert!(matches!(
            kv.extend(SequenceId(1), 5, 1),
            Err(KvError::Gap { position: 5, held: 3, .. })
        ));
    }
}
