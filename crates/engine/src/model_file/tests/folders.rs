//! Folders with shapes and settings the fixtures do not have.

use std::collections::BTreeMap;

use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tercet_text::TokenizerSource;

use super::*;
use crate::model_file::tensors::Part;
use crate::model_file::{
    Activation, ActivationScheme, GenerationDefaults, ModelConfig, ModelFormat, RopeScaling,
};

/// One tensor: element type, shape, bytes.
type Tensor = (Dtype, Vec<usize>, Vec<u8>);

/// A small model folder in memory, to be changed and written.
#[derive(Clone)]
struct Folder {
    config: Value,
    generation: Option<Value>,
    tensors: BTreeMap<String, Tensor>,
    /// Ternary values by tensor name, as they should be after loading.
    trits: BTreeMap<String, Vec<i8>>,
}

impl Folder {
    /// Rows of 96 and 160 weights: no whole number of blocks, though every matrix is.
    fn new() -> Self {
        let config = json!({
            "architectures": ["BitNetForCausalLM"],
            "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "relu2",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": true, "bos_token_id": 509, "eos_token_id": 510,
            "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
        });
        let shape = ModelConfig {
            hidden: 96,
            intermediate: 160,
            heads: 4,
            kv_heads: 4,
            head_dim: 24,
            ..ModelFile::open(&fixture("bitnet-packed")).unwrap().config
        };
        let mut folder =
            Self { config, generation: None, tensors: BTreeMap::new(), trits: BTreeMap::new() };
        folder.dense("model.embed_tokens.weight", &[512, 96], |at| (at % 251) as f32 / 128.0);
        folder.dense("model.norm.weight", &[96], |at| 1.0 + at as f32 / 128.0);
        for layer in 0..2 {
            for part in Part::of(shape.architecture) {
                let name = format!("model.layers.{layer}.{}", part.folder_name());
                match part.matrix(&shape) {
                    Some((rows, cols)) => folder.packed(&name, rows, cols, 0.5),
                    None => folder.dense(&name, &[part.width(&shape)], |at| 1.0 + at as f32 / 64.0),
                }
            }
        }
        folder
    }

    fn dense(&mut self, name: &str, shape: &[usize], value: impl Fn(usize) -> f32) {
        let count = shape.iter().product();
        let bytes = (0..count).flat_map(|at| bf16::from_f32(value(at)).to_le_bytes()).collect();
        self.tensors.insert(name.to_owned(), (Dtype::BF16, shape.to_vec(), bytes));
    }

    fn packed(&mut self, name: &str, rows: usize, cols: usize, scale: f32) {
        let salt = name.bytes().fold(0_usize, |sum, byte| sum * 31 % 9973 + usize::from(byte));
        let trit = |at: usize| [-1_i8, 0, 1, 1, -1][(at * 7919 + salt) % 1013 % 5];
        let trits: Vec<i8> = (0..rows * cols).map(trit).collect();
        let quarter = rows / 4;
        let mut bytes = vec![0_u8; quarter * cols];
        for (at, trit) in trits.iter().enumerate() {
            let (row, col) = (at / cols, at % cols);
            bytes[row % quarter * cols + col] |=
                (trit + 1).cast_unsigned() << (2 * (row / quarter));
        }
        self.tensors.insert(name.to_owned(), (Dtype::U8, vec![quarter, cols], bytes));
        self.dense(&format!("{name}_scale"), &[1], |_| scale);
        self.trits.insert(name.to_owned(), trits);
    }

