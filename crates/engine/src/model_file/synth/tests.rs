use std::sync::Arc;

use super::*;
use crate::model_file::tests::TempFolder;
use crate::model_file::{
    Activation, ActivationScheme, Architecture, ModelConfig, ModelError, ModelFile, RopeScaling,
};

/// A BitNet small enough for tests, with rows that fit every type.
fn small(family: Family) -> Sizes {
    let config = ModelConfig {
        architecture: match family {
            Family::BitNet => Architecture::BitNet,
            Family::Llama => Architecture::Llama,
            Family::Qwen3 => Architecture::Qwen3,
        },
        activation: Activation::Silu,
        activations: ActivationScheme::Token,
        rope_scaling: RopeScaling::None,
        hidden: 256,
        intermediate: 512,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocab: 400,
        context: 128,
        rope_theta: 10_000.0,
        rms_eps: 1e-5,
        tied_head: family != Family::Llama,
    };
    Sizes { family, config }
}

fn options(ternary: TernaryType, head: HeadType, seed: u64) -> SynthOptions {
    let sizes = SizeOverrides::default();
    SynthOptions { shape: Shape::Small125M, sizes, ternary, head, seed, overwrite: false }
}

fn written(family: Family, options: &SynthOptions) -> Vec<u8> {
    let SynthOptions { ternary, head, seed, .. } = options;
    let folder = TempFolder::new(&format!("synth-{family:?}-{ternary}-{head}-{seed}"));
    let out = folder.file("model.gguf");
    let mut last = None;
    let size = write_sizes(&small(family), "small", options, &out, &mut |p| last = Some(p));
    let bytes = std::fs::read(&out).unwrap();
    assert_eq!(bytes.len() as u64, size.unwrap());
    assert_eq!(
        last.map(|last| (last.written, last.total)),
        Some((bytes.len() as u64, bytes.len() as u64))
    );
    bytes
}

fn open(bytes: Vec<u8>) -> Result<ModelFile, ModelError> {
    let file = crate::model_file::FileBytes::new("synth.gguf", Arc::new(bytes));
    ModelFile::open_gguf(file, None, None)
}

#[test]
fn a_seed_gives_the_same_bytes_and_another_seed_others() {
    let base = options(TernaryType::I2S, HeadType::Q6K, 1);
    let first = written(Family::BitNet, &base);
    // Pinned: made-up models of different machines and versions are the same model.
    assert_eq!(
        blake3::hash(&first).to_hex().as_str(),
        "0c048f5dc94e7e402278c6c25aa4fa21aae535b93816acd1bf43d193edbfd6d6"
    );
    assert!(first == written(Family::BitNet, &base));
    assert!(first != written(Family::BitNet, &options(TernaryType::I2S, HeadType::Q6K, 2)));
}

