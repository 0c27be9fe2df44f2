//! Measures the products of the BitNet 2B-4T shapes.
//!
//! ```text
//! cargo run --release -p tercet-kernels --example kernels -- \
//!     [--isa NAME] [--threads 1,2] [--tokens 1,2,4,8,16,32,128] [--ms 300] [--mib 160] \
//!     [--only NAME] [--json]
//! ```
//!
//! Weights are cycled through `mib` of them, by default more than the last-level cache holds,
//! as a model's layers are.
//! Calls are short and timed one by one, so that most of them escape whatever else the machine
//! does. Each line has the fastest tenth, the median and the slowest tenth of the calls. `GOPS`
//! counts a multiplication and an addition for each weight and token, `GB/s` the weights' bytes.
//! With `--json` each line is an object instead: isa, kernel, tokens (of attention, positions),
//! threads, operations and bytes of a call, intensity (operations for each byte), gops (best,
//! median, worst) and bytes_per_second (median).

#![expect(clippy::print_stdout, reason = "it is a report")]
#![expect(clippy::disallowed_types, reason = "real time is what it measures")]
#![expect(
    clippy::cast_precision_loss,
    reason = "counts and times are only divided and printed here"
)]

use std::{
    collections::HashMap,
    env,
    error::Error,
    thread,
    time::{Duration, Instant},
};

use tercet_kernels::{
    AlignedBytes, AttentionScratch, BLOCK_POSITIONS, Crew, DenseMatrix, DenseType, Int8Rows, Isa,
    Kernels, Lead, MatrixMut, SCALE_BLOCK, TernaryMatrix, TernaryScratch,
};

/// Rows of the head in one call.
const HEAD_ROWS: usize = 2048;

const TERNARY: [[usize; 2]; 3] = [[2560, 2560], [6912, 2560], [2560, 6912]];
const HEAD: [usize; 2] = [128_256, 2560];
const HEAD_TYPES: [DenseType; 5] =
    [DenseType::F16, DenseType::Bf16, DenseType::Q8_0, DenseType::Q4_0, DenseType::Q6K];

struct Options {
    kernels: Kernels,
    threads: Vec<usize>,
    tokens: Vec<usize>,
    duration: Duration,
    footprint: usize,
    only: String,
    json: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse()?;
    if !options.json {
        println!("isa {}", options.kernels.isa());
        println!(
            "{:24} {:>4} {:>2}T {:>8} {:>8} {:>8} GOPS {:>7} GB/s",
            "", "n", "", "best", "median", "worst", "best"
        );
    }
    for [rows, cols] in TERNARY {
        for (kind, blocks) in [("ternary", false), ("ternary64", true)] {
            let name = format!("{kind} {rows}x{cols}");
            if options.wants(&name) {
                ternary(&options, &name, [rows, cols], blocks)?;
            }
        }
    }
    for kind in HEAD_TYPES {
        let name = format!("{kind} {}x{}", HEAD[0], HEAD[1]);
        if options.wants(&name) {
            head(&options, &name, kind)?;
        }
    }
    if options.wants("attention") {
        attention(&options);
    }
    Ok(())
}

impl Options {
    fn parse() -> Result<Self, Box<dyn Error>> {
        let mut given = HashMap::new();
        let mut arguments = env::args().skip(1);
        while let Some(name) = arguments.next() {
            if name == "--json" {
                given.insert(name, "true".to_owned());
                continue;
            }
            let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
            given.insert(name, value);
        }
        let mut take =
            |name: &str, default: &str| given.remove(name).unwrap_or_else(|| default.to_owned());
        let list = |text: String| text.split(',').map(str::parse).collect::<Result<Vec<_>, _>>();
        let isa: Isa = take("--isa", &Isa::detect().to_string()).parse()?;
        let options = Self {
            kernels: Kernels::new(isa).ok_or_else(|| format!("this CPU has no {isa}"))?,
            threads: list(take("--threads", "1,2"))?,
            tokens: list(take("--tokens", "1,2,4,8,16,32,128"))?,
            duration: Duration::from_millis(take("--ms", "300").parse()?),
            footprint: take("--mib", "160").parse::<usize>()? << 20,
            only: take("--only", ""),
            json: take("--json", "false").parse()?,
        };
        match given.into_keys().next() {
            Some(unknown) => Err(format!("no option {unknown}").into()),
            None => Ok(options),
        }
    }