    fn write_config(&self, to: &TempFolder) {
        std::fs::write(to.file("config.json"), self.config.to_string()).unwrap();
        if let Some(generation) = &self.generation {
            std::fs::write(to.file("generation_config.json"), generation.to_string()).unwrap();
        }
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(fixture("bitnet-packed").join(name), to.file(name)).unwrap();
        }
    }

    fn write_tensors<'a>(path: &Path, tensors: impl Iterator<Item = (&'a String, &'a Tensor)>) {
        let views = tensors.map(|(name, (dtype, shape, bytes))| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn open(&self, name: &str) -> Result<ModelFile, ModelError> {
        let to = TempFolder::new(name);
        self.write_config(&to);
        Self::write_tensors(&to.file("model.safetensors"), self.tensors.iter());
        ModelFile::open(to.path())
    }

    fn error(&self, name: &str) -> String {
        match self.open(name) {
            Ok(model) => model.load(0..2).map(|_| ()).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    }
}

#[test]
fn rows_that_are_not_whole_blocks_survive_every_layout() {
    let folder = Folder::new();
    let model = folder.open("odd-rows").unwrap();
    let gguf = open_bytes(converted(&model, "odd-rows-gguf")).unwrap();
    assert_eq!(identity(&model), identity(&gguf));
    for weights in [load_all(&model), load_all(&gguf)] {
        for (layer, weights) in weights.layers.iter().enumerate() {
            for (part, matrix) in [
                (Part::Q, &weights.q),
                (Part::O, &weights.o),
                (Part::Gate, &weights.gate),
                (Part::Down, &weights.down),
            ] {
                let name = format!("model.layers.{layer}.{}", part.folder_name());
                for (at, trit) in folder.trits[&name].iter().enumerate() {
                    let (row, col) = (at / matrix.cols(), at % matrix.cols());
                    assert_eq!(matrix.trit(row, col), *trit, "{name} {row} {col}");
                }
                assert_eq!(matrix.scale(), Some(0.5));
            }
        }
    }
}

#[test]
fn shards_and_separate_heads_are_read() {
    let mut folder = Folder::new();
    let whole = identity(&folder.open("one-file").unwrap());
    let to = TempFolder::new("shards");
    folder.write_config(&to);
    let mut map = BTreeMap::new();
    for (index, file) in ["a.safetensors", "b.safetensors"].into_iter().enumerate() {
        let part = folder.tensors.iter().skip(index).step_by(2);
        Folder::write_tensors(&to.file(file), part.clone());
        map.extend(part.map(|(name, _)| (name.clone(), file)));
    }
    let index = to.file("model.safetensors.index.json");
    std::fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    assert_eq!(identity(&ModelFile::open(to.path()).unwrap()), whole);

    for outside in ["../a.safetensors", "/etc/passwd", "..", "x/a.safetensors", ""] {
        std::fs::write(&index, json!({"weight_map": {"w": outside}}).to_string()).unwrap();
        let error = ModelFile::open(to.path()).unwrap_err().to_string();
        assert!(error.contains("file names within the folder"), "{outside}: {error}");
    }

    folder.config["tie_word_embeddings"] = false.into();
    assert!(folder.error("no-head").contains("`lm_head.weight` is missing"));
    folder.dense("lm_head.weight", &[512, 96], |at| (at % 13) as f32);
    let model = folder.open("head").unwrap();
    assert_ne!(identity(&model), whole);
    let gguf = open_bytes(converted(&model, "head-gguf")).unwrap();
    assert!(!gguf.config.tied_head);
    assert_eq!(identity(&model), identity(&gguf));
}

#[test]
fn weight_scale_multiplies_or_divides_as_transformers_does() {
    let mut folder = Folder::new();
    let name = "model.layers.0.self_attn.q_proj.weight_scale";
    folder.dense(name, &[1], |_| 4.0);
    let scale = |folder: &Folder, name| load_all(&folder.open(name).unwrap()).layers[0].q.scale();
    assert_eq!(scale(&folder, "multiplier"), Some(4.0));
    // BitNetQuantConfig's default class.
    folder.config["quantization_config"] = json!({"quant_method": "bitnet"});
    assert_eq!(scale(&folder, "divisor"), Some(0.25));
}

#[test]
fn sampling_settings_follow_generation_config() {
    let defaults = |generation: Option<Value>, name: &str| {
        let folder = Folder { generation, ..Folder::new() };
        folder.open(name).map(|model| (model.generation, model.special.eos))
    };
    let greedy = GenerationDefaults::GREEDY;
    assert_eq!(defaults(None, "sampling-0").unwrap(), (greedy, vec![510]));
    let cold = json!({"temperature": 0.5, "eos_token_id": [511, 3, 511]});
    assert_eq!(defaults(Some(cold), "sampling-1").unwrap(), (greedy, vec![3, 511]));
    let warm = json!({"do_sample": true, "temperature": 0.5, "top_k": 7});
    let expected = GenerationDefaults { temperature: 0.5, top_k: 7, ..GenerationDefaults::PLAIN };
    assert_eq!(defaults(Some(warm), "sampling-2").unwrap(), (expected, vec![510]));
    for (field, value) in [
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-3)),
        ("top_k", json!(1_u64 << 40)),
        ("eos_token_id", json!(512)),
        ("eos_token_id", json!([1, "x"])),
    ] {
        let mut generation = json!({"do_sample": true});
        generation[field] = value.clone();
        let error = defaults(Some(generation), "sampling-3").unwrap_err().to_string();
        assert!(error.contains(field), "{field} = {value}: {error}");
    }
}

