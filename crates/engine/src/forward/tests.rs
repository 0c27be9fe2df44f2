//! Every family of layers against its textbook formula, and against itself: whatever else a step
//! computes, and by whatever threads and instructions, gives the same bits.

mod reference;

use std::sync::Arc;

use tercet_kernels::{DenseMatrix, DenseType, Isa, SCALE_BLOCK, TernaryMatrix};

use super::*;
use crate::{
    kv::{KvShape, pages_for},
    model_file::{Architecture, HeadWeights, RopeScaling},
    plan::PageId,
    pool::ComputePool,
    sampler::uniform,
};

/// What rounding to f32 makes of the logits, relative to their root mean square.
const ROUNDING: f64 = 1e-6;

/// What an activation on the edge between two integers, which f32 and f64 round apart, makes of the
/// logits of its position and of later ones. Most prompts have none of them.
const EDGES: f64 = 2e-2;

/// How the scales of made-up matrices are laid out.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ScalesOf {
    Matrix,
    Blocks,
}

/// Every family, gate function, activation scheme, kind of scales and of rotation, in shapes that
/// fill no block and no register.
fn cases() -> Vec<(ModelConfig, ScalesOf)> {
    use Activation::{Relu2, Silu};
    use ActivationScheme::{Block64, Token};
    use Architecture::{BitNet, Llama, Qwen3};
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 40,
    };
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 8.0,
        beta_slow: 1.0,
        attention_factor: 1.138_629_4,
        original_context: 60,
    };
    let factors = RopeScaling::Factors((0..10_u8).map(|i| 1.0 + f32::from(i) / 2.0).collect());
    let linear = RopeScaling::Linear { factor: 2.5 };
    let family = |architecture, activation, activations, rope_scaling| ModelConfig {
        architecture,
        activation,
        activations,
        rope_scaling,
        hidden: 136,
        intermediate: 310,
        layers: 3,
        heads: 6,
        kv_heads: 2,
        head_dim: 20,
        vocab: 61,
        context: 128,
        rope_theta: 500.0,
        rms_eps: 1e-5,
        tied_head: false,
    };
    let wide = |config| ModelConfig { heads: 2, kv_heads: 1, head_dim: 100, ..config };
    vec![
        (family(BitNet, Relu2, Token, RopeScaling::None), ScalesOf::Matrix),
        (wide(family(BitNet, Silu, Token, RopeScaling::None)), ScalesOf::Matrix),
        (family(Llama, Silu, Token, llama3), ScalesOf::Matrix),
        (family(Llama, Silu, Token, factors), ScalesOf::Blocks),
        (wide(family(Llama, Silu, Block64, linear)), ScalesOf::Blocks),
        (family(Qwen3, Silu, Block64, yarn), ScalesOf::Blocks),
        (family(Qwen3, Silu, Token, RopeScaling::None), ScalesOf::Matrix),
    ]
}

/// Numbers that depend on the seed only.
struct Random {
    seed: u64,
    draws: u64,
}

impl Random {
    /// Returns a number from `low` to `high`.
    fn between(&mut self, low: f32, high: f32) -> f32 {
        self.draws += 1;
        low + (high - low) * round(uniform(self.seed, self.draws))
    }

    fn vector(&mut self, len: usize, low: f32, high: f32) -> Vec<f32> {
        (0..len).map(|_| self.between(low, high)).collect()
    }

    /// Returns a matrix that keeps the magnitude of its input.
    fn ternary(&mut self, rows: usize, cols: usize, scales: ScalesOf) -> TernaryMatrix {
        let trits: Vec<i8> = self
            .vector(rows * cols, -1.5, 1.5)
            .into_iter()
            .map(|x| if x < -0.5 { -1 } else { i8::from(x > 0.5) })
            .collect();
        #[expect(clippy::cast_precision_loss, reason = "rows are short")]
        let unit = (1.5 / cols as f32).sqrt();
        let one = TernaryMatrix::from_trits(rows, cols, unit, &trits).unwrap();
        if scales == ScalesOf::Matrix {
            return one;
        }
        let count = rows * cols.div_ceil(SCALE_BLOCK);
        let scales: Vec<f32> = self.vector(count, 0.3 * unit, 1.7 * unit);
        let packed = one.packed().into();
        TernaryMatrix::from_packed_blocks(rows, cols, scales.into(), packed).unwrap()
    }

