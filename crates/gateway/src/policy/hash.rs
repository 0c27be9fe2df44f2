//! Hashes that are the same in every process of every release: gateways share no state, and must
//! all the same send a session to one worker.

/// Returns the hash of bytes: FNV-1a, with its bits spread.
///
/// Keyless: whoever chooses the bytes can make them collide. What is decided by it must be as right
/// with any other outcome, as the choice among equal workers is.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    spread(fnv)
}

/// Returns the hash of two hashes, in this order.
pub(crate) fn join(first: u64, second: u64) -> u64 {
    spread(first.rotate_left(32) ^ second.wrapping_mul(GOLDEN))
}

/// Returns a part of 1 for a number: those of numbers that follow each other are spread evenly.
#[expect(clippy::cast_precision_loss, reason = "a part needs no more than 53 bits")]
pub(crate) fn section(number: u64) -> f64 {
    number.wrapping_mul(GOLDEN) as f64 / 2_f64.powi(64)
}

/// The golden section of 2^64: the step of SplitMix64 (<https://doi.org/10.1145/2714064.2660195>).
pub(super) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Spreads every bit over all: the finaliser of SplitMix64.
pub(super) fn spread(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gateways of different releases have to agree.
    #[test]
    fn hashes_stay_what_they_are() {
        assert_eq!(hash(b""), spread(0xcbf2_9ce4_8422_2325));
        assert_eq!(spread(GOLDEN), 0xe220_a839_7b1d_cdaf, "SplitMix64 of seed 0");
        assert_ne!(join(1, 2), join(2, 1));
        assert_ne!(hash(b"a"), hash(b"b"));
    }
}
