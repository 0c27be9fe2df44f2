//! What was measured, as a table and as JSON.

use std::{fmt, fs};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tercet_engine::{
    ModelConfig,
    model_file::{DecodeBytes, Summary},
};
use tercet_kernels::Isa;

use super::{
    measure::{Load, Seen},
    recommend::Recommendation,
};

/// What was measured, and on what.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) summary: Summary,
    pub(super) isa: Isa,
    pub(super) threads: usize,
    /// At least one.
    pub(super) points: Vec<Point>,
    pub(super) loading: Loading,
    pub(super) machine: Machine,
    /// What follows for a server; nothing if batches were asked for.
    pub(super) recommendation: Option<Recommendation>,
}

/// What was measured of one load.
#[derive(Clone, Debug)]
pub(super) struct Point {
    load: Load,
    /// Prompt tokens a second.
    prefill: Spread,
    /// Generated tokens a second, of all sequences together.
    decode: Option<Spread>,
    /// Seconds until the first token, of all sequences.
    first_token: Spread,
    /// The fewest and the most tokens of a sequence in the measured time.
    stream_tokens: Option<Extremes>,
    /// What chose tokens without the whole head, if anything did.
    screen: Option<Screened>,
}

/// What the screen of the head did, and what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Screened {
    /// Bytes of the screen, all read by a step.
    pub(super) bytes: u64,
    /// Tokens chosen with its help.
    pub(super) tokens: u64,
    /// Rows of the head that were computed exactly for them.
    pub(super) rows: u64,
    /// Tokens for which the whole head was computed as well.
    pub(super) fallbacks: u64,
}

impl Screened {
    /// Returns the bytes that a step of `batch` tokens reads of the screen and of a head of so many
    /// bytes and rows.
    fn step_bytes(&self, head: u64, rows: usize, batch: usize) -> u64 {
        let all = (self.tokens + self.fallbacks).max(1);
        let exact = self.rows * head / rows as u64 + self.fallbacks * head;
        self.bytes + batch as u64 * exact / all
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Extremes {
    min: usize,
    max: usize,
}

/// How the model came into memory, and what it takes there.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Loading {
    pub(super) open_seconds: f64,
    pub(super) load_seconds: f64,
    pub(super) first_token_seconds: f64,
    pub(super) weight_bytes: u64,
    pub(super) kv_bytes: u64,
    pub(super) resident_bytes: Option<u64>,
    pub(super) peak_resident_bytes: Option<u64>,
}

/// What was measured of the machine.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub(super) cpu: Option<String>,
    pub(super) cpus: usize,
    pub(super) read_buffer_bytes: u64,
    /// By numbers of threads.
    pub(super) read_bytes_per_second: Vec<(usize, Spread)>,
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

impl Point {
    /// Returns what was seen in all rounds, if there was one.
    pub(super) fn new(load: Load, seen: &[Seen], screen: Option<Screened>) -> Option<Self> {
        let rates = |tokens: usize, took: fn(&Seen) -> f64| {
            let tokens = (load.batch * tokens) as f64;
            Spread::of(seen.iter().map(|seen| tokens / took(seen)).collect())
        };
        let firsts = seen.iter().flat_map(|seen| &seen.first_tokens);
        let tokens = || seen.iter().flat_map(|seen| seen.tokens.iter().copied());
        let decodes = load.generate > 0;
        let prefill = rates(load.prompt, |seen| seen.prefill.as_secs_f64())?;
        let decode = rates(load.generate, |seen| seen.decode.as_secs_f64());
        let extremes = || Some(Extremes { min: tokens().min()?, max: tokens().max()? });
        Some(Self {
            load,
            prefill,
            decode: decode.filter(|_| decodes),
            first_token: Spread::of(firsts.map(|first| first.as_secs_f64()).collect())?,
            stream_tokens: if decodes { extremes() } else { None },
            screen: screen.filter(|screen| screen.tokens > 0),
        })
    }

    /// Returns the bytes that a step in the middle of decoding reads: the weights once, and the
    /// keys and values of every sequence.
    fn step_bytes(&self, summary: &Summary) -> u64 {
        let positions = self.load.batch * (self.load.prompt + self.load.generate / 2);
        self.step_weights(summary) + positions as u64 * summary.decode.kv_per_position
    }

    /// Returns the weight bytes that a step of decoding reads: of one stream, the bytes per token.
    fn step_weights(&self, summary: &Summary) -> u64 {
        let DecodeBytes { ternary, scales, head, .. } = summary.decode;
        let head = self
            .screen
            .map_or(head, |screen| screen.step_bytes(head, summary.config.vocab, self.load.batch));
        ternary + scales + head
    }