    fn dense(&mut self, rows: usize, cols: usize) -> Arc<DenseMatrix> {
        let values = self.vector(rows * cols, -1.0, 1.0);
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        let bytes = bytes.as_slice().into();
        Arc::new(DenseMatrix::new(DenseType::F32, rows, cols, bytes).unwrap())
    }

    fn layer(&mut self, config: &ModelConfig, scales: ScalesOf) -> LayerWeights {
        let (hidden, ffn) = (config.hidden, config.intermediate);
        let (q, kv) = (config.q_width(), config.kv_width());
        let bitnet = config.architecture == Architecture::BitNet;
        let qwen = config.architecture == Architecture::Qwen3;
        let mut norm = |len, present: bool| present.then(|| self.vector(len, 0.5, 1.5));
        let attn_sub_norm = norm(q, bitnet);
        let ffn_sub_norm = norm(ffn, bitnet);
        let (q_norm, k_norm) = (norm(config.head_dim, qwen), norm(config.head_dim, qwen));
        LayerWeights {
            attn_norm: self.vector(hidden, 0.5, 1.5),
            q: self.ternary(q, hidden, scales),
            k: self.ternary(kv, hidden, scales),
            v: self.ternary(kv, hidden, scales),
            q_norm,
            k_norm,
            attn_sub_norm,
            o: self.ternary(hidden, q, scales),
            ffn_norm: self.vector(hidden, 0.5, 1.5),
            gate: self.ternary(ffn, hidden, scales),
            up: self.ternary(ffn, hidden, scales),
            ffn_sub_norm,
            down: self.ternary(hidden, ffn, scales),
        }
    }

    fn stage(&mut self, config: &ModelConfig, scales: ScalesOf) -> StageWeights {
        let norm = self.vector(config.hidden, 0.5, 1.5);
        StageWeights {
            range: 0..config.layers,
            embed: Some(self.dense(config.vocab, config.hidden)),
            layers: (0..config.layers).map(|_| self.layer(config, scales)).collect(),
            head: Some(HeadWeights { norm, matrix: self.dense(config.vocab, config.hidden) }),
            claims: None,
        }
    }
}

/// Prompts of two lengths: one goes beyond a page.
fn prompts(config: &ModelConfig) -> [Vec<u32>; 2] {
    [70, 9].map(|length| {
        let ids = (0..length).map(|i| u32::try_from((i * i * 7 + i * 3 + length) % config.vocab));
        ids.collect::<Result<_, _>>().unwrap()
    })
}

/// What a run of all prompts gave: the logits of every position, and whether it failed.
#[derive(Debug, PartialEq)]
struct Outcome {
    logits: Vec<Vec<Vec<u32>>>,
    failed: Vec<Vec<bool>>,
}