    fn wants(&self, name: &str) -> bool {
        name.contains(&self.only)
    }

    /// Prints what calls took, in seconds, ascending, that make so many products of so many bytes.
    fn report(
        &self,
        name: &str,
        n: usize,
        threads: usize,
        [products, bytes]: [usize; 2],
        times: Vec<f64>,
    ) {
        let tenth = times.len() / 10;
        let [best, median, worst] =
            [tenth, times.len() / 2, times.len() - 1 - tenth].map(|at| times[at]);
        let operations = 2.0 * products as f64;
        let [fast, middle, slow] = [best, median, worst].map(|time| 1e-9 * operations / time);
        let bytes = bytes as f64;
        if self.json {
            println!(
                "{{\"isa\": \"{}\", \"kernel\": \"{name}\", \"tokens\": {n}, \
                 \"threads\": {threads}, \"operations\": {operations}, \"bytes\": {bytes}, \
                 \"intensity\": {:.6}, \"gops\": {{\"best\": {fast:.3}, \"median\": {middle:.3}, \
                 \"worst\": {slow:.3}}}, \"bytes_per_second\": {:.0}}}",
                self.kernels.isa(),
                operations / bytes,
                bytes / median,
            );
        } else {
            println!(
                "{name:24} {n:4} {threads:2}T {fast:8.1} {middle:8.1} {slow:8.1}      {:7.2}",
                1e-9 * bytes / best,
            );
        }
    }
}

/// Measures a matrix with one scale, or with one for each block of weights and of activations.
fn ternary(
    options: &Options,
    name: &str,
    [rows, cols]: [usize; 2],
    blocks: bool,
) -> Result<(), Box<dyn Error>> {
    let scales = rows * cols / SCALE_BLOCK;
    let bytes = rows * cols / 4 + if blocks { 4 * scales } else { 0 };
    let mut weights = Vec::new();
    for seed in 0..options.footprint.div_ceil(bytes) {
        let mut packed = AlignedBytes::zeroed(rows * cols / 4);
        let mut random = Random(seed as u64);
        for byte in &mut *packed {
            // Valid codes only: 3 becomes 1.
            let bits = random.byte();
            let damaged = bits & (bits >> 1) & 0b0101_0101;
            *byte = bits & !(damaged << 1);
        }
        let mut matrix = if blocks {
            let scales = random.floats(scales).into();
            TernaryMatrix::from_packed_blocks(rows, cols, scales, packed.into())?
        } else {
            TernaryMatrix::from_packed(rows, cols, 0.01, packed.into())?
        };
        matrix.validate()?;
        weights.push(matrix);
    }
    let most = options.tokens.iter().copied().max().unwrap_or(1);
    let mut x = if blocks { Int8Rows::with_blocks(most, cols) } else { Int8Rows::new(most, cols) };
    let mut random = Random(7);
    for row in 0..most {
        options.kernels.quantize(&random.floats(cols), x.row_mut(row))?;
    }
    let mut out = vec![0.0; most * rows];
    for &n in &options.tokens {
        for &threads in &options.threads {
            let mut next = 0;
            let mut scratch = vec![TernaryScratch::default(); threads];
            let times = measure(options.duration, threads, |lead| {
                let w = &weights[next];
                next = (next + 1) % weights.len();
                let cuts: Vec<_> = (1..threads).map(|i| i * rows / threads / 16 * 16).collect();
                let parts = MatrixMut::new(&mut out[..n * rows], n, rows).split_columns(&cuts);
                let parts: Vec<_> = parts.into_iter().zip(&mut scratch).collect();
                lead.run(parts, |_, (part, scratch)| {
                    options.kernels.ternary_matmul(w, &x, n, part, scratch);
                });
            });
            options.report(name, n, threads, [rows * cols * n, bytes], times);
        }
    }
    Ok(())
}