    /// Returns the bytes read per second while decoding.
    fn decode_bandwidth(&self, summary: &Summary) -> Option<f64> {
        let steps = self.decode?.median / self.load.batch as f64;
        Some(steps * self.step_bytes(summary) as f64)
    }
}

impl Machine {
    /// Returns the median rate at which so many threads read memory.
    fn bandwidth(&self, threads: usize) -> Option<f64> {
        let rates = &self.read_bytes_per_second;
        rates.iter().find(|(of, _)| *of == threads).map(|(_, rate)| rate.median)
    }
}

impl Report {
    /// Returns the report for programs.
    pub(super) fn to_json(&self) -> Result<Value> {
        let points: Vec<_> = self.points.iter().map(|point| self.point(point)).collect();
        let first = self.points.first().context("have a point")?;
        let bytes_per_token = first.step_weights(&self.summary);
        let first = first.load;
        let rates = self.machine.read_bytes_per_second.iter().map(|(threads, rate)| {
            json!({ "threads": threads, "median": rate.median, "min": rate.min, "max": rate.max })
        });
        let mut report = points.first().cloned().unwrap_or_default();
        report.extend(self.summary_fields());
        report.extend(fields(json!({
            "isa": self.isa.to_string(),
            "threads": self.threads,
            "repeat": first.repeat,
            "prefill_chunk": first.chunk,
            "bytes_per_token": bytes_per_token,
            "points": points,
            "load": self.loading,
            "machine": {
                "cpu": self.machine.cpu,
                "cpus": self.machine.cpus,
                "read_buffer_bytes": self.machine.read_buffer_bytes,
                "read_bytes_per_second": rates.collect::<Vec<_>>(),
            },
            "recommendation": self.recommendation,
        })));
        Ok(Value::Object(report))
    }

    fn summary_fields(&self) -> Map<String, Value> {
        fields(json!({
            "model": self.summary.name,
            "format": self.summary.format,
            "shape": self.summary.config,
        }))
    }

    fn point(&self, point: &Point) -> Map<String, Value> {
        let Load { prompt, generate, batch, .. } = point.load;
        fields(json!({
            "prompt": prompt,
            "generate": generate,
            "batch": batch,
            "prefill_tokens_per_second": point.prefill,
            "decode_tokens_per_second": point.decode,
            "first_token_seconds": point.first_token,
            "stream_tokens": point.stream_tokens,
            "step_bytes": point.step_bytes(&self.summary),
            "decode_bytes_per_second": point.decode_bandwidth(&self.summary),
            "screen": point.screen,
            "bandwidth_share": self.share(point),
        }))
    }

    /// Returns the part of the machine's bandwidth that decoding takes.
    fn share(&self, point: &Point) -> Option<f64> {
        let bandwidth = self.machine.bandwidth(self.threads)?;
        Some(point.decode_bandwidth(&self.summary)? / bandwidth)
    }

    fn write_point(&self, f: &mut fmt::Formatter<'_>, point: &Point) -> fmt::Result {
        let Load { prompt, generate, batch, repeat, .. } = point.load;
        writeln!(f, "load      {batch} x {prompt} prompt + {generate} generated, {repeat} times")?;
        let weights = point.step_weights(&self.summary) as f64 / 1e6;
        write!(f, "weights   {weights:.1} MB per step")?;
        match point.screen {
            Some(Screened { tokens, rows, fallbacks, .. }) => writeln!(
                f,
                ", {:.1} rows of the head a token, the whole head for {fallbacks} of {} tokens",
                rows as f64 / tokens as f64,
                tokens + fallbacks
            )?,
            None => writeln!(f)?,
        }
        writeln!(f, "prefill {}", point.prefill)?;
        let bandwidth = point.decode_bandwidth(&self.summary);
        if let (Some(decode), Some(bandwidth)) = (point.decode, bandwidth) {
            write!(f, "decode  {decode}   {:.2} GB/s", bandwidth / 1e9)?;
            let share = self.share(point).map(|share| format!(", {:.0} %", 100.0 * share));
            writeln!(f, "{}", share.unwrap_or_default())?;
        }
        if let Some(Extremes { min, max }) = point.stream_tokens.filter(|_| batch > 1) {
            writeln!(f, "streams   {min} to {max} tokens each")?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ModelConfig { layers, hidden, intermediate, heads, kv_heads, vocab, .. } =
            self.summary.config;
        writeln!(f, "model     {}", self.summary.name)?;
        writeln!(
            f,
            "shape     {layers} layers, hidden {hidden}, MLP {intermediate}, {heads} heads, \
             {kv_heads} key-value heads, vocabulary {vocab}"
        )?;
        writeln!(f, "engine    {}, {} threads", self.isa, self.threads)?;
        let Loading { open_seconds, load_seconds, peak_resident_bytes, .. } = self.loading;
        write!(f, "start     {:.3} s to load", open_seconds + load_seconds)?;
        match peak_resident_bytes {
            Some(bytes) => writeln!(f, ", {:.1} MB in memory at most", bytes as f64 / 1e6)?,
            None => writeln!(f)?,
        }
        if let Some(bandwidth) = self.machine.bandwidth(self.threads) {
            writeln!(f, "memory    {:.2} GB/s read by as many threads", bandwidth / 1e9)?;
        }
        for point in &self.points {
            self.write_point(f, point)?;
        }
        if let Some(recommendation) = &self.recommendation {
            write!(f, "\n{recommendation}")?;
        }
        Ok(())
    }
}

/// Returns the fields of an object.
fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// Returns the bytes of all weights in memory: those of a step, the embedding and the norms.
pub(super) fn weight_bytes(summary: &Summary) -> u64 {
    let dense = summary.totals.bytes - summary.totals.ternary_bytes;
    summary.decode.ternary + summary.decode.scales + dense
}

/// Returns the name of the CPU, if the system tells.
pub(super) fn cpu() -> Option<String> {
    let told = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = told.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(line.trim_start_matches([' ', '\t', ':']).to_owned())
}

#[cfg(test)]
mod tests {
    use tercet_engine::demo;
    use tokio::time::Duration;

