//! What was measured, as a table and as JSON.

use std::fmt;

use serde::Serialize;
use serde_json::{Value, json};
use tercet_engine::{ModelConfig, model_file::Summary};
use tercet_kernels::Isa;

use super::{measure::Load, recommend::Recommendation};

/// What was measured, and on what.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) summary: Summary,
    pub(super) isa: Isa,
    pub(super) threads: usize,
    pub(super) load: Load,
    /// Prompt tokens a second.
    pub(super) prefill: Spread,
    /// Generated tokens a second, of all sequences together.
    pub(super) decode: Option<Spread>,
    /// What follows for a server; nothing if one batch was asked for.
    pub(super) recommendation: Option<Recommendation>,
}

/// Median and extremes of repeated measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    /// Returns the spread of these values, if there are any.
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let upper = values.len() / 2;
        let lower = (values.len() - 1) / 2;
        Some(Self { median: f64::midpoint(values[lower], values[upper]), min, max })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, min, max } = self;
        write!(f, "{median:>10.2} tokens/s   ({min:.2} to {max:.2})")
    }
}

impl Report {
    /// Returns the report for programs.
    pub(super) fn to_json(&self) -> Value {
        let Load { prompt, generate, batch, repeat, chunk } = self.load;
        json!({
            "model": self.summary.name,
            "format": self.summary.format,
            "shape": self.summary.config,
            "isa": self.isa.to_string(),
            "threads": self.threads,
            "prompt": prompt,
            "generate": generate,
            "batch": batch,
            "repeat": repeat,
            "prefill_chunk": chunk,
            "bytes_per_token": self.step_bytes(),
            "prefill_tokens_per_second": self.prefill,
            "decode_tokens_per_second": self.decode,
            "decode_bytes_per_second": self.decode_bandwidth(),
            "recommendation": self.recommendation,
        })
    }

    /// Returns the weight bytes one step of decoding reads, whatever the batch: of one stream, the
    /// bytes per token.
    fn step_bytes(&self) -> u64 {
        let config = &self.summary.config;
        // Embedding and head are of one shape and the head comes last; a tied head is both.
        let head_shape = [config.vocab, config.hidden];
        let head = self.summary.tensors.iter().rev().find(|tensor| tensor.shape == head_shape);
        ternary_bytes(config) + head.map_or(0, |head| head.bytes)
    }

    /// Returns the weight bytes read per second while decoding.
    fn decode_bandwidth(&self) -> Option<f64> {
        let steps = self.decode?.median / self.load.batch as f64;
        Some(steps * self.step_bytes() as f64)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ModelConfig { layers, hidden, intermediate, heads, kv_heads, vocab, .. } =
            self.summary.config;
        let Load { prompt, generate, batch, repeat, .. } = self.load;
        writeln!(f, "model     {}", self.summary.name)?;
        writeln!(
            f,
            "shape     {layers} layers, hidden {hidden}, MLP {intermediate}, {heads} heads, \
             {kv_heads} key-value heads, vocabulary {vocab}"
        )?;
        writeln!(f, "engine    {}, {} threads", self.isa, self.threads)?;
        writeln!(f, "load      {batch} x {prompt} prompt + {generate} generated, {repeat} times")?;
        writeln!(f, "weights   {:.1} MB per step", self.step_bytes() as f64 / 1e6)?;
        writeln!(f, "prefill {}", self.prefill)?;
        if let (Some(decode), Some(bandwidth)) = (self.decode, self.decode_bandwidth()) {
            writeln!(f, "decode  {decode}   {:.2} GB/s", bandwidth / 1e9)?;
        }
        if let Some(recommendation) = &self.recommendation {
            write!(f, "\n{recommendation}")?;
        }
        Ok(())
    }
}

/// Returns the bytes of the ternary matrices in memory: 2 bits a weight, rows padded to 128.
fn ternary_bytes(config: &ModelConfig) -> u64 {
    let matrix = |rows: usize, cols: usize| (rows * cols.div_ceil(128) * 32) as u64;
    let (hidden, inner) = (config.hidden, config.intermediate);
    let attention = matrix(config.q_width(), hidden)
        + 2 * matrix(config.kv_width(), hidden)
        + matrix(hidden, config.q_width());
    let mlp = 2 * matrix(inner, hidden) + matrix(hidden, inner);
    config.layers as u64 * (attention + mlp)
}

#[cfg(test)]
mod tests {
    use tercet_engine::demo;

    use super::*;

    #[test]
    fn spreads() {
        let spread = |values: &[f64]| Spread::of(values.to_vec());
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(spread(&[4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
    }

    #[test]
    fn bytes_are_those_of_the_file() {
        let summary = demo::model().unwrap().summary();
        // The built-in model is I2_S, whose tensors have a tail of 32 bytes each.
        let ternary = summary.tensors.iter().filter(|tensor| tensor.kind == "I2_S");
        let (count, bytes) = ternary.fold((0, 0), |(n, sum), tensor| (n + 1, sum + tensor.bytes));
        assert_eq!(ternary_bytes(&summary.config), bytes - 32 * count);
        let head = summary.tensors[0].bytes;
        let report = Report {
            isa: Isa::Scalar,
            threads: 1,
            load: Load { prompt: 1, generate: 1, batch: 2, repeat: 1, chunk: 1 },
            prefill: Spread { median: 1.0, min: 1.0, max: 1.0 },
            decode: Spread::of(vec![10.0]),
            recommendation: None,
            summary,
        };
        assert_eq!(report.step_bytes(), ternary_bytes(&report.summary.config) + head);
        assert_eq!(report.decode_bandwidth(), Some(5.0 * report.step_bytes() as f64));
        assert_eq!(report.to_json()["decode_tokens_per_second"]["median"], 10.0);
        assert!(report.to_string().contains("10.00 tokens/s"), "{report}");
    }
}
