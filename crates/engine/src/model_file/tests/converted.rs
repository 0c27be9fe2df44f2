//! Conversions between types, and adapters merged on the way.

use std::collections::BTreeMap;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::*;
use crate::model_file::convert::Converted;
use crate::model_file::synth::TernaryType;
use crate::model_file::tensors::Part;
use crate::model_file::{ActivationScheme, RopeScaling};

fn convert(
    model: &ModelFile,
    ternary: Option<TernaryType>,
    name: &str,
) -> Result<(Converted, ModelFile), ModelError> {
    let folder = TempFolder::new(name);
    let out = folder.file("out.gguf");
    let options = ConvertOptions { ternary, ..ConvertOptions::default() };
    let converted = to_gguf(model, &out, &options, &mut |_| {})?;
    assert_eq!(folder.names(), ["out.gguf"]);
    Ok((converted, open_bytes(std::fs::read(&out).unwrap())?))
}

#[test]
fn every_type_keeps_the_identity_though_f16_rounds_the_scales() {
    for name in ["llama-packed", "bitnet-bf16"] {
        let source = ModelFile::open(&fixture(name)).unwrap();
        let weights = load_all(&source);
        let inexact = matrices(&weights.layers[0]).into_iter().filter(|matrix| {
            let scale = matrix.scale().unwrap();
            f16::from_f32(scale).to_f32().to_bits() != scale.to_bits()
        });
        assert!(inexact.count() > 0, "the scales of {name} would survive f16 anyway");
        for ternary in [TernaryType::I2S, TernaryType::Tq1_0, TernaryType::Tq2_0] {
            let label = format!("type-{name}-{ternary}");
            let (converted, result) = convert(&source, Some(ternary), &label).unwrap();
            assert_eq!((converted.rounded_scales, converted.same_header), (0, true), "{label}");
            assert_eq!(converted.ternary, ternary);
            assert_eq!(result.config, source.config, "{label}");
            assert_eq!(identity(&result), identity(&source), "{label}");
            let kind = &result.summary().tensors;
            let q = kind.iter().find(|tensor| tensor.name == "blk.0.attn_q.weight").unwrap();
            assert_eq!(q.kind.to_lowercase(), ternary.to_string());
        }
    }
}

#[test]
fn llama_is_written_as_llama_cpp_reads_it() {
    let source = ModelFile::open(&fixture("llama-packed")).unwrap();
    let (converted, _) = convert(&source, None, "like-llama-cpp").unwrap();
    assert_eq!(converted.ternary, TernaryType::Tq2_0);
    let folder = TempFolder::new("like-llama-cpp-file");
    let out = folder.file("out.gguf");
    to_gguf(&source, &out, &ConvertOptions::default(), &mut |_| {}).unwrap();
    let ours = Gguf::parse(FileBytes::map(&out).unwrap()).unwrap();
    let theirs = fixture("gguf/llama-tq2_0.gguf");
    let theirs = Gguf::parse(FileBytes::map(&theirs).unwrap()).unwrap();
    let names = |gguf: &Gguf| gguf.tensors().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&theirs));
    for (name, tensor) in theirs.tensors() {
        let found = ours.tensor(name).unwrap();
        assert_eq!(found.dimensions, tensor.dimensions, "{name}");
        let bytes = |gguf: &Gguf, tensor| {
            let range = gguf.range(name, tensor).unwrap();
            gguf.file().bytes()[range].to_vec()
        };
        if name == "rope_freqs.weight" {
            let floats = |bytes: Vec<u8>| {
                let floats =
                    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                floats.collect::<Vec<_>>()
            };
            for (ours, theirs) in
                floats(bytes(&ours, found)).iter().zip(floats(bytes(&theirs, tensor)))
            {
                assert!((ours / theirs - 1.0).abs() < 1e-6, "{ours} {theirs}");
            }
        } else if name.starts_with("blk.") {
            // Permuted rows, codes and rounded scales: to the byte.
            assert!(bytes(&ours, found) == bytes(&theirs, tensor), "{name}");
        }
    }
}