    use super::*;

    #[test]
    fn spreads() {
        let spread = |values: &[f64]| Spread::of(values.to_vec());
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(spread(&[4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
    }

    fn point(batch: usize) -> Point {
        let load = Load { prompt: 4, generate: 2, batch, repeat: 2, chunk: 1 };
        let seen = |decode: u64, tokens: usize| Seen {
            prefill: Duration::from_secs(2),
            decode: Duration::from_secs(decode),
            first_tokens: vec![Duration::from_secs(1), Duration::from_secs(2)],
            tokens: vec![2, tokens],
        };
        Point::new(load, &[seen(1, 2), seen(4, 3)], None).unwrap()
    }

    #[test]
    fn rates_count_all_sequences() {
        let point = point(2);
        assert_eq!(point.prefill, Spread { median: 4.0, min: 4.0, max: 4.0 });
        assert_eq!(point.decode, Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(point.first_token, Spread { median: 1.5, min: 1.0, max: 2.0 });
        assert_eq!(point.stream_tokens, Some(Extremes { min: 2, max: 3 }));
        assert!(Point::new(point.load, &[], None).is_none());
        let prefill_alone = Load { generate: 0, ..point.load };
        let seen = Seen {
            prefill: Duration::from_secs(1),
            decode: Duration::ZERO,
            first_tokens: vec![Duration::from_secs(1)],
            tokens: vec![0],
        };
        let alone = Point::new(prefill_alone, &[seen], None).unwrap();
        assert!(alone.decode.is_none() && alone.stream_tokens.is_none(), "{alone:?}");
    }

    #[test]
    fn a_screened_head_is_not_read_whole() {
        let summary = demo::model().unwrap().summary();
        let (head, rows) = (summary.decode.head, summary.config.vocab as u64);
        let screened = Screened { bytes: 1000, tokens: 8, rows: 24, fallbacks: 0 };
        let with = |screen| Point { screen: Some(screen), ..point(2) };
        let ternary = summary.decode.ternary;
        assert_eq!(
            with(screened).step_weights(&summary),
            ternary + 1000 + 2 * (24 * head / rows) / 8
        );
        let fallen = Screened { rows: 0, fallbacks: 8, ..screened };
        assert_eq!(with(fallen).step_weights(&summary), ternary + 1000 + head);
    }

    #[test]
    fn bytes_are_those_of_the_file() {
        let summary = demo::model().unwrap().summary();
        // The built-in model is I2_S, whose tensors have a tail of 32 bytes each.
        let count = summary.tensors.iter().filter(|tensor| tensor.kind == "I2_S").count() as u64;
        assert_eq!(weight_bytes(&summary), summary.totals.bytes - 32 * count);
        let read = Spread { median: 1e9, min: 9e8, max: 2e9 };
        let bytes = summary.decode;
        let report = Report {
            isa: Isa::Scalar,
            threads: 1,
            points: vec![point(2), point(1)],
            loading: Loading {
                open_seconds: 0.5,
                load_seconds: 1.0,
                first_token_seconds: 3.0,
                weight_bytes: 1,
                kv_bytes: 2,
                resident_bytes: None,
                peak_resident_bytes: Some(3),
            },
            machine: Machine {
                cpu: None,
                cpus: 1,
                read_buffer_bytes: 1,
                read_bytes_per_second: vec![(1, read)],
            },
            recommendation: None,
            summary,
        };
        let weights = bytes.ternary + bytes.head;
        let read = weights + 2 * 5 * bytes.kv_per_position;
        assert_eq!(report.points[0].step_bytes(&report.summary), read);
        assert_eq!(report.points[0].decode_bandwidth(&report.summary), Some(1.25 * read as f64));
        let told = report.to_json().unwrap();
        assert_eq!(told["bytes_per_token"], weights);
        assert_eq!(told["decode_tokens_per_second"]["median"], 2.5);
        assert_eq!(told["points"][0]["bandwidth_share"], 1.25e-9 * read as f64);
        assert_eq!(told["points"][1]["batch"], 1);
        assert_eq!(told["machine"]["read_bytes_per_second"][0]["max"], 2e9);
        let text = report.to_string();
        for part in ["2.50 tokens/s", "streams   2 to 3 tokens", "1.00 GB/s", "1.500 s to load"] {
            assert!(text.contains(part), "no {part}: {text}");
        }
    }
}
