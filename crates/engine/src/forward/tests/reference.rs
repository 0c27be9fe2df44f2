//! The layers as textbooks have them: in f64, one position after the other, nothing fused.

use std::f64::consts::PI;

use tercet_kernels::{Kernels, SCALE_BLOCK, TernaryMatrix};

use crate::model_file::{
    Activation, ActivationScheme, LayerWeights, ModelConfig, RopeScaling, StageWeights,
};

/// Returns the logits of every position, one position after the other.
pub(super) fn logits(config: &ModelConfig, weights: &StageWeights, ids: &[u32]) -> Vec<f64> {
    let embed = weights.embed.as_ref().unwrap();
    let mut caches = vec![Cache::default(); config.layers];
    let head = weights.head.as_ref().unwrap();
    let mut logits = Vec::new();
    for (position, id) in ids.iter().enumerate() {
        let mut x = dense_row(embed, *id as usize);
        for (layer, cache) in weights.layers.iter().zip(&mut caches) {
            attention(config, layer, cache, position, &mut x);
            feed_forward(config, layer, &mut x);
        }
        let x = rms_norm(&x, &head.norm, config);
        logits.extend((0..config.vocab).map(|row| dot(&dense_row(&head.matrix, row), &x)));
    }
    logits
}

/// Keys and values of a layer, a vector of all heads for each position.
#[derive(Clone, Default)]
struct Cache {
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
}

fn attention(
    config: &ModelConfig,
    layer: &LayerWeights,
    cache: &mut Cache,
    position: usize,
    x: &mut [f64],
) {
    let input = rms_norm(x, &layer.attn_norm, config);
    let [mut q, mut k] =
        [&layer.q, &layer.k].map(|matrix| product(matrix, &input, config.activations));
    let head_dim = config.head_dim;
    for (heads, norm) in [(&mut q, &layer.q_norm), (&mut k, &layer.k_norm)] {
        for head in heads.chunks_exact_mut(head_dim) {
            if let Some(norm) = norm {
                head.copy_from_slice(&rms_norm(head, norm, config));
            }
            rotate(config, position, head);
        }
    }
    cache.keys.push(k);
    cache.values.push(product(&layer.v, &input, config.activations));
    let mut output = Vec::new();
    for (head, q) in q.chunks_exact(head_dim).enumerate() {
        let kv_head = head / (config.heads / config.kv_heads);
        let at = kv_head * head_dim..(kv_head + 1) * head_dim;
        let scores: Vec<f64> = cache
            .keys
            .iter()
            .map(|key| (dot(q, &key[at.clone()]) / float(head_dim).sqrt()).exp())
            .collect();
        let sum: f64 = scores.iter().sum();
        output.extend(at.map(|d| {
            let pairs = scores.iter().zip(&cache.values);
            pairs.map(|(score, value)| score / sum * value[d]).sum::<f64>()
        }));
    }
    if let Some(norm) = &layer.attn_sub_norm {
        output = rms_norm(&output, norm, config);
    }
    add(x, &product(&layer.o, &output, config.activations));
}

fn feed_forward(config: &ModelConfig, layer: &LayerWeights, x: &mut [f64]) {
    let input = rms_norm(x, &layer.ffn_norm, config);
    let [gate, up] =
        [&layer.gate, &layer.up].map(|matrix| product(matrix, &input, config.activations));
    let mut inner: Vec<f64> = gate
        .iter()
        .zip(up)
        .map(|(gate, up)| match config.activation {
            Activation::Relu2 => gate.max(0.0).powi(2) * up,
            Activation::Silu => gate / (1.0 + (-gate).exp()) * up,
        })
        .collect();
    if let Some(norm) = &layer.ffn_sub_norm {
        inner = rms_norm(&inner, norm, config);
    }
    add(x, &product(&layer.down, &inner, config.activations));
}

