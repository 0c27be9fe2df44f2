//! Every target on its corpus, and on thousands of bytes made from it, the same in every run.

use std::{
    fs, panic,
    path::{Path, PathBuf},
};

use tercet_fuzz::{TARGETS, Target};

/// Mutations of a target's corpus; the long run makes ten times as many.
const ROUNDS: usize = 1000;
/// Values that counts, lengths and offsets overflow with.
const NUMBERS: [u64; 8] =
    [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, 0x7fff_ffff_ffff_ffff, 0xffff_ffff_ffff_ffff];

macro_rules! replay {
    ($($target:ident)*) => {$(
        #[test]
        fn $target() {
            replay(stringify!($target));
        }
    )*
    const REPLAYED: &[&str] = &[$(stringify!($target)),*];
    };
}

replay! { config gguf grammar request safetensors template tokenizer }

#[test]
fn every_target_is_replayed_and_has_a_program() {
    let names = TARGETS.map(|(name, _)| name);
    assert_eq!(REPLAYED, names);
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let manifest = fs::read_to_string(here.join("targets/Cargo.toml")).unwrap();
    for name in names {
        assert!(manifest.contains(&format!("path = \"src/{name}.rs\"")), "program {name}");
        let program = fs::read_to_string(here.join(format!("targets/src/{name}.rs"))).unwrap();
        assert!(program.contains(&format!("tercet_fuzz::{name}(data)")), "program {name}");
    }
    let mut folders: Vec<_> = fs::read_dir(here.join("corpus"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    folders.sort();
    assert_eq!(folders, names, "folders of the corpus");
}

/// Returns what is in a folder, in order.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let listed = fs::read_dir(folder).expect("the folder is part of the repository");
    let mut paths: Vec<_> = listed.map(|entry| entry.expect("it can be listed").path()).collect();
    paths.sort();
    paths
}

fn replay(name: &str) {
    let (_, target) = TARGETS.into_iter().find(|(known, _)| *known == name).expect("a target");
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let files = entries(&folder);
    let read = |path| fs::read(path).expect("the corpus can be read");
    let corpus: Vec<Vec<u8>> = files.iter().map(read).collect();
    let good = files
        .iter()
        .zip(&corpus)
        .filter(|(path, data)| run(target, data, &path.display().to_string()));
    // Mutations of bytes that are refused at the first look would test that look.
    assert!(good.count() >= 2, "good files in the corpus of {name}");
    let rounds = if tercet_tests::full() { ROUNDS * 10 } else { ROUNDS };
    for round in 0..rounds {
        let mut random = Random(round as u64);
        let data = mutate(&corpus, &mut random);
        run(target, &data, &format!("{name}, round {round}"));
    }
}

/// Runs a target; says on what before a panic goes on.
fn run(target: Target, data: &[u8], what: &str) -> bool {
    panic::catch_unwind(|| target(data)).unwrap_or_else(|_| panic!("a defect on {what}"))
}

/// Returns a file of the corpus with a few changes.
fn mutate(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut data = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(4) {
        // Headers are at the front, and there are more ways to be wrong in them.
        let reach = if random.below(2) == 0 { data.len() } else { data.len().min(1024) };
        let at = random.below(reach.max(1));
        match random.below(6) {
            0 => {
                if let Some(byte) = data.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            1 => data.truncate(at),
            2 => {
                let number = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
                let width = [1, 2, 4, 8][random.below(4)].min(data.len() - at.min(data.len()));
                data[at..at + width].copy_from_slice(&number[..width]);
            }
            3 => {
                let end = (at + random.below(64)).min(data.len());
                data.drain(at.min(end)..end);
            }
            4 => {
                let end = (at + random.below(64)).min(data.len());
                let copy = data[at.min(end)..end].repeat(1 + random.below(4));
                data.splice(at.min(end)..at.min(end), copy);
            }
            _ => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len().max(1));
                data.truncate(at);
                data.extend_from_slice(other.get(from..).unwrap_or_default());
            }
        }
    }
    data
}

/// Splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) >> 1).expect("63 bits") % bound
    }
}
