//! GGUF files made up here, in types and shapes the fixtures do not have: what holds the same
//! weights must load as the same weights.

use half::f16;

use super::*;
use crate::model_file::gguf::types;
use crate::model_file::gguf::value::kinds;
use crate::model_file::{Activation, ActivationScheme};

/// Shape and storage of a made-up file.
#[derive(Clone)]
struct Made {
    architecture: &'static str,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    /// Type number of the matrices.
    kind: u32,
    /// Weights of a Q2_0 block.
    q2_0: usize,
    /// Weights along a row that share a scale; 0 for one scale a matrix.
    group: usize,
    /// Weights that are 0 at the start of each row.
    zeros: usize,
    /// Metadata beyond the shape.
    extra: Vec<(&'static str, &'static str)>,
    /// Value of the `.scale` tensor beside each `attn_q`.
    factor: Option<f32>,
}

const HEAD: usize = 64;
const VOCAB: usize = 32;

impl Made {
    fn new(architecture: &'static str, kind: u32) -> Self {
        Self {
            architecture,
            hidden: 256,
            intermediate: 512,
            layers: 2,
            kind,
            q2_0: 64,
            group: 0,
            zeros: 0,
            extra: Vec::new(),
            factor: None,
        }
    }

    fn trit(&self, name: &str, row: usize, col: usize) -> i8 {
        let salt = name.bytes().fold(7, |sum, byte| sum * 31 % 9973 + usize::from(byte));
        if col < self.zeros {
            0
        } else {
            [-1, 0, 1, 1, -1][((row * 640 + col) * 7919 + salt) % 1013 % 5]
        }
    }

    /// A power of two, so that every type holds it and products with a trit.
    fn scale(&self, name: &str, row: usize, col: usize) -> f32 {
        let group = col.checked_div(self.group).map_or(0, |group| row * 5 + group + 1);
        [0.25, 0.5, 0.125, 2.0][(name.len() + group * group) % 4]
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for row in 0..rows {
            let code = |col: usize| (self.trit(name, row, col) + 1).cast_unsigned();
            let scale = |col: usize| f16::from_f32(self.scale(name, row, col)).to_le_bytes();
            let weight =
                |col: usize| f32::from(self.trit(name, row, col)) * self.scale(name, row, col);
            match self.kind {
                types::F32 => bytes.extend((0..cols).flat_map(|col| weight(col).to_le_bytes())),
                types::F16 => {
                    bytes
                        .extend((0..cols).flat_map(|col| f16::from_f32(weight(col)).to_le_bytes()));
                }
                types::Q2_0 => {
                    for start in (0..cols).step_by(self.q2_0) {
                        bytes.extend(scale(start));
                        bytes.extend((start..start + self.q2_0).step_by(4).map(|at| {
                            code(at) | code(at + 1) << 2 | code(at + 2) << 4 | code(at + 3) << 6
                        }));
                    }
                }
                types::TQ2_0 => {
                    for start in (0..cols).step_by(256) {
                        for half in [start, start + 128] {
                            bytes.extend((half..half + 32).map(|at| {
                                code(at)
                                    | code(at + 32) << 2
                                    | code(at + 64) << 4
                                    | code(at + 96) << 6
                            }));
                        }
                        // A block of zeros has the scale 0 in files of llama.cpp.
                        let zero = (start..start + 256).all(|col| code(col) == 1);
                        bytes.extend(if zero { [0, 0] } else { scale(start) });
                    }
                }
                types::I2_S => {
                    for start in (0..cols).step_by(128) {
                        bytes.extend((start..start + 32).map(|at| {
                            code(at) << 6 | code(at + 32) << 4 | code(at + 64) << 2 | code(at + 96)
                        }));
                    }
                }
                other => unreachable!("type {other}"),
            }
        }
        if self.kind == types::I2_S {
            bytes.extend(self.scale(name, 0, 0).to_le_bytes());
            bytes.extend([0; 28]);
        }
        bytes
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes_with(&mut |_, _, _| {})
    }

