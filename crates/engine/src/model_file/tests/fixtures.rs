//! The checkpoints under `tests/fixtures` and the built-in model.

use super::*;
use crate::model_file::{
    Activation, ActivationScheme, Architecture, GenerationDefaults, ModelConfig, ModelFormat,
    Progress, RopeScaling,
};

fn open(name: &str) -> ModelFile {
    ModelFile::open(&fixture(name)).unwrap()
}

#[test]
fn all_layouts_of_one_model_agree() {
    let packed = open("bitnet-packed");
    let mut gguf = open("gguf/bitnet-i2_s.gguf");
    assert_eq!(packed.format, ModelFormat::FolderPacked);
    assert_eq!(gguf.format, ModelFormat::Gguf);
    assert_eq!(packed.config, gguf.config);
    assert_eq!(packed.special, gguf.special);
    assert_eq!(packed.special.eos, [510, 511]);
    assert!(packed.special.add_bos);
    assert_eq!(packed.chat_template, gguf.chat_template);
    let (packed_weights, gguf_weights) = (load_all(&packed), load_all(&gguf));
    let layers = |weights: &StageWeights| {
        let parts = weights.part_digests().into_iter();
        parts.filter(|(name, _)| name.starts_with("layer.")).collect::<Vec<_>>()
    };
    assert_eq!(layers(&packed_weights).len(), 3);
    assert_eq!(layers(&packed_weights), layers(&gguf_weights));
    // bitnet.cpp's converter rounds the BF16 embedding to F16, which changes its smallest values;
    // the identities therefore differ, and rightly so.
    let kernels = tercet_kernels::Kernels::detect();
    let (packed_embed, gguf_embed) = (packed_weights.embed.unwrap(), gguf_weights.embed.unwrap());
    let (mut ours, mut theirs, mut changed) = ([0.0; 256], [0.0; 256], 0);
    for row in 0..512 {
        kernels.dense_row(&packed_embed, row, &mut ours);
        kernels.dense_row(&gguf_embed, row, &mut theirs);
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert_eq!(half::f16::from_f32(*ours).to_f32().to_bits(), theirs.to_bits());
            changed += usize::from(ours.to_bits() != theirs.to_bits());
        }
    }
    assert!((1..512).contains(&changed), "{changed} of 131072 values changed");

    // Files of other converters have no sampling settings, which changes answers.
    assert_eq!(gguf.generation, GenerationDefaults::PLAIN);
    assert_ne!(packed.header_digest(), gguf.header_digest());
    gguf.generation =
        GenerationDefaults { temperature: 0.6, top_p: 0.9, ..GenerationDefaults::PLAIN };
    assert_eq!(packed.generation, gguf.generation);
    assert_eq!(packed.header_digest(), gguf.header_digest());
}

#[test]
fn masters_become_the_packed_weights() {
    let (master, packed) = (open("bitnet-bf16"), open("bitnet-packed"));
    assert_eq!(master.format, ModelFormat::FolderMaster);
    assert_eq!(master.header_digest(), packed.header_digest());
    let (master, packed) = (load_all(&master), load_all(&packed));
    for (master, packed) in master.layers.iter().zip(&packed.layers) {
        for (master, packed) in matrices(master).into_iter().zip(matrices(packed)) {
            assert!(master.packed() == packed.packed(), "{master:?}");
            // The packed scale was rounded to 8 significant bits.
            let ratio = master.scale().unwrap() / packed.scale().unwrap();
            assert!((ratio - 1.0).abs() < 1.0 / 256.0, "{master:?}");
        }
    }
}

#[test]
fn llama_files_hold_the_weights_of_the_folder() {
    let folder = open("llama-packed");
    assert_eq!(folder.config.architecture, Architecture::Llama);
    assert_eq!(folder.config.activation, Activation::Silu);
    assert_eq!(folder.config.activations, ActivationScheme::Token);
    assert!(!folder.config.tied_head);
    assert_eq!(
        folder.config.rope_scaling,
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 128
        }
    );
    let expected = load_all(&folder);
    assert!(expected.layers.iter().all(|layer| layer.attn_sub_norm.is_none()));
    let identities = ["gguf/llama-tq1_0.gguf", "gguf/llama-tq2_0.gguf"].map(|name| {
        let model = open(name);
        let RopeScaling::Factors(factors) = &model.config.rope_scaling else {
            panic!("{:?}", model.config.rope_scaling);
        };
        assert_eq!(factors.len(), 32);
        // Apart from how the frequencies are said to change, the shapes agree.
        let rope_scaling = folder.config.rope_scaling.clone();
        assert_eq!(ModelConfig { rope_scaling, ..model.config.clone() }, folder.config);
        let frequencies = crate::rotary::Rotary::new(&model.config).frequencies;
        let of_folder = crate::rotary::Rotary::new(&folder.config).frequencies;
        for (one, other) in frequencies.iter().zip(of_folder) {
            assert!((one / other - 1.0).abs() < 1e-6, "{one} {other}");
        }
        let weights = load_all(&model);
        for (found, expected) in weights.layers.iter().zip(&expected.layers) {
            assert_eq!(found.attn_norm, expected.attn_norm);
            assert_eq!(found.ffn_norm, expected.ffn_norm);
            for (found, expected) in matrices(found).into_iter().zip(matrices(expected)) {
                assert!(found.packed() == expected.packed(), "{found:?}");
                // The file rounds the scale to half precision.
                let scale = half::f16::from_f32(expected.scale().unwrap()).to_f32();
                assert_eq!(found.scale(), Some(scale));
            }
        }
        identity(&model)
    });
    assert_eq!(identities[0], identities[1]);
}