#[test]
fn masters_of_1bitllm_are_bitnet_by_other_names() {
    let mut folder = Folder::new();
    folder.config["quantization_config"]["quantization_mode"] = "online".into();
    for (name, trits) in folder.trits.clone() {
        let (rows, cols) = match folder.tensors[&name].1[..] {
            [quarter, cols] => (quarter * 4, cols),
            _ => unreachable!("matrices have two dimensions"),
        };
        folder.dense(&name, &[rows, cols], |at| f32::from(trits[at]) * 0.75);
        folder.tensors.remove(&format!("{name}_scale"));
    }
    let microsoft = folder.open("masters").unwrap();
    let config = folder.config.as_object_mut().unwrap();
    config.remove("quantization_config");
    config.insert("architectures".into(), json!(["BitnetForCausalLM"]));
    config.insert("hidden_act".into(), "silu".into());
    let tensors = std::mem::take(&mut folder.tensors).into_iter();
    let names = [("attn_sub_norm", "inner_attn_ln"), ("ffn_sub_norm", "ffn_layernorm")];
    folder.tensors = tensors
        .map(|(name, tensor)| {
            (names.iter().fold(name, |name, (old, new)| name.replace(old, new)), tensor)
        })
        .collect();
    let renamed = folder.open("1bitllm").unwrap();
    assert_eq!(renamed.config.activation, Activation::Silu);
    assert_eq!(load_all(&renamed).part_digests(), load_all(&microsoft).part_digests());
}

#[test]
fn folders_of_groups_hold_the_numbers_of_their_blocks() {
    let mut folder = Folder::new();
    let config = folder.config.as_object_mut().unwrap();
    config.remove("quantization_config");
    config.insert("architectures".into(), json!(["Qwen3ForCausalLM"]));
    config.insert("hidden_act".into(), "silu".into());
    config.insert("head_dim".into(), 24.into());
    config.insert(
        "rope_scaling".into(),
        json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    );
    // Rows of 96 and 160: the last group of each is shorter.
    let scale = |row: usize, group: usize| [0.5, 0.25, 3.0][(row + group) % 3];
    for (name, trits) in folder.trits.clone() {
        let (rows, cols) = match folder.tensors[&name].1[..] {
            [quarter, cols] => (quarter * 4, cols),
            _ => unreachable!("matrices have two dimensions"),
        };
        let weight = |at: usize| f32::from(trits[at]) * scale(at / cols, at % cols / 64);
        folder.dense(&name, &[rows, cols], weight);
    }
    for layer in 0..2 {
        for norm in ["q_norm", "k_norm"] {
            folder.dense(&format!("model.layers.{layer}.self_attn.{norm}.weight"), &[24], |_| 1.0);
        }
    }
    let model = folder.open("groups").unwrap();
    assert_eq!(model.format, ModelFormat::FolderTernary);
    assert_eq!(model.config.activations, ActivationScheme::Block64);
    let RopeScaling::Yarn { factor, attention_factor, original_context, .. } =
        model.config.rope_scaling
    else {
        panic!("{:?}", model.config.rope_scaling);
    };
    assert_eq!((factor.to_bits(), original_context), (4.0_f32.to_bits(), 16));
    assert!((attention_factor - 1.138_629_4).abs() < 1e-6, "{attention_factor}");
    let weights = load_all(&model);
    let down = &weights.layers[1].down;
    let trits = &folder.trits["model.layers.1.mlp.down_proj.weight"];
    for (at, trit) in trits.iter().enumerate() {
        assert_eq!(down.trit(at / 160, at % 160), *trit);
    }
    for (at, found) in down.block_scales().unwrap().iter().enumerate() {
        assert_eq!(found.to_bits(), f32::to_bits(scale(at / 3, at % 3)), "block {at}");
    }
    let name = "model.layers.1.mlp.down_proj.weight";
    folder.dense(name, &[96, 160], |at| (at % 7) as f32);
    assert!(folder.error("no-groups").contains("holds 1 in row 0, column 1, where ternary"));
}