    /// Writes the file; `change` may change type and bytes of each tensor.
    fn bytes_with(&self, change: &mut dyn FnMut(&str, &mut u32, &mut Vec<u8>)) -> Vec<u8> {
        let (hidden, ffn) = (self.hidden, self.intermediate);
        let mut metadata = Vec::new();
        let mut count = 0_u64;
        let text = |out: &mut Vec<u8>, text: &str| {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        };
        let mut key = |out: &mut Vec<u8>, key: &str, kind: u32| {
            count += 1;
            text(out, key);
            out.extend(kind.to_le_bytes());
        };
        for (name, value) in [("general.architecture", self.architecture)].iter().chain(&self.extra)
        {
            key(&mut metadata, name, kinds::STRING);
            text(&mut metadata, value);
        }
        for (field, size) in [
            ("context_length", 64),
            ("embedding_length", hidden),
            ("block_count", self.layers),
            ("feed_forward_length", ffn),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("attention.key_length", HEAD),
        ] {
            key(&mut metadata, &format!("{}.{field}", self.architecture), kinds::U32);
            metadata.extend(u32::try_from(size).unwrap().to_le_bytes());
        }
        let epsilon = format!("{}.attention.layer_norm_rms_epsilon", self.architecture);
        key(&mut metadata, &epsilon, kinds::F32);
        metadata.extend(1e-5_f32.to_le_bytes());
        key(&mut metadata, "tokenizer.ggml.tokens", kinds::ARRAY);
        metadata.extend(kinds::STRING.to_le_bytes());
        metadata.extend((VOCAB as u64).to_le_bytes());
        (0..VOCAB).for_each(|id| text(&mut metadata, &format!("t{id}")));

        let mut tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)> = Vec::new();
        let norm = |name: String, length: usize| {
            let bytes =
                (0..length).flat_map(|at| (1.0 + at as f32 / 512.0).to_le_bytes()).collect();
            (name, vec![length], types::F32, bytes)
        };
        let embed = (0..VOCAB * hidden).flat_map(|at| ((at % 251) as f32 / 64.0).to_le_bytes());
        let embed = embed.collect();
        tensors.push(("token_embd.weight".into(), vec![hidden, VOCAB], types::F32, embed));
        tensors.push(norm("output_norm.weight".into(), hidden));
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            for (part, rows, cols) in [
                ("attn_q", 2 * HEAD, hidden),
                ("attn_k", HEAD, hidden),
                ("attn_v", HEAD, hidden),
                ("attn_output", hidden, 2 * HEAD),
                ("ffn_gate", ffn, hidden),
                ("ffn_up", ffn, hidden),
                ("ffn_down", hidden, ffn),
            ] {
                // Rows that blocks of 256 do not fit are plain numbers, as llama.cpp writes them.
                let fits = !matches!(self.kind, types::TQ2_0) || cols.is_multiple_of(256);
                let kind = if fits { self.kind } else { types::F16 };
                let made = Self { kind, ..self.clone() };
                tensors.push((name(part), vec![cols, rows], kind, made.matrix(part, rows, cols)));
            }
            tensors.push(norm(name("attn_norm"), hidden));
            tensors.push(norm(name("ffn_norm"), hidden));
            if self.architecture.starts_with("bitnet") {
                tensors.push(norm(name("attn_sub_norm"), 2 * HEAD));
                tensors.push(norm(name("ffn_sub_norm"), ffn));
            }
            if self.architecture == "qwen3" {
                tensors.push(norm(name("attn_q_norm"), HEAD));
                tensors.push(norm(name("attn_k_norm"), HEAD));
            }
            if let Some(factor) = self.factor {
                let name = format!("blk.{layer}.attn_q.scale");
                tensors.push((name, vec![1], types::F32, factor.to_le_bytes().to_vec()));
            }
        }

        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend((tensors.len() as u64).to_le_bytes());
        file.extend(count.to_le_bytes());
        file.extend(metadata);
        let mut data = Vec::new();
        for (name, dimensions, mut kind, mut bytes) in tensors {
            change(&name, &mut kind, &mut bytes);
            text(&mut file, &name);
            file.extend(u32::try_from(dimensions.len()).unwrap().to_le_bytes());
            file.extend(dimensions.iter().flat_map(|size| (*size as u64).to_le_bytes()));
            file.extend(kind.to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        file
    }

    fn open(&self) -> ModelFile {
        open_bytes(self.bytes()).unwrap()
    }
}

fn parts(made: &Made) -> Vec<(String, [u8; 32])> {
    load_all(&made.open()).part_digests()
}

#[test]
fn blocks_of_64_and_128_and_plain_numbers_are_the_same_weights() {
    for architecture in ["qwen3", "llama"] {
        // Five layers, one key head, and MLP rows of 384, which are not whole blocks of 256.
        let base = Made {
            hidden: 128,
            intermediate: 384,
            layers: 5,
            group: 128,
            zeros: 130,
            ..Made::new(architecture, types::Q2_0)
        };
        let model = base.open();
        assert_eq!(model.config.activations, ActivationScheme::Block64);
        assert_eq!((model.config.kv_heads, model.config.layers), (1, 5));
        let expected = identity(&model);
        for made in [
            Made { q2_0: 128, ..base.clone() },
            Made { kind: types::F16, ..base.clone() },
            Made { kind: types::F32, ..base.clone() },
        ] {
            assert_eq!(identity(&made.open()), expected, "{architecture} {}", made.kind);
        }
        // The weights are what was written, rows of llama's queries in the model's own order.
        let down = &load_all(&model).layers[4].down;
        let q = &load_all(&model).layers[4].q;
        for col in 0..384 {
            assert_eq!(down.trit(77, col), base.trit("ffn_down", 77, col));
            let scale = if col < 128 { 0.0 } else { base.scale("ffn_down", 77, col) };
            assert_eq!(down.block_scales().unwrap()[77 * 6 + col / 64].to_bits(), scale.to_bits());
        }
        assert!((0..128).all(|col| q.trit(64 + 33, col) == 0), "all columns are zeros");
    }
}