#[test]
fn every_head_type_holds_the_same_values() {
    let mut digests = Vec::new();
    let (exact, rounded) = HeadType::ALL.split_at(5);
    assert_eq!(rounded, [HeadType::Q4_0]);
    for &head in exact {
        let model = open(written(Family::BitNet, &options(TernaryType::I2S, head, 3))).unwrap();
        let weights = model.load(0..2).unwrap();
        assert_eq!(model.summary().tensors[0].kind, head.to_string().to_uppercase());
        digests.push((model.header_digest(), weights.part_digests()));
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

#[test]
fn scales_are_plausible_and_differ() {
    let model =
        open(written(Family::BitNet, &options(TernaryType::I2S, HeadType::F16, 4))).unwrap();
    let weights = model.load(0..2).unwrap();
    let unit = (256.0_f32 * 2.0 / 3.0).sqrt();
    // Two layers have four branches, which add up to half of the embedding.
    let branch = 0.25 * encode::DENSE_SPREAD;
    let mut scales: Vec<f32> = Vec::new();
    for layer in &weights.layers {
        for (matrix, gain) in [
            (&layer.q, 2.0_f32.sqrt()),
            (&layer.k, 2.0_f32.sqrt()),
            (&layer.v, 1.0),
            (&layer.o, branch),
            (&layer.gate, 1.0),
            (&layer.up, 1.0),
            (&layer.down, branch / 2.0_f32.sqrt()),
        ] {
            let scale = matrix.scale().unwrap() * unit / gain;
            assert!((0.89..1.11).contains(&scale), "{scale}");
            scales.push(scale);
        }
    }
    scales.sort_by(f32::total_cmp);
    scales.dedup();
    // Fourteen were drawn; two may round to the same number.
    assert!(scales.len() > 11, "{scales:?}");
    // Either sign, and logits that spread by 1.5.
    let norm = &weights.head.as_ref().unwrap().norm;
    let magnitude = 1.5 / (encode::DENSE_SPREAD * 16.0);
    assert!(norm.iter().all(|weight| (0.74..1.26).contains(&(weight.abs() / magnitude))));
    let negative = norm.iter().filter(|weight| weight.is_sign_negative()).count();
    assert!((96..160).contains(&negative), "{negative} of 256");
    // About a third each of -1, 0 and 1.
    let gate = &weights.layers[0].gate;
    for wanted in [-1, 0, 1] {
        let count = (0..512 * 256).filter(|at| gate.trit(at / 256, at % 256) == wanted).count();
        assert!((42_000..46_000).contains(&count), "{count} of {wanted}");
    }
}

#[test]
fn every_type_of_every_family_loads_as_the_same_weights() {
    for family in [Family::BitNet, Family::Llama, Family::Qwen3] {
        let load = |ternary| {
            let model = open(written(family, &options(ternary, HeadType::Q8_0, 5))).unwrap();
            let weights = model.load(0..2).unwrap();
            (model, weights)
        };
        let (_, reference) = load(TernaryType::I2S);
        for ternary in [TernaryType::Tq1_0, TernaryType::Tq2_0] {
            let (model, weights) = load(ternary);
            assert_eq!(model.config.activations, ActivationScheme::Token);
            assert_eq!(weights.part_digests(), reference.part_digests(), "{family:?} {ternary}");
        }
        let (model, weights) = load(TernaryType::Q2_0);
        assert_eq!(model.config.activations, ActivationScheme::Block64);
        let pairs = weights.layers.iter().zip(&reference.layers);
        for (blocks, one) in pairs.flat_map(|(a, b)| [(&a.q, &b.q), (&a.down, &b.down)]) {
            assert!(blocks.packed() == one.packed(), "{family:?}");
            let scales = blocks.block_scales().unwrap();
            assert_eq!(scales.len(), blocks.rows() * blocks.cols() / 64);
            assert!(scales.iter().all(|scale| Some(*scale) == one.scale()), "{family:?}");
        }
    }
}

/// Returns the ternary codes of one matrix, decoded by the formulas of llama.cpp's
/// `dequantize_row_*`.
fn decode(kind: TernaryType, bytes: &[u8]) -> Vec<u8> {
    let mut codes = Vec::new();
    match kind {
        TernaryType::I2S => unreachable!("read by the loader itself"),
        TernaryType::Tq1_0 => {
            const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
            let mut digits = |bytes: &[u8], count: usize| {
                for power in &POWERS[..count] {
                    for byte in bytes {
                        let top = (u16::from(byte.wrapping_mul(*power)) * 3) >> 8;
                        codes.push(u8::try_from(top).unwrap());
                    }
                }
            };
            for block in bytes.chunks_exact(54) {
                digits(&block[..32], 5);
                digits(&block[32..48], 5);
                digits(&block[48..52], 4);
            }
        }
        TernaryType::Tq2_0 => {
            for block in bytes.chunks_exact(66) {
                for half in block[..64].chunks_exact(32) {
                    for shift in [0, 2, 4, 6] {
                        codes.extend(half.iter().map(|byte| byte >> shift & 3));
                    }
                }
            }
        }
        TernaryType::Q2_0 => {
            for block in bytes.chunks_exact(18) {
                codes.extend((0..64).map(|j| block[2 + j / 4] >> (2 * (j % 4)) & 3));
            }
        }
    }
    codes
}

#[test]
fn every_ternary_type_holds_the_same_weights() {
    let (rows, cols) = (3, 512);
    let stream = Stream::new(9, "blk.0.ffn_down.weight");
    let scale = scale(&stream, cols, 0.25);
    let mut expected = vec![0; rows * cols];
    for (row, codes) in expected.chunks_exact_mut(cols).enumerate() {
        stream.codes(row, codes);
    }
    for (kind, scale_at, block) in
        [(TernaryType::Tq1_0, 52, 54), (TernaryType::Tq2_0, 64, 66), (TernaryType::Q2_0, 0, 18)]
    {
        let mut bytes = Vec::new();
        for codes in expected.chunks_exact(cols) {
            ternary::encode::row(kind, codes, |_| scale, &mut bytes);
        }
        assert!(decode(kind, &bytes) == expected, "{kind}");
        for block in bytes.chunks_exact(block) {
            assert_eq!(block[scale_at..scale_at + 2], scale.to_le_bytes(), "{kind}");
        }
    }
}

#[test]
fn small_and_odd_sizes_load() {
    let folder = TempFolder::new("synth-sizes");
    let out = folder.file("model.gguf");
    for (shape, ternary, hidden, intermediate) in [
        (Shape::Small125M, TernaryType::I2S, 96, 160),
        (Shape::Llama3B8, TernaryType::Tq1_0, 256, 512),
        (Shape::BonsaiB4, TernaryType::Q2_0, 192, 320),
    ] {
        let sizes = SizeOverrides {
            hidden: Some(hidden),
            intermediate: Some(intermediate),
            layers: Some(3),
            // One key-value head; every matrix is whole blocks of I2_S.
            heads: Some(4),
            kv_heads: Some(1),
            head_dim: Some(64),
            vocab: Some(300),
            context: Some(64),
        };
        let options =
            SynthOptions { sizes, shape, overwrite: true, ..options(ternary, HeadType::F16, 6) };
        write(&options, &out, &mut |_| {}).unwrap();
        let model = ModelFile::open(&out).unwrap();
        assert_eq!((model.config.hidden, model.config.kv_heads), (hidden, 1), "{shape}");
        let weights = model.load(0..3).unwrap();
        let stream = Stream::new(6, "blk.2.ffn_down.weight");
        let mut codes = vec![0; intermediate];
        for row in [0, 1, hidden - 1] {
            stream.codes(row, &mut codes);
            let down = &weights.layers[2].down;
            let found = (0..intermediate).map(|col| down.trit(row, col) + 1);
            assert!(found.eq(codes.iter().map(|code| code.cast_signed())), "{shape} {row}");
        }
    }
}

#[test]
fn sizes_that_make_no_model_are_refused() {
    let folder = TempFolder::new("synth-refused");
    for (sizes, expected) in [
        (SizeOverrides { kv_heads: Some(5), ..SizeOverrides::default() }, "`--kv-heads` is 5"),
        (SizeOverrides { layers: Some(0), ..SizeOverrides::default() }, "`--layers` is 0"),
        (SizeOverrides { hidden: Some(100), ..SizeOverrides::default() }, "`--hidden` is 100"),
        (SizeOverrides { vocab: Some(10), ..SizeOverrides::default() }, "a vocabulary of 10"),
    ] {
        let options = SynthOptions { sizes, ..options(TernaryType::I2S, HeadType::F16, 6) };
        let error = write(&options, &folder.file("x.gguf"), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(folder.names(), [""; 0]);
}