#[test]
fn qwen3_in_q2_0_has_norms_of_heads_and_scales_of_blocks() {
    let model = open("gguf/qwen3-q2_0.gguf");
    assert_eq!(model.config.architecture, Architecture::Qwen3);
    assert_eq!(model.config.activations, ActivationScheme::Block64);
    for layer in &load_all(&model).layers {
        for norm in [&layer.q_norm, &layer.k_norm] {
            assert_eq!(norm.as_ref().unwrap().len(), model.config.head_dim);
        }
        for matrix in matrices(layer) {
            let scales = matrix.block_scales().unwrap();
            assert_eq!(scales.len(), matrix.rows() * matrix.cols() / 64);
            assert!(scales.iter().any(|scale| scale.to_bits() != scales[0].to_bits()));
        }
    }
}

#[test]
fn conversion_keeps_the_identity() {
    for name in [
        "bitnet-packed",
        "bitnet-bf16",
        "gguf/bitnet-i2_s.gguf",
        "demo-model",
        "llama-packed",
        "gguf/llama-tq1_0.gguf",
        "gguf/llama-tq2_0.gguf",
        "gguf/qwen3-q2_0.gguf",
    ] {
        let source = open(name);
        let bytes = converted(&source, &format!("identity-{}", name.replace('/', "-")));
        let result = open_bytes(bytes.clone()).unwrap();
        assert_eq!(identity(&source), identity(&result), "{name}");
        assert_eq!(source.name, result.name);
        // A converted file is a fixed point.
        let again = format!("again-{}", name.replace('/', "-"));
        assert!(converted(&result, &again) == bytes, "{name}");
    }
}

#[test]
fn the_built_in_model_is_the_converted_fixture() {
    let demo = crate::demo::model().unwrap();
    assert_eq!(demo.name, crate::demo::NAME);
    let source = open("demo-model");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo-model/demo.gguf");
    assert!(
        converted(&source, "demo") == std::fs::read(path).unwrap(),
        "demo.gguf is out of date; convert tests/fixtures/demo-model again"
    );
    assert_eq!(identity(&demo), identity(&source));
    let plain = GenerationDefaults::PLAIN;
    assert_eq!(demo.generation, GenerationDefaults { temperature: 0.8, top_p: 0.95, ..plain });
}

#[test]
fn stages_hold_their_part_and_join_to_the_whole() {
    let model = open("bitnet-packed");
    let whole = load_all(&model).part_digests();
    let names: Vec<_> = whole.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["embed", "layer.0", "layer.1", "layer.2", "head"]);

    let (first, last) = (model.load(0..1).unwrap(), model.load(1..3).unwrap());
    assert!(first.embed.is_some() && first.head.is_none());
    assert!(last.embed.is_none() && last.head.is_some());
    let middle = model.load(1..2).unwrap();
    assert!(middle.embed.is_none() && middle.head.is_none() && middle.layers.len() == 1);

    let mut joined = last.part_digests();
    joined.extend(first.part_digests());
    joined.extend(middle.part_digests());
    let header = model.header_digest();
    assert_eq!(
        crate::model_file::identity(&header, &joined),
        crate::model_file::identity(&header, &whole)
    );
    joined.pop();
    joined.retain(|(name, _)| name != "layer.1");
    assert_ne!(
        crate::model_file::identity(&header, &joined),
        crate::model_file::identity(&header, &whole)
    );
}

#[test]
#[expect(clippy::reversed_empty_ranges, reason = "such ranges come from a command line")]
fn impossible_layer_ranges_are_refused() {
    let model = open("bitnet-packed");
    for range in [0..0, 2..1, 0..4, 3..4, 0..usize::MAX] {
        let error = model.load(range.clone()).unwrap_err();
        assert!(matches!(error, ModelError::Layers { layers: 3, .. }), "{range:?}: {error}");
    }
}

#[test]
fn every_header_field_enters_the_digest() {
    let changes: [fn(&mut ModelFile); 16] = [
        |model| model.config.context += 1,
        |model| model.config.rope_theta += 1.0,
        |model| model.special.add_bos = false,
        |model| model.special.bos = None,
        |model| model.special.eos.clear(),
        |model| model.chat_template = None,
        |model| model.chat_template = Some(String::new()),
        |model| model.generation.top_k = 1,
        |model| model.generation.min_p = 0.1,
        |model| model.generation.repetition_penalty = 1.1,
        |model| model.config.architecture = Architecture::Llama,
        |model| model.config.activation = Activation::Silu,
        |model| model.config.activations = ActivationScheme::Block64,
        |model| model.config.rope_scaling = RopeScaling::Linear { factor: 2.0 },
        |model| model.config.rope_scaling = RopeScaling::Factors(vec![2.0]),
        |model| model.tokenizer = crate::demo::model().unwrap().tokenizer,
    ];
    let mut digests = vec![open("bitnet-packed").header_digest()];
    for change in changes {
        let mut model = open("bitnet-packed");
        change(&mut model);
        digests.push(model.header_digest());
    }
    digests.sort_unstable();
    digests.dedup();
    assert_eq!(digests.len(), changes.len() + 1);
    let mut renamed = open("bitnet-packed");
    renamed.name.clear();
    assert_eq!(renamed.header_digest(), open("bitnet-packed").header_digest());
}