#[test]
fn rows_of_llama_queries_and_keys_return_to_their_order() {
    let llama = load_all(&Made::new("llama", types::I2_S).open());
    let made = Made::new("qwen3", types::I2_S);
    let plain = load_all(&made.open());
    for row in 0..2 * HEAD {
        // Row 2 i + j of a head in the file is row 32 j + i of the model.
        let (head, i, j) = (row / HEAD, row % HEAD / 2, row % 2);
        let model_row = head * HEAD + j * HEAD / 2 + i;
        for col in 0..256 {
            assert_eq!(llama.layers[1].q.trit(model_row, col), plain.layers[1].q.trit(row, col));
            assert_eq!(plain.layers[1].q.trit(row, col), made.trit("attn_q", row, col));
        }
    }
    assert!(llama.layers[1].v.packed() == plain.layers[1].v.packed());
    assert_ne!(llama.layers[1].k.packed(), plain.layers[1].k.packed());
}

#[test]
fn equal_scales_of_blocks_become_one_and_others_stay() {
    // Whole blocks of zeros have no scale of their own.
    let equal = Made { zeros: 256, intermediate: 768, ..Made::new("llama", types::TQ2_0) };
    let matrix = &load_all(&equal.open()).layers[0].down;
    assert_eq!(matrix.scale(), Some(equal.scale("ffn_down", 0, 0)));
    // As rows of 128 cannot be TQ2_0, the attention output is ternary as plain numbers.
    let i2_s = Made { kind: types::I2_S, ..equal.clone() };
    let (tq2_0, i2_s) = (load_all(&equal.open()), load_all(&i2_s.open()));
    for (found, expected) in
        [(&tq2_0.layers[1].down, &i2_s.layers[1].down), (&tq2_0.layers[1].k, &i2_s.layers[1].k)]
    {
        assert!(found.packed() == expected.packed());
    }
    assert_eq!(tq2_0.layers[1].down.scale(), i2_s.layers[1].down.scale());

    let unequal = Made { group: 256, ..Made::new("llama", types::TQ2_0) };
    let model = unequal.open();
    assert_eq!(model.config.activations, ActivationScheme::Token);
    let numbers = Made { kind: types::F16, ..unequal.clone() };
    assert_eq!(parts(&unequal), parts(&numbers));
    let scales = load_all(&model).layers[0].gate.block_scales().unwrap().to_vec();
    assert_eq!(scales[..4], [unequal.scale("ffn_gate", 0, 0); 4]);
}

#[test]
fn bitnet_files_have_factors_activations_and_masters() {
    let plain = Made::new("bitnet", types::I2_S);
    let model = plain.open();
    assert_eq!(model.config.activation, Activation::Silu);
    let relu2 = Made { extra: vec![("bitnet.hidden_activation", "relu2")], ..plain.clone() };
    assert_eq!(relu2.open().config.activation, Activation::Relu2);
    assert_eq!(Made::new("bitnet-25", types::I2_S).open().config.activation, Activation::Relu2);

    let scale = |made: &Made| load_all(&made.open()).layers[1].q.scale().unwrap();
    for kind in [types::I2_S, types::TQ2_0, types::F16] {
        let made = Made { kind, ..plain.clone() };
        assert_eq!(parts(&made), parts(&plain), "{kind}");
        let tripled = Made { factor: Some(3.0), ..made };
        assert_eq!(scale(&tripled).to_bits(), (3.0 * scale(&plain)).to_bits(), "{kind}");
    }
    // Numbers with several magnitudes are training weights: one scale, their mean.
    let master = Made { kind: types::F32, group: 64, ..plain };
    let weights = load_all(&master.open());
    let (rows, cols) = (2 * HEAD, 256);
    let weight = |at: usize| {
        let (row, col) = (at / cols, at % cols);
        f32::from(master.trit("attn_q", row, col)) * master.scale("attn_q", row, col)
    };
    let total: f64 = (0..rows * cols).map(|at| f64::from(weight(at)).abs()).sum();
    let mean = total / (rows * cols) as f64;
    assert!((f64::from(weights.layers[0].q.scale().unwrap()) / mean - 1.0).abs() < 1e-6);
    for at in 0..rows * cols {
        let expected = (f64::from(weight(at)) / mean).round_ties_even().clamp(-1.0, 1.0);
        assert_eq!(f64::from(weights.layers[0].q.trit(at / cols, at % cols)), expected, "{at}");
    }
}

