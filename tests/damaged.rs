//! Damaged model files: each loads, if the damage is harmless, or is refused with one clear error,
//! in bounded memory and time. Every file goes through a process of its own, so that no panic, abort
//! or leak hides.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use tercet_tests::{Scratch, Tercet, workspace};

/// Files made of each base.
const VARIANTS: u64 = 60;
/// Memory that a process may take beside the file.
const MEMORY: u64 = 64 << 20;
/// How long one file may take, in seconds.
const TIME: f64 = 5.0;

/// A base: what is copied, and the file of it that is damaged.
struct Base {
    name: &'static str,
    /// A GGUF file, or a folder.
    path: &'static str,
    /// In the folder.
    file: Option<&'static str>,
}

const BASES: [Base; 7] = [
    Base { name: "i2_s", path: "gguf/bitnet-i2_s.gguf", file: None },
    Base { name: "tq1_0", path: "gguf/llama-tq1_0.gguf", file: None },
    Base { name: "tq2_0", path: "gguf/llama-tq2_0.gguf", file: None },
    Base { name: "q2_0", path: "gguf/qwen3-q2_0.gguf", file: None },
    Base { name: "packed", path: "bitnet-packed", file: Some("model.safetensors") },
    Base { name: "llama", path: "llama-packed", file: Some("model.safetensors") },
    Base { name: "master", path: "bitnet-bf16", file: Some("model.safetensors") },
];

/// SplitMix64: the damage is the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("lengths fit 64 bits");
        usize::try_from(self.next() % end).expect("it is below a length")
    }
}

/// Damages `bytes`, whose first `header` bytes describe the rest, and says how.
fn damage(bytes: &mut Vec<u8>, header: usize, variant: u64, random: &mut Random) -> String {
    // The header is small and every byte of it matters; the body is large and alike.
    let inside = |random: &mut Random, bytes: &[u8]| {
        if random.below(3) < 2 { random.below(header) } else { random.below(bytes.len()) }
    };
    match variant % 6 {
        0 => {
            let length = inside(random, bytes);
            bytes.truncate(length);
            format!("cut to {length} bytes")
        }
        1 => {
            let flips = 1 + random.below(8);
            let mut at = Vec::new();
            for _ in 0..flips {
                let index = inside(random, bytes);
                bytes[index] ^= 1 << random.below(8);
                at.push(index);
            }
            format!("bits flipped at {at:?}")
        }
        2 => {
            // A count, offset or length that is absurd, at a place where one may be.
            let absurd = [0, 1, 0x7F, 0xFFFF_FFFF, 1 << 32, 1 << 40, 1 << 62, u64::MAX];
            let value = absurd[random.below(absurd.len())];
            let index = random.below(header - 8);
            bytes[index..index + 8].copy_from_slice(&value.to_le_bytes());
            format!("{value:#x} at {index}")
        }
        3 => {
            let (from, to) = (inside(random, bytes), inside(random, bytes));
            let length = (1 + random.below(200)).min(bytes.len() - from.max(to));
            bytes.copy_within(from..from + length, to);
            format!("{length} bytes of {from} also at {to}")
        }
        4 => {
            // Infinities and NaNs of any width, in scales, norms and embeddings.
            let start = header + random.below(bytes.len() - header - 64);
            for chunk in bytes[start..start + 64].chunks_exact_mut(2) {
                chunk.copy_from_slice(&[0xFF, 0x7F]);
            }
            format!("NaNs at {start}")
        }
        _ => {
            let start = random.below(header);
            let length = (1 + random.below(64)).min(bytes.len() - start);
            for byte in &mut bytes[start..start + length] {
                *byte = random.next().to_le_bytes()[0];
            }
            format!("{length} random bytes at {start}")
        }
    }
}

/// Returns where the description of the tensors ends, about.
fn header_of(bytes: &[u8]) -> usize {
    if bytes.starts_with(b"GGUF") {
        // Keys, vocabulary and tensor table; the exact end does not matter here.
        return 64 << 10;
    }
    let length = u64::from_le_bytes(*bytes.first_chunk().expect("fixtures are longer"));
    8 + usize::try_from(length).expect("fixtures are small")
}