#[test]
fn output_is_whole_or_absent() {
    let model = open("bitnet-packed");
    let folder = TempFolder::new("output");
    let out = folder.file("model.gguf");
    let mut reports = Vec::new();
    let mut convert = |options: &ConvertOptions| {
        to_gguf(&model, &out, options, &mut |progress| reports.push(progress))
    };
    let size = convert(&ConvertOptions::default()).unwrap().bytes;
    let first = std::fs::read(&out).unwrap();

    let error = convert(&ConvertOptions::default()).unwrap_err();
    assert!(matches!(error, ModelError::Exists { .. }), "{error}");
    assert_eq!(std::fs::read(&out).unwrap(), first);

    let renamed =
        ConvertOptions { name: Some("other".into()), overwrite: true, ..Default::default() };
    convert(&renamed).unwrap();
    assert_eq!(ModelFile::open(&out).unwrap().name, "other");
    assert_eq!(folder.names(), ["model.gguf"]);
    assert_eq!(reports.first(), Some(&Progress { written: size, total: size }));

    let error = to_gguf(&model, Path::new("/"), &ConvertOptions::default(), &mut |_| {});
    assert!(error.is_err());
    let missing = folder.file("missing/model.gguf");
    let error = to_gguf(&model, &missing, &ConvertOptions::default(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, ModelError::Io { action: "create", .. }), "{error}");
}

#[test]
fn the_summary_counts_everything() {
    let model = open("bitnet-packed");
    assert_eq!(model.quantization(), "packed ternary");
    // Keys and values of 2 heads of 64 in 3 layers, as f32.
    assert_eq!(model.config.kv_bytes_per_position(), 3 * 2 * (2 * 64) * 4);
    let summary = model.summary();
    // 512 x 256 embedding; per layer q, o: 256 x 256, k, v: 128 x 256, MLP: 3 x 512 x 256.
    let ternary = 3 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256);
    assert_eq!(summary.totals.ternary_parameters, ternary);
    let norms = 3 * (3 * 256 + 512) + 256;
    assert_eq!(summary.totals.parameters, ternary + norms + 512 * 256);
    assert_eq!(summary.totals.ternary_bytes, ternary / 4);
    assert_eq!(summary.totals.tensors, 1 + 3 * 11 + 1);

    let json = serde_json::to_value(&summary).unwrap();
    assert_eq!(json["format"], "folder-packed");
    assert_eq!(json["config"]["layers"], 3);
    assert_eq!(json["tensors"][2]["type"], "packed ternary");
    assert_eq!(json["tensors"][2]["shape"], serde_json::json!([256, 256]));
    let text = summary.to_string();
    for line in ["format      Hugging Face folder, packed ternary", "end [510, 511]"] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    assert_eq!(text.lines().count(), 14 + 35);

    // The head is the embedding, of 16 bits; blocks of 64 weights have an f32 each.
    assert_eq!(summary.decode.ternary, ternary / 4);
    assert_eq!(summary.decode.scales, 0);
    assert_eq!(summary.decode.head, 512 * 256 * 2);
    let blocks = open("gguf/qwen3-q2_0.gguf").summary();
    assert_eq!(blocks.decode.scales, blocks.totals.ternary_parameters / 64 * 4);
}

#[test]
fn both_tokenizer_sources_give_the_ids_of_transformers() {
    for (expected, names) in [
        ("bitnet-packed", &["bitnet-packed", "bitnet-bf16", "gguf/bitnet-i2_s.gguf"][..]),
        ("llama-packed", &["llama-packed", "gguf/llama-tq1_0.gguf", "gguf/llama-tq2_0.gguf"][..]),
        ("demo-model", &["demo-model", "../../crates/engine/demo-model/demo.gguf"]),
    ] {
        let text = std::fs::read_to_string(fixture(expected).join("expected.json")).unwrap();
        let answers: serde_json::Value = serde_json::from_str(&text).unwrap();
        let cases = answers["cases"].as_array().unwrap();
        assert!(!cases.is_empty());
        for name in names {
            let model = open(name);
            let tokenizer =
                tercet_text::Tokenizer::new(&model.tokenizer, model.special.clone()).unwrap();
            for case in cases {
                let prompt = case["prompt"].as_str().unwrap();
                let ids = tokenizer.encode_prompt(prompt).unwrap();
                assert_eq!(serde_json::json!(ids), case["prompt_ids"], "{name}: {prompt}");
            }
        }
    }
}