#[test]
fn embeddings_in_q4_0_have_the_values_of_the_format() {
    let made = Made::new("qwen3", types::Q2_0);
    let bytes = made.bytes_with(&mut |name, kind, bytes| {
        if name == "token_embd.weight" {
            *kind = types::Q4_0;
            let scale = f16::from_f32(0.375).to_le_bytes();
            let block = |block: usize| (0..16).map(move |p| (block * 16 + p * 37).to_le_bytes()[0]);
            *bytes = (0..VOCAB * 8).flat_map(|at| scale.into_iter().chain(block(at))).collect();
        }
    });
    let weights = load_all(&open_bytes(bytes).unwrap());
    let mut row = [0.0; 256];
    tercet_kernels::Kernels::detect().dense_row(&weights.embed.unwrap(), 3, &mut row);
    for (at, value) in row.iter().enumerate() {
        let (block, inside) = (3 * 8 + at / 32, at % 32);
        let byte = (block * 16 + inside % 16 * 37).to_le_bytes()[0];
        let code = if inside < 16 { byte & 15 } else { byte >> 4 };
        assert_eq!(value.to_bits(), (0.375 * (f32::from(code) - 8.0)).to_bits(), "{at}");
    }
}

#[test]
fn what_cannot_be_right_is_refused_with_its_place() {
    type Change = Box<dyn Fn(&str, &mut u32, &mut Vec<u8>)>;
    let set = |tensor: &'static str, at: usize, new: &'static [u8]| -> Change {
        Box::new(move |name, _, bytes| {
            if name == tensor {
                bytes[at..at + new.len()].copy_from_slice(new);
            }
        })
    };
    let retype = |tensor: &'static str, new: u32, length: usize| -> Change {
        Box::new(move |name, kind, bytes| {
            if name == tensor {
                *kind = new;
                bytes.resize(length, 0);
            }
        })
    };
    let q = "blk.1.attn_q.weight";
    let cases: Vec<(Made, Change, &str)> = vec![
        (
            Made::new("qwen3", types::Q2_0),
            set(q, 72 + 18 + 2, &[0b1100]),
            "packed code 3 in row 1, column 65",
        ),
        (
            Made::new("qwen3", types::Q2_0),
            set(q, 0, &[0, 0x7e]),
            "has the scale NaN in row 0, block 0",
        ),
        (Made::new("qwen3", types::Q2_0), set(q, 0, &[0, 0xbc]), "has the scale -1 in row 0"),
        (
            Made::new("llama", types::TQ2_0),
            set(q, 64, &[0, 0x7c]),
            "has the scale inf in row 0, block 0",
        ),
        (Made::new("llama", types::TQ2_0), set(q, 3, &[0xff]), "packed code 3 in row 0, column 3"),
        (
            Made::new("llama", types::F16),
            set("blk.0.ffn_up.weight", 2 * 70, &[1, 0]),
            "in row 0, column 70, where ternary weights would be 0 or",
        ),
        (
            Made::new("llama", types::F32),
            set("blk.0.ffn_up.weight", 0, &[0, 0, 0xc0, 0x7f]),
            "holds NaN in row 0, column 0",
        ),
        (
            Made { factor: Some(0.0), ..Made::new("bitnet", types::I2_S) },
            set(q, 0, &[]),
            "tensor `blk.0.attn_q.scale` is 0, expected a positive number",
        ),
        (
            Made::new("qwen3", types::Q2_0),
            retype(q, types::TQ2_0, 66 * 128),
            "is of type Q2_0 but `blk.1.attn_q.weight` is not",
        ),
        (
            Made::new("qwen3", types::Q2_0),
            retype("token_embd.weight", 12, 144 * 32),
            "has type Q4_K, expected F32, F16, BF16, Q8_0, Q6_K or Q4_0 for the embedding",
        ),
        (
            Made::new("llama", types::I2_S),
            retype(q, types::Q4_0, 18 * 8 * 128),
            "has type Q4_0, expected I2_S, TQ1_0, TQ2_0, Q2_0",
        ),
        (
            Made {
                extra: vec![("llama.rope.scaling.type", "longrope")],
                ..Made::new("llama", types::I2_S)
            },
            set(q, 0, &[]),
            "`llama.rope.scaling.type` is \"longrope\"",
        ),
    ];
    for (index, (made, change, expected)) in cases.into_iter().enumerate() {
        let bytes = made.bytes_with(&mut |name, kind, bytes| change(name, kind, bytes));
        let result = open_bytes(bytes).and_then(|model| model.load(0..model.config.layers));
        let error = result.unwrap_err().to_string();
        assert!(error.contains(expected), "case {index}, `{expected}`: {error}");
    }
}