#[test]
fn types_that_would_change_the_answer_are_refused() {
    let qwen = ModelFile::open(&fixture("gguf/qwen3-q2_0.gguf")).unwrap();
    assert_eq!(qwen.config.activations, ActivationScheme::Block64);
    let (converted, _) = convert(&qwen, None, "refused-q").unwrap();
    assert_eq!((converted.ternary, converted.rounded_scales), (TernaryType::Q2_0, 0));
    for (model, ternary, expected) in [
        (&qwen, TernaryType::Tq2_0, "use q2_0"),
        (
            &ModelFile::open(&fixture("llama-packed")).unwrap(),
            TernaryType::Q2_0,
            "use i2_s, tq1_0 or tq2_0",
        ),
    ] {
        let error = convert(model, Some(ternary), "refused").unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn every_rotary_scaling_comes_back() {
    for (index, scaling) in [
        RopeScaling::Linear { factor: 2.5 },
        RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            // 0.1 * ln(4) + 1, what the factor implies.
            attention_factor: 1.138_629_4,
            original_context: 128,
        },
        RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 16.0,
            beta_slow: 2.0,
            attention_factor: 1.0,
            original_context: 100,
        },
        RopeScaling::Factors((0..32).map(|at| 1.0 + at as f32).collect()),
        RopeScaling::None,
    ]
    .into_iter()
    .enumerate()
    {
        let mut model = ModelFile::open(&fixture("llama-packed")).unwrap();
        model.config.rope_scaling = scaling.clone();
        let (converted, result) = convert(&model, None, &format!("rope-{index}")).unwrap();
        assert_eq!(result.config.rope_scaling, scaling);
        assert!(converted.same_header, "{scaling}");
    }
}

#[test]
fn rows_without_a_token_are_filled_for_other_readers() {
    let mut model = ModelFile::open(&fixture("gguf/llama-tq2_0.gguf")).unwrap();
    let tercet_text::TokenizerSource::Vocabulary(vocabulary) = &mut model.tokenizer else {
        panic!("a GGUF file without a vocabulary");
    };
    vocabulary.tokens.truncate(500);
    vocabulary.token_types.truncate(500);
    model.special = tercet_text::SpecialTokens { bos: None, eos: vec![1], add_bos: false };
    let (converted, result) = convert(&model, None, "filled").unwrap();
    assert!(converted.same_header);
    let tercet_text::TokenizerSource::Vocabulary(vocabulary) = &result.tokenizer else {
        panic!("written without its vocabulary");
    };
    assert_eq!((vocabulary.tokens.len(), vocabulary.tokens[511].as_str()), (512, "[PAD511]"));
}

/// An adapter of rank 3 for a folder of training weights, and its files.
struct Lora {
    config: Value,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

/// Spoils an adapter.
type Change = fn(&mut Lora);

const RANK: usize = 3;

impl Lora {
    fn new(parts: &[(usize, Part)]) -> Self {
        let model = ModelFile::open(&fixture("bitnet-bf16")).unwrap();
        let config = json!({
            "peft_type": "LORA", "r": RANK, "lora_alpha": 6, "use_rslora": false, "bias": "none",
            "fan_in_fan_out": false, "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {},
        });
        let mut tensors = BTreeMap::new();
        for (layer, part) in parts {
            let (rows, cols) = part.matrix(&model.config).unwrap();
            let module = part.folder_name().trim_end_matches(".weight");
            let value = |at: usize, salt: usize| {
                ((at * 7919 + salt * 104_729) % 2003) as f32 / 20_030.0 - 0.05
            };
            for (half, shape, salt) in
                [("lora_A", vec![RANK, cols], 1), ("lora_B", vec![rows, RANK], 2)]
            {
                let values = (0..shape[0] * shape[1]).map(|at| value(at, salt + layer)).collect();
                let name = format!("base_model.model.model.layers.{layer}.{module}.{half}.weight");
                tensors.insert(name, (shape, values));
            }
        }
        Self { config, tensors }
    }

