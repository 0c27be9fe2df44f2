//! Repeatable choices.

/// Draws numbers that follow from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Dice {
    state: u64,
}

impl Dice {
    /// Returns the dice of a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Draws any number.
    pub fn roll(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Draws a number of `low..high`.
    ///
    /// # Panics
    ///
    /// Panics if the range is empty.
    pub fn between(&mut self, low: u32, high: u32) -> u32 {
        assert!(low < high, "{low}..{high} is empty");
        low + u32::try_from(self.roll() % u64::from(high - low)).expect("less than a u32")
    }

    /// Draws one of some things.
    ///
    /// # Panics
    ///
    /// Panics if there are none.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        let count = u32::try_from(all.len()).expect("few things");
        &all[usize::try_from(self.between(0, count)).expect("an index")]
    }
}
