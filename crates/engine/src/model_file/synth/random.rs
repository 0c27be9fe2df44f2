//! Counter-based random weights.

/// Consecutive dense weights that share a small integer scale, as in Q6_K.
pub(super) const GROUP: usize = 16;
/// Ternary weights drawn from one 64-bit word.
const WORD_CODES: usize = 32;

/// Four codes (weight + 1) for each byte.
///
/// 256 = 3 * 81 + 13: every combination of four codes has three bytes, and thirteen have a fourth:
/// the combination of zeros and six with their negations, so that the mean is exactly zero.
const FOUR_CODES: [[u8; 4]; 256] = four_codes();

const fn four_codes() -> [[u8; 4]; 256] {
    let mut table = [[0; 4]; 256];
    let mut byte = 0;
    while byte < 256 {
        // Combinations 34..=46 lie symmetrically around 40, which is four zeros.
        let mut rest = if byte < 243 { byte % 81 } else { byte - 243 + 34 };
        let mut place = 0;
        while place < 4 {
            #[expect(clippy::cast_possible_truncation, reason = "a remainder of 3")]
            let code = (rest % 3) as u8;
            table[byte][place] = code;
            rest /= 3;
            place += 1;
        }
        byte += 1;
    }
    table
}

/// Dense weights in their exact integer form: `weight = unit * scale * value`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Group {
    /// From -31 to 31.
    pub(super) values: [i8; GROUP],
    /// From 1 to 4.
    pub(super) scale: i8,
}

/// The random numbers of one tensor.
#[derive(Debug)]
pub(super) struct Stream {
    key: u64,
}

impl Stream {
    /// Keys the numbers by seed and tensor name.
    pub(super) fn new(seed: u64, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(name.as_bytes());
        let digest = *hasher.finalize().as_bytes();
        let key = digest.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Self { key }
    }

    /// Returns word `counter`: SplitMix64 (Steele, Lea, Flood 2014), which is a function of key
    /// and counter alone.
    fn word(&self, counter: u64) -> u64 {
        let mut z = self.key.wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number from 0 to 1.
    pub(super) fn unit(&self, counter: u64) -> f32 {
        #[expect(clippy::cast_precision_loss, reason = "24 bits are exact in f32")]
        let value = (self.word(counter) >> 40) as f32;
        value / 16_777_216.0
    }

    /// Returns false or true, of bits that [`unit`](Self::unit) leaves.
    pub(super) fn coin(&self, counter: u64) -> bool {
        self.word(counter) & 1 == 1
    }

    /// Fills a row with ternary codes.
    pub(super) fn codes(&self, row: usize, codes: &mut [u8]) {
        let first = (row * codes.len().div_ceil(WORD_CODES)) as u64;
        for (counter, chunk) in (first..).zip(codes.chunks_mut(WORD_CODES)) {
            let word = self.word(counter).to_le_bytes();
            for (four, byte) in chunk.chunks_mut(4).zip(word) {
                four.copy_from_slice(&FOUR_CODES[usize::from(byte)][..four.len()]);
            }
        }
    }

    /// Fills a row with dense weights.
    pub(super) fn groups(&self, row: usize, groups: &mut [Group]) {
        let first = (row * groups.len() * 2) as u64;
        for (counter, group) in (first..).step_by(2).zip(groups) {
            let words = [self.word(counter), self.word(counter + 1)];
            for (at, value) in group.values.iter_mut().enumerate() {
                // Ten values of six bits in the first word, six in the second.
                let bits = words[at / 10] >> (at % 10 * 6) & 63;
                // Of the 64 codes the lowest has no counterpart; it becomes zero.
                let code = bits as i8;
                *value = if code == 0 { 0 } else { code - 32 };
            }
            let scale = (words[1] >> 62) as i8;
            group.scale = scale + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_table_is_balanced() {
        for place in 0..4 {
            let mut counts = [0; 3];
            for codes in FOUR_CODES {
                counts[usize::from(codes[place])] += 1;
            }
            assert_eq!(counts[0], counts[2], "place {place}: {counts:?}");
            assert!((80..=96).contains(&counts[1]), "place {place}: {counts:?}");
        }
    }

    #[test]
    fn rows_depend_on_seed_name_and_row_only() {
        let mut rows = Vec::new();
        for (seed, name, row) in [(1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0), (1, "a", 0)] {
            let mut codes = [0; 100];
            Stream::new(seed, name).codes(row, &mut codes);
            assert!(codes.iter().all(|code| *code < 3));
            rows.push(codes);
        }
        assert_eq!(rows[0], rows[4]);
        for (a, b) in [(0, 1), (0, 2), (0, 3), (1, 2), (2, 3)] {
            assert_ne!(rows[a], rows[b], "{a} {b}");
        }
    }

    #[test]
    fn values_stay_in_range_and_vary() {
        let mut groups = [Group::default(); 64];
        Stream::new(7, "head").groups(3, &mut groups);
        let values: Vec<i8> = groups.iter().flat_map(|group| group.values).collect();
        assert!(values.iter().all(|value| (-31..=31).contains(value)));
        assert_eq!((values.iter().min(), values.iter().max()), (Some(&-31), Some(&31)));
        let mut scales: Vec<i8> = groups.iter().map(|group| group.scale).collect();
        scales.sort_unstable();
        scales.dedup();
        assert_eq!(scales, [1, 2, 3, 4]);
    }
}