/// Runs prompts through a stage, up to `chunk` rows of each in a step.
fn run(
    config: &ModelConfig,
    weights: &StageWeights,
    kernels: Kernels,
    pool: &ComputePool,
    chunk: usize,
    prompts: &[Vec<u32>],
) -> Outcome {
    let shape = KvShape::new(config, config.layers);
    let pages = prompts.iter().map(|prompt| pages_for(prompt.len())).sum();
    let mut kv = KvCache::new(shape, pages);
    let mut free = (0..u32::try_from(pages).unwrap()).map(PageId);
    let mut work = Workspace::new(config);
    let mut outcome = Outcome {
        logits: vec![Vec::new(); prompts.len()],
        failed: vec![Vec::new(); prompts.len()],
    };
    for index in 0..prompts.len() {
        kv.open(SequenceId(index as u64), &[]).unwrap();
    }
    let longest = prompts.iter().map(Vec::len).max().unwrap();
    for start in (0..longest).step_by(chunk) {
        let (mut rows, mut ids, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        for (index, prompt) in prompts.iter().enumerate() {
            let part = start.min(prompt.len())..(start + chunk).min(prompt.len());
            if part.is_empty() {
                continue;
            }
            let sequence = SequenceId(index as u64);
            let due = pages_for(part.end) - pages_for(part.start);
            let pages: Vec<PageId> = free.by_ref().take(due).collect();
            kv.extend(sequence, part.start, part.len(), 0, &pages).unwrap();
            rows.extend(part.clone().map(|position| Row { sequence, position }));
            owners.extend(part.clone().map(|_| index));
            ids.extend(&prompt[part]);
        }
        work.fit(rows.len());
        let mut logits = vec![0.0; rows.len() * config.vocab];
        let _turn = pool.turn();
        let failed = pool.region(|lead| {
            let (kv, work) = (&mut kv, &mut work);
            let mut forward = Forward { config, weights, kernels, lead, kv, work };
            forward.embed(&ids);
            let failed = forward.layers(&rows);
            let all: Vec<_> = (0..rows.len()).collect();
            let finite = forward.logits(&all, &mut logits);
            let each =
                logits.chunks_exact(config.vocab).map(|row| row.iter().all(|x| x.is_finite()));
            assert!(each.eq(finite));
            failed
        });
        for ((owner, logits), failed) in
            owners.into_iter().zip(logits.chunks_exact(config.vocab)).zip(failed)
        {
            outcome.logits[owner].push(logits.iter().map(|logit| logit.to_bits()).collect());
            outcome.failed[owner].push(failed);
        }
    }
    outcome
}

fn scalar() -> Kernels {
    Kernels::new(Isa::Scalar).unwrap()
}

fn every_isa() -> impl Iterator<Item = Kernels> {
    Isa::supported().into_iter().filter_map(Kernels::new)
}

/// The lower quartile and the root mean square of the differences from the reference, relative to
/// the root mean square of the logits. The first says whether the formula is the same: no edge
/// spoils three quarters of a prompt that begins without one.
fn differences(
    config: &ModelConfig,
    weights: &StageWeights,
    prompt: &[u32],
    found: &[Vec<u32>],
) -> [f64; 2] {
    let exact = reference::logits(config, weights, prompt);
    let found = found.iter().flatten().map(|bits| f64::from(f32::from_bits(*bits)));
    let mut errors: Vec<f64> = exact.iter().zip(found).map(|(a, b)| (a - b).abs()).collect();
    errors.sort_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, reason = "there are few logits")]
    let root = |x: &[f64]| (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64).sqrt();
    let unit = root(&exact);
    [errors[errors.len() / 4] / unit, root(&errors) / unit]
}

#[test]
fn every_family_is_near_its_textbook_formula() {
    let pool = ComputePool::new(1).unwrap();
    for (index, (config, scales)) in cases().into_iter().enumerate() {
        let weights = Random { seed: index as u64, draws: 0 }.stage(&config, scales);
        let prompts = prompts(&config);
        let found = run(&config, &weights, Kernels::detect(), &pool, 128, &prompts);
        for (prompt, found) in prompts.iter().zip(&found.logits) {
            let [quartile, root] = differences(&config, &weights, prompt, found);
            assert!(quartile > 0.0, "the reference is the forward pass itself");
            assert!(quartile < ROUNDING && root < EDGES, "{config:?}: {quartile}, {root}");
        }
        // The measure sees every part of the formula.
        let activation = match config.activation {
            Activation::Relu2 => Activation::Silu,
            Activation::Silu => Activation::Relu2,
        };
        let activations = match config.activations {
            ActivationScheme::Token => ActivationScheme::Block64,
            ActivationScheme::Block64 => ActivationScheme::Token,
        };
        let rope_scaling = match config.rope_scaling {
            RopeScaling::None => RopeScaling::Linear { factor: 1.1 },
            _ => RopeScaling::None,
        };
        for other in [
            ModelConfig { activation, ..config.clone() },
            ModelConfig { activations, ..config.clone() },
            ModelConfig { rope_scaling, ..config.clone() },
            ModelConfig { rms_eps: 1.1e-3, ..config.clone() },
        ] {
            let [quartile, _] = differences(&other, &weights, &prompts[1], &found.logits[1]);
            assert!(quartile > 1000.0 * ROUNDING, "{other:?} for {config:?}: {quartile}");
        }
    }
}

