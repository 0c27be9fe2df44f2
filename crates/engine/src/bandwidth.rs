//! How fast this machine reads memory: the bound of whatever reads all weights for each token.

#![expect(clippy::disallowed_types, reason = "real time is what it measures")]

use std::{fs, hint::black_box, io, path::Path, sync::Barrier, thread, time::Instant};

use memmap2::{Advice, MmapMut};

/// Least bytes read by a pass.
const LEAST: usize = 256 << 20;
/// A pass reads so many times what the last cache holds.
const CACHES: usize = 4;
/// Bytes summed together: as many independent sums hide the latency of an addition.
const GROUP: usize = 128;
/// Where the system describes the caches of the first CPU.
const CACHE: &str = "/sys/devices/system/cpu/cpu0/cache";

/// Memory that no cache holds, in huge pages where the system offers them, as weights are.
#[derive(Debug)]
pub struct ReadBuffer(MmapMut);

impl ReadBuffer {
    /// Makes a buffer of several times the last cache and writes all of it.
    pub fn new() -> io::Result<Self> {
        Self::with_len(LEAST.max(CACHES * last_cache(Path::new(CACHE))))
    }

    fn with_len(bytes: usize) -> io::Result<Self> {
        let mut map = MmapMut::map_anon(bytes)?;
        // Where there are no huge pages, small ones are what weights have as well.
        drop(map.advise(Advice::HugePage));
        // Pages that were never written are all the same one.
        map.fill(1);
        Ok(Self(map))
    }

    /// Returns its bytes.
    pub fn bytes(&self) -> usize {
        self.0.len()
    }

    /// Reads all of it `passes` times, each of `threads` threads (at least one) a part of its own,
    /// and returns the bytes per second of each pass.
    pub fn read(&self, threads: usize, passes: usize) -> Vec<f64> {
        let threads = threads.max(1);
        let share = self.0.len().div_ceil(threads).next_multiple_of(GROUP);
        let barrier = Barrier::new(threads);
        let pass = |index: usize| {
            let end = self.0.len().min((index + 1) * share);
            let part = &self.0[end.min(index * share)..end];
            barrier.wait();
            let begun = Instant::now();
            black_box(sum(part));
            barrier.wait();
            begun.elapsed()
        };
        let took: Vec<_> = thread::scope(|scope| {
            for index in 1..threads {
                let pass = &pass;
                scope.spawn(move || {
                    for _ in 0..passes {
                        pass(index);
                    }
                });
            }
            (0..passes).map(|_| pass(0)).collect()
        });
        #[expect(clippy::cast_precision_loss, reason = "six digits are more than is known")]
        let bytes = self.0.len() as f64;
        took.into_iter().map(|took| bytes / took.as_secs_f64()).collect()
    }
}

/// Adds all words up, which needs each byte and little else.
fn sum(bytes: &[u8]) -> u64 {
    let mut sums = [0_u64; GROUP / 8];
    for group in bytes.as_chunks::<GROUP>().0 {
        for (sum, word) in sums.iter_mut().zip(group.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// Returns the bytes of the largest cache described below `folder`, 0 if none is.
fn last_cache(folder: &Path) -> usize {
    let indices = fs::read_dir(folder).into_iter().flatten().flatten();
    let size = |index: fs::DirEntry| {
        let told = fs::read_to_string(index.path().join("size")).ok()?;
        let (number, unit) = told.trim().split_at_checked(told.trim().len().checked_sub(1)?)?;
        let shift = match unit {
            "K" => 10,
            "M" => 20,
            _ => return None,
        };
        number.parse::<usize>().ok()?.checked_mul(1 << shift)
    };
    indices.filter_map(size).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_reads_a_part() {
        for (bytes, threads) in [(1 << 20, 1), (1 << 20, 3), (100, 4)] {
            let rates = ReadBuffer::with_len(bytes).unwrap().read(threads, 3);
            assert_eq!(rates.len(), 3);
            assert!(rates.iter().all(|rate| rate.is_finite() && *rate > 0.0), "{rates:?}");
        }
    }

    #[test]
    fn all_bytes_are_summed() {
        let mut bytes = vec![0; 4 * GROUP];
        for (at, byte) in bytes.iter_mut().enumerate().step_by(8) {
            *byte = u8::from(at > 0);
        }
        assert_eq!(sum(&bytes), u64::from_le(4 * GROUP as u64 / 8 - 1));
    }

    #[test]
    fn the_largest_cache_counts() {
        let folder = std::env::temp_dir().join(format!("tercet-caches-{}", std::process::id()));
        for (index, size) in [("index0", "32K\n"), ("index3", "8M\n"), ("other", "many\n")] {
            fs::create_dir_all(folder.join(index)).unwrap();
            fs::write(folder.join(index).join("size"), size).unwrap();
        }
        assert_eq!(last_cache(&folder), 8 << 20);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(last_cache(&folder), 0);
    }
}