/// Turns element `i` and `i + d / 2` of a head as one complex number.
fn rotate(config: &ModelConfig, position: usize, head: &mut [f64]) {
    let half = head.len() / 2;
    let scaling = &config.rope_scaling;
    let magnitude = match scaling {
        RopeScaling::Yarn { attention_factor, .. } => f64::from(*attention_factor),
        _ => 1.0,
    };
    for i in 0..half {
        let angle = float(position) * frequency(config, i);
        let (sin, cos) = angle.sin_cos();
        let (a, b) = (head[i], head[i + half]);
        head[i] = magnitude * (a * cos - b * sin);
        head[i + half] = magnitude * (b * cos + a * sin);
    }
}

/// Returns the angle of a pair per position, as transformers computes it.
fn frequency(config: &ModelConfig, pair: usize) -> f64 {
    let (theta, dim) = (f64::from(config.rope_theta), float(config.head_dim));
    let plain = theta.powf(-2.0 * float(pair) / dim);
    match &config.rope_scaling {
        RopeScaling::None => plain,
        RopeScaling::Linear { factor } => plain / f64::from(*factor),
        RopeScaling::Factors(factors) => plain / f64::from(factors[pair]),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let (factor, original) = (f64::from(*factor), float(*original_context));
            let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
            let wavelength = 2.0 * PI / plain;
            if wavelength < original / high {
                return plain;
            }
            if wavelength > original / low {
                return plain / factor;
            }
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * plain / factor + smooth * plain
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, .. } => {
            let correction = |rotations: f32| {
                let ratio = float(*original_context) / (f64::from(rotations) * 2.0 * PI);
                dim * ratio.ln() / (2.0 * theta.ln())
            };
            let low = correction(*beta_fast).floor().max(0.0);
            let high = correction(*beta_slow).ceil().min(dim - 1.0);
            let ramp = ((float(pair) - low) / (high - low)).clamp(0.0, 1.0);
            let extrapolation = 1.0 - ramp;
            plain / f64::from(*factor) * (1.0 - extrapolation) + plain * extrapolation
        }
    }
}

/// Multiplies with a ternary matrix after rounding the input to 8 bits.
fn product(matrix: &TernaryMatrix, x: &[f64], scheme: ActivationScheme) -> Vec<f64> {
    let width = match scheme {
        ActivationScheme::Token => x.len(),
        ActivationScheme::Block64 => SCALE_BLOCK,
    };
    let mut rounded = Vec::new();
    for block in x.chunks(width) {
        let largest = block.iter().fold(1e-5, |largest: f64, x| largest.max(x.abs()));
        let step = largest / 127.0;
        rounded.extend(block.iter().map(|x| (x / step).round_ties_even() * step));
    }
    let blocks = matrix.cols().div_ceil(SCALE_BLOCK);
    (0..matrix.rows())
        .map(|row| {
            let weight = |col: usize| {
                let scale = match matrix.block_scales() {
                    Some(scales) => scales[row * blocks + col / SCALE_BLOCK],
                    None => matrix.scale().unwrap(),
                };
                f64::from(matrix.trit(row, col)) * f64::from(scale)
            };
            rounded.iter().enumerate().map(|(col, x)| weight(col) * x).sum()
        })
        .collect()
}

fn rms_norm(x: &[f64], weight: &[f32], config: &ModelConfig) -> Vec<f64> {
    let root = (dot(x, x) / float(x.len()) + f64::from(config.rms_eps)).sqrt();
    x.iter().zip(weight).map(|(x, weight)| x / root * f64::from(*weight)).collect()
}

fn dense_row(matrix: &tercet_kernels::DenseMatrix, row: usize) -> Vec<f64> {
    let mut out = vec![0.0; matrix.cols()];
    Kernels::detect().dense_row(matrix, row, &mut out);
    out.into_iter().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

#[expect(clippy::cast_precision_loss, reason = "sizes are small")]
fn float(size: usize) -> f64 {
    size as f64
}