#[test]
fn threads_chunks_batches_and_instruction_sets_change_no_bit_of_any_family() {
    for (index, (config, scales)) in cases().into_iter().enumerate() {
        let weights = Random { seed: index as u64, draws: 0 }.stage(&config, scales);
        let prompts = prompts(&config);
        let one = ComputePool::new(1).unwrap();
        // Each prompt by itself, position by position, in scalar arithmetic.
        let alone = prompts
            .each_ref()
            .map(|prompt| run(&config, &weights, scalar(), &one, 1, std::slice::from_ref(prompt)));
        let expected = Outcome {
            logits: alone.iter().flat_map(|alone| alone.logits.clone()).collect(),
            failed: alone.iter().flat_map(|alone| alone.failed.clone()).collect(),
        };
        assert!(expected.failed.iter().flatten().all(|failed| !failed));
        for threads in [1, 2, 3] {
            let pool = ComputePool::new(threads).unwrap();
            for (kernels, chunk) in every_isa().flat_map(|isa| [(isa, 1), (isa, 5), (isa, 128)]) {
                if kernels.isa() == Isa::Scalar && (threads, chunk) != (2, 5) {
                    // Slow, and the oracle is scalar already.
                    continue;
                }
                let found = run(&config, &weights, kernels, &pool, chunk, &prompts);
                let isa = kernels.isa();
                assert!(found == expected, "{config:?}, {isa}, {threads} threads, {chunk} rows");
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_fails_alone_in_every_family() {
    let pool = ComputePool::new(2).unwrap();
    for (index, (config, scales)) in cases().into_iter().enumerate() {
        let mut random = Random { seed: index as u64, draws: 0 };
        let mut weights = random.stage(&config, scales);
        // The last projection overflows, but for the rows of token 0, which are zero throughout.
        let down = random.ternary(config.hidden, config.intermediate, ScalesOf::Matrix);
        let packed = down.packed().into();
        let (rows, cols) = (down.rows(), down.cols());
        weights.layers[0].down = match scales {
            ScalesOf::Matrix => TernaryMatrix::from_packed(rows, cols, f32::MAX, packed),
            ScalesOf::Blocks => {
                let scales = vec![f32::MAX; rows * cols.div_ceil(SCALE_BLOCK)];
                TernaryMatrix::from_packed_blocks(rows, cols, scales.into(), packed)
            }
        }
        .unwrap();
        let embed = weights.embed.as_ref().unwrap();
        let mut bytes = embed.bytes().to_vec();
        bytes[..4 * config.hidden].fill(0);
        let bytes = bytes.as_slice().into();
        let embed = DenseMatrix::new(DenseType::F32, config.vocab, config.hidden, bytes);
        weights.embed = Some(Arc::new(embed.unwrap()));
        let prompts = [vec![0; 9], vec![1; 9]];
        for kernels in every_isa() {
            let found = run(&config, &weights, kernels, &pool, 4, &prompts);
            assert_eq!(found.failed, [vec![false; 9], vec![true; 9]], "{config:?}");
            let alone = run(&config, &weights, kernels, &pool, 4, &prompts[..1]);
            assert!(found.logits[0] == alone.logits[0], "{config:?}");
        }
    }
}