#[test]
fn configurations_that_cannot_be_run_are_refused() {
    let cases: [(&str, Value, &str); 25] = [
        ("/architectures", json!(["MambaForCausalLM"]), "architecture `MambaForCausalLM` is not"),
        ("/architectures", json!([]), "supported: BitNetForCausalLM"),
        ("/hidden_size", json!(0), "`hidden_size` is 0, expected 1 to"),
        ("/hidden_size", json!(1_u64 << 60), "`hidden_size` is 1152921504606846976"),
        ("/hidden_size", json!("96"), "`hidden_size` is \"96\", expected a whole number"),
        ("/hidden_size", Value::Null, "`hidden_size` is missing"),
        ("/hidden_size", json!(97), "a divisor of the hidden size 97"),
        ("/num_hidden_layers", json!(4097), "`num_hidden_layers` is 4097"),
        ("/num_hidden_layers", json!(3), "model.layers.2.input_layernorm.weight` is missing"),
        ("/num_attention_heads", json!(0), "`num_attention_heads` is 0"),
        ("/num_key_value_heads", json!(3), "a divisor of the 4 query heads"),
        ("/head_dim", json!(23), "an even number"),
        ("/intermediate_size", json!(128), "the configuration asks for"),
        ("/vocab_size", json!(100), "embed_tokens.weight` has shape [512, 96]"),
        ("/rms_norm_eps", json!(0.0), "`rms_norm_eps` is 0, expected a number from"),
        ("/rope_parameters", json!({"rope_theta": -1.0}), "`rope_theta` is -1"),
        ("/rope_parameters", json!({"rope_type": "linear"}), "`rope_parameters.factor`"),
        (
            "/rope_parameters",
            json!({"rope_type": "linear", "factor": 1e-30}),
            "factor` is 0.000000000000000000000000000001, expected a number from 0.001 to 1000000",
        ),
        ("/rope_parameters", json!({"rope_type": "yarn", "factor": 1e300}), "factor` is inf"),
        (
            "/rope_parameters",
            json!({"rope_type": "yarn", "factor": 4.0, "beta_slow": 0.0}),
            "`beta_slow` is 0, expected a number from 0.001",
        ),
        (
            "/rope_parameters",
            json!({
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64
            }),
            "`high_freq_factor` is 4, expected above low_freq_factor 4",
        ),
        ("/hidden_act", json!("gelu"), "`hidden_act` is \"gelu\", this version supports only"),
        ("/attention_bias", json!(true), "`attention_bias` is true"),
        ("/quantization_config", Value::Null, "`quantization_config` is missing"),
        (
            "/quantization_config",
            json!({"quant_method": "bitnet", "quantization_mode": "online"}),
            "bitlinear, online",
        ),
    ];
    for (index, (pointer, value, expected)) in cases.into_iter().enumerate() {
        let mut folder = Folder::new();
        match folder.config.pointer_mut(pointer) {
            Some(slot) => *slot = value.clone(),
            None => folder.config[&pointer[1..]] = value.clone(),
        }
        let error = folder.error(&format!("config-{index}"));
        assert!(error.contains(expected), "{pointer} = {value}: {error}");
    }
}