    fn write(&self, name: &str) -> TempFolder {
        let to = TempFolder::new(name);
        std::fs::write(to.file("adapter_config.json"), self.config.to_string()).unwrap();
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, (shape, values))| {
                let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                (name.clone(), shape.clone(), bytes)
            })
            .collect();
        let views = bytes.iter().map(|(name, shape, bytes)| {
            (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(to.file("adapter_model.safetensors"), file).unwrap();
        to
    }

    fn error(&self, source: &str, name: &str) -> String {
        let adapter = self.write(name);
        let model = ModelFile::open(&fixture(source)).unwrap();
        let out = adapter.file("out.gguf");
        let options =
            ConvertOptions { lora: Some(adapter.path().to_owned()), ..ConvertOptions::default() };
        let error = to_gguf(&model, &out, &options, &mut |_| {}).unwrap_err().to_string();
        assert!(!out.exists());
        error
    }
}

/// Merges an adapter into the folder `bitnet-bf16` by the formula, in f64 throughout, and returns
/// the folder with F32 weights.
fn merged_by_hand(lora: &Lora, scale: f64) -> TempFolder {
    let to = TempFolder::new("merged-by-hand");
    let source = fixture("bitnet-bf16");
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    {
        std::fs::copy(source.join(name), to.file(name)).unwrap();
    }
    let file = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let mut written = Vec::new();
    for (name, view) in tensors.tensors() {
        assert_eq!(view.dtype(), Dtype::BF16);
        let pairs = view.data().chunks_exact(2);
        let mut values: Vec<f32> =
            pairs.map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect();
        let module = format!("base_model.model.{}", name.trim_end_matches(".weight"));
        let a = lora.tensors.get(&format!("{module}.lora_A.weight"));
        let b = lora.tensors.get(&format!("{module}.lora_B.weight"));
        if let (Some((_, a)), Some((_, b))) = (a, b) {
            let cols = view.shape()[1];
            for (at, value) in values.iter_mut().enumerate() {
                let (row, col) = (at / cols, at % cols);
                let product: f64 = (0..RANK)
                    .map(|k| f64::from(b[row * RANK + k]) * f64::from(a[k * cols + col]))
                    .sum();
                *value = crate::model_file::folder::narrow(f64::from(*value) + scale * product);
            }
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        written.push((name, view.shape().to_vec(), bytes));
    }
    let views = written.iter().map(|(name, shape, bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    std::fs::write(to.file("model.safetensors"), safetensors::serialize(views, None).unwrap())
        .unwrap();
    to
}

#[test]
fn an_adapter_is_merged_before_quantising() {
    for (rslora, scale) in [(false, 2.0), (true, 6.0 / 3.0_f64.sqrt())] {
        let mut lora = Lora::new(&[(0, Part::Q), (2, Part::Down)]);
        lora.config["use_rslora"] = rslora.into();
        let adapter = lora.write("lora");
        let base = ModelFile::open(&fixture("bitnet-bf16")).unwrap();
        let out = adapter.file("out.gguf");
        let options =
            ConvertOptions { lora: Some(adapter.path().to_owned()), ..ConvertOptions::default() };
        to_gguf(&base, &out, &options, &mut |_| {}).unwrap();
        let by_hand = merged_by_hand(&lora, scale);
        let expected = load_all(&ModelFile::open(by_hand.path()).unwrap());
        let (found, base) = (load_all(&ModelFile::open(&out).unwrap()), load_all(&base));
        let layers = found.layers.iter().zip(&expected.layers).zip(&base.layers);
        for (layer, ((found, expected), base)) in layers.enumerate() {
            let all = matrices(found).into_iter().zip(matrices(expected)).zip(matrices(base));
            for (index, ((found, expected), base)) in all.enumerate() {
                assert!(found.packed() == expected.packed(), "layer {layer}, matrix {index}");
                assert_eq!(found.scale(), expected.scale(), "layer {layer}, matrix {index}");
                let merged = (layer, index) == (0, 0) || (layer, index) == (2, 6);
                let changed = found.packed() != base.packed();
                assert_eq!(changed, merged, "layer {layer}, matrix {index}");
            }
        }
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_name() {
    let new = || Lora::new(&[(0, Part::Q)]);
    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    let changes: [(Change, &str); 9] = [
        (|l| l.config["bias"] = "all".into(), "`bias` is"),
        (|l| l.config["use_dora"] = true.into(), "`use_dora` is true"),
        (|l| l.config["fan_in_fan_out"] = true.into(), "`fan_in_fan_out` is true"),
        (|l| l.config["target_modules"] = json!(["q_proj", "lm_head"]), "\"lm_head\""),
        (|l| l.config["alpha_pattern"] = json!({"q_proj": 3}), "`alpha_pattern`"),
        (|l| l.config["r"] = 4.into(), "for rank 4"),
        (|l| l.config["r"] = 0.into(), "`r` is 0"),
        (
            |l| drop(l.config.as_object_mut().unwrap().remove("lora_alpha")),
            "`lora_alpha` is missing",
        ),
        (
            |l| {
                let (_, tensor) = l.tensors.pop_first().unwrap();
                l.tensors.insert("base_model.model.lm_head.lora_A.weight".into(), tensor);
            },
            "`base_model.model.lm_head.lora_A.weight` belongs to nothing",
        ),
    ];
    for (index, (change, expected)) in changes.into_iter().enumerate() {
        let mut lora = new();
        change(&mut lora);
        let error = lora.error("bitnet-bf16", &format!("lora-bad-{index}"));
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let mut lora = new();
    lora.tensors.remove(&format!("{q}.lora_B.weight"));
    let error = lora.error("bitnet-bf16", "lora-single");
    assert!(error.contains("has no counterpart"), "{error}");
    lora.tensors.clear();
    let error = lora.error("bitnet-bf16", "lora-empty");
    assert!(error.contains("holds no adapter"), "{error}");
    let mut lora = new();
    lora.tensors.values_mut().for_each(|(_, values)| values[0] = f32::NAN);
    let error = lora.error("bitnet-bf16", "lora-nan");
    assert!(error.contains("holds NaN at 0"), "{error}");
    let error = new().error("bitnet-packed", "lora-packed");
    assert!(error.contains("packed ternary, ternary already"), "{error}");
}