fn head(options: &Options, name: &str, kind: DenseType) -> Result<(), Box<dyn Error>> {
    let [rows, cols] = HEAD;
    let bytes = rows * kind.row_bytes(cols);
    let mut stored = AlignedBytes::zeroed(bytes);
    let mut random = Random(3);
    // Every half-precision number and scale stays normal.
    stored.fill_with(|| random.byte() & 0xbf | 0x20);
    let w = DenseMatrix::new(kind, rows, cols, stored.into())?;
    let cycle =
        (options.footprint / kind.row_bytes(cols)).clamp(HEAD_ROWS, rows) / HEAD_ROWS * HEAD_ROWS;
    let most = options.tokens.iter().copied().max().unwrap_or(1);
    let x = random.floats(most * cols);
    let mut out = vec![0.0; most * rows];
    for &n in options.tokens.iter().filter(|&&n| n <= 32) {
        for &threads in &options.threads {
            let mut first = 0;
            let times = measure(options.duration, threads, |lead| {
                let cuts: Vec<_> =
                    (0..=threads).map(|i| first + i * HEAD_ROWS / threads / 16 * 16).collect();
                first = (first + HEAD_ROWS) % cycle;
                let mut parts = MatrixMut::new(&mut out[..n * rows], n, rows).split_columns(&cuts);
                // Before the first and behind the last cut.
                parts.remove(0);
                parts.pop();
                lead.run(parts, |_, part| {
                    options.kernels.dense_matmul(&w, &x[..n * cols], part);
                });
            });
            let share = [HEAD_ROWS * cols * n, HEAD_ROWS * kind.row_bytes(cols)];
            options.report(name, n, threads, share, times);
        }
    }
    Ok(())
}

/// Five groups of four heads of 128, as in the 2B-4T shape; `n` counts positions here.
fn attention(options: &Options) {
    let (groups, group, head_dim) = (5, 4, 128);
    let mut random = Random(5);
    for positions in [64_usize, 512, 2048] {
        let blocks: Vec<_> = (0..groups * positions.div_ceil(BLOCK_POSITIONS))
            .map(|_| {
                let [keys, values] = [(); 2].map(|()| random.floats(BLOCK_POSITIONS * head_dim));
                (keys, values)
            })
            .collect();
        let q = random.floats(groups * group * head_dim);
        let mut out = vec![0.0; q.len()];
        let mut scratch = AttentionScratch::default();
        let times = measure(options.duration, 1, |_| {
            let width = group * head_dim;
            for (g, (q, out)) in q.chunks(width).zip(out.chunks_mut(width)).enumerate() {
                let blocks = &blocks[g * blocks.len() / groups..];
                let kv = |block: usize| {
                    let (keys, values) = &blocks[block];
                    (keys.as_slice(), values.as_slice())
                };
                options.kernels.attend(q, kv, positions, 0.1, &mut scratch, out);
            }
        });
        let products = 2 * positions * groups * group * head_dim;
        let share = [products, 8 * positions * groups * head_dim];
        options.report("attention", positions, 1, share, times);
    }
}

/// Returns the times of calls of `f`, in seconds, ascending.
fn measure(duration: Duration, threads: usize, mut f: impl FnMut(&Lead<'_>)) -> Vec<f64> {
    let crew = Crew::new(threads);
    let mut times = Vec::new();
    thread::scope(|scope| {
        for index in 1..threads {
            let crew = &crew;
            scope.spawn(move || crew.serve(index));
        }
        crew.lead(|lead| {
            f(lead);
            let begin = Instant::now();
            while begin.elapsed() < duration || times.len() < 10 {
                let start = Instant::now();
                f(lead);
                times.push(start.elapsed().as_secs_f64());
            }
        });
    });
    times.sort_by(f64::total_cmp);
    times
}

/// xorshift64*: only to fill buffers.
struct Random(u64);

impl Random {
    fn byte(&mut self) -> u8 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z ^= z >> 12;
        z ^= z << 25;
        z ^= z >> 27;
        z.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes()[0]
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| f32::from(self.byte()) / 128.0 - 1.0).collect()
    }
}