#[test]
fn weights_that_cannot_be_right_are_refused() {
    let q = "model.layers.1.self_attn.q_proj.weight";
    let norm = "model.layers.1.input_layernorm.weight";
    type Change = Box<dyn Fn(&mut Folder)>;
    let scale = |value: f32| -> Change {
        Box::new(move |f| f.dense(&format!("{q}_scale"), &[1], |_| value))
    };
    let cases: Vec<(Change, &str)> = vec![
        (scale(f32::NAN), "weight_scale NaN, expected a positive number"),
        (scale(f32::INFINITY), "weight_scale inf"),
        (scale(0.0), "weight_scale 0,"),
        (scale(-1.0), "weight_scale -1,"),
        (Box::new(move |f| f.dense(&format!("{q}_scale"), &[2], |_| 1.0)), "has shape [2]"),
        (Box::new(move |f| drop(f.tensors.remove(&format!("{q}_scale")))), "is missing"),
        (Box::new(move |f| drop(f.tensors.remove(norm))), "is missing"),
        (Box::new(move |f| f.dense(norm, &[96], |_| f32::NAN)), "holds NaN at 0, not finite"),
        (Box::new(move |f| f.dense(norm, &[95], |_| 1.0)), "has shape [95]"),
        (Box::new(move |f| f.dense(q, &[96, 96], |_| 1.0)), "has type BF16, expected U8"),
        (
            Box::new(move |f| f.tensors.get_mut(q).unwrap().2[5] = 0b0000_1100),
            "is damaged: packed code 3",
        ),
        (
            Box::new(|f| {
                let embed = f.tensors.get_mut("model.embed_tokens.weight").unwrap();
                *embed = (Dtype::U8, vec![512, 96], vec![0; 512 * 96]);
            }),
            "has type U8, expected F32, F16 or BF16",
        ),
    ];
    for (index, (change, expected)) in cases.into_iter().enumerate() {
        let mut folder = Folder::new();
        change(&mut folder);
        let error = folder.error(&format!("weights-{index}"));
        assert!(error.contains(expected), "case {index}, `{expected}`: {error}");
    }
    let mut master = Folder::new();
    master.config["quantization_config"]["quantization_mode"] = "online".into();
    assert!(master.error("master-u8").contains("has shape [24, 96]"));
}

#[test]
fn tokenizers_that_gguf_keys_cannot_express_travel_whole() {
    let to = TempFolder::new("normalizer");
    let folder = Folder::new();
    folder.write_config(&to);
    Folder::write_tensors(&to.file("model.safetensors"), folder.tensors.iter());
    let path = to.file("tokenizer.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    json["normalizer"] = json!({"type": "NFC"});
    std::fs::write(&path, json.to_string()).unwrap();
    let model = ModelFile::open(to.path()).unwrap();
    let gguf = open_bytes(converted(&model, "normalizer-gguf")).unwrap();
    assert_eq!(gguf.tokenizer, TokenizerSource::Json(json.to_string()));
    assert_eq!(model.special, gguf.special);
    assert_eq!(identity(&model), identity(&gguf));
    assert_ne!(model.header_digest(), folder.open("no-normalizer").unwrap().header_digest());
}

#[test]
fn masters_are_quantised_by_their_mean_whatever_the_row_length() {
    let mut folder = Folder::new();
    folder.config["quantization_config"]["quantization_mode"] = "online".into();
    // Rows of 100 begin in different lanes of the sum.
    for (name, size) in [("hidden_size", 100), ("intermediate_size", 160)] {
        folder.config[name] = size.into();
    }
    folder.config["head_dim"] = 24.into();
    folder.dense("model.embed_tokens.weight", &[512, 100], |_| 1.0);
    folder.dense("model.norm.weight", &[100], |_| 1.0);
    let shape = ModelConfig {
        hidden: 100,
        intermediate: 160,
        heads: 4,
        kv_heads: 4,
        head_dim: 24,
        ..ModelFile::open(&fixture("bitnet-packed")).unwrap().config
    };
    let weight = |at: usize| ((at * 37) % 64) as f32 / 32.0 - 1.0;
    for layer in 0..2 {
        for part in Part::of(shape.architecture) {
            let name = format!("model.layers.{layer}.{}", part.folder_name());
            match part.matrix(&shape) {
                Some((rows, cols)) => folder.dense(&name, &[rows, cols], weight),
                None => folder.dense(&name, &[part.width(&shape)], |_| 1.0),
            }
        }
    }
    let weights = load_all(&folder.open("master-rows").unwrap());
    let q = &weights.layers[0].q;
    // Sums of multiples of 1/32 are exact in any order.
    let count = 96 * 100;
    let mean = (0..count).map(|at| f64::from(weight(at)).abs()).sum::<f64>() / f64::from(9600_u32);
    let scale = q.scale().unwrap();
    assert!((f64::from(scale) - mean).abs() < 1e-7, "{scale} {mean}");
    for at in 0..count {
        let expected = (f64::from(weight(at)) / mean).round_ties_even().clamp(-1.0, 1.0);
        assert_eq!(f64::from(q.trit(at / 100, at % 100)), expected, "element {at}");
    }
}