/// How one process ended.
#[derive(Debug)]
struct Ended {
    status: i64,
    seconds: f64,
    peak_bytes: u64,
    stderr: String,
}

/// Runs `tercet model verify` on each path, and measures it: the standard library tells no peak.
fn verify(paths: &[PathBuf]) -> Result<Vec<Ended>> {
    const MEASURE: &str = "
import json, os, subprocess, sys, time
for path in sys.argv[2:]:
    begun = time.monotonic()
    child = subprocess.Popen([sys.argv[1], 'model', 'verify', path], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, env={**os.environ, 'TERCET_CONFIG': '/dev/null'})
    stderr = child.stderr.read().decode(errors='replace')
    _, status, usage = os.wait4(child.pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - begun,
                      usage.ru_maxrss * 1024, stderr]))
";
    let mut ended = Vec::new();
    for paths in paths.chunks(100) {
        let output = tercet_tests::run(
            Command::new("python3").args(["-c", MEASURE]).arg(Tercet::binary()).args(paths),
        )?;
        for line in output.lines() {
            let (status, seconds, peak_bytes, stderr) = serde_json::from_str(line)?;
            ended.push(Ended { status, seconds, peak_bytes, stderr });
        }
    }
    ensure!(ended.len() == paths.len(), "{} of {} files were read", ended.len(), paths.len());
    Ok(ended)
}

/// Writes a copy of `base` in which the file that matters holds `bytes`; returns what to open.
fn place(base: &Base, bytes: &[u8], scratch: &Path, name: &str) -> Result<PathBuf> {
    let source = workspace().join("tests/fixtures").join(base.path);
    let Some(file) = base.file else {
        let path = scratch.join(format!("{name}.gguf"));
        fs::write(&path, bytes)?;
        return Ok(path);
    };
    let folder = scratch.join(name);
    fs::create_dir(&folder)?;
    for entry in fs::read_dir(source)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != file && name != "expected.json" {
            fs::copy(entry.path(), folder.join(name))?;
        }
    }
    fs::write(folder.join(file), bytes)?;
    Ok(folder)
}

#[test]
fn damaged_files_load_or_are_refused_with_one_clear_error() -> Result<()> {
    let scratch = Scratch::new("damaged")?;
    let mut random = Random(20_261_124);
    let (mut refused, mut loaded) = (0, 0);
    for base in &BASES {
        let source = workspace().join("tests/fixtures").join(base.path);
        let source = base.file.map_or_else(|| source.clone(), |file| source.join(file));
        let whole = fs::read(&source).with_context(|| format!("read {}", source.display()))?;
        let mut paths = vec![place(base, &whole, scratch.path(), &format!("{}-whole", base.name))?];
        let mut damages = vec!["none".to_owned()];
        for variant in 0..VARIANTS {
            let mut bytes = whole.clone();
            damages.push(damage(&mut bytes, header_of(&whole), variant, &mut random));
            paths.push(place(base, &bytes, scratch.path(), &format!("{}-{variant}", base.name))?);
        }
        for (nth, (ended, damage)) in verify(&paths)?.into_iter().zip(&damages).enumerate() {
            let what = format!("{} with damage {damage}: {ended:?}", base.name);
            let most = MEMORY + u64::try_from(whole.len())? * 6 / 5;
            ensure!(ended.seconds < TIME, "too slow: {what}");
            ensure!(ended.peak_bytes < most, "too much memory, over {most}: {what}");
            match ended.status {
                0 => {
                    ensure!(ended.stderr.is_empty(), "a word about a file that loads: {what}");
                    loaded += usize::from(nth > 0);
                }
                1 | 2 if nth > 0 => {
                    let one_line = ended.stderr.trim_end().lines().count() == 1;
                    let names =
                        ended.stderr.starts_with("error: ") && ended.stderr.contains(base.name);
                    ensure!(one_line && names, "no clear error: {what}");
                    ensure!(ended.stderr.len() < 1_000, "a long error: {what}");
                    refused += 1;
                }
                _ => anyhow::bail!("{what}"),
            }
            // Files that stay would fill the disk of a small machine.
            let path = &paths[nth];
            if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
        }
    }
    ensure!(refused + loaded >= 300 && refused > loaded, "{refused} refused, {loaded} loaded");
    Ok(())
}
