//! Damaged and hostile GGUF files: every one is an error with the values that show it, none a
//! panic or an allocation its size does not justify.

use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};

use super::*;
use crate::model_file::gguf::types;

/// A whole small model: the fixture of bitnet.cpp.
fn whole() -> Vec<u8> {
    std::fs::read(fixture("gguf/bitnet-i2_s.gguf")).unwrap()
}

/// Opens and loads everything.
fn try_load(bytes: Vec<u8>) -> Result<(), ModelError> {
    let model = open_bytes(bytes)?;
    model.load(0..model.config.layers).map(drop)
}

/// Returns the place after a length-prefixed name.
fn after(bytes: &[u8], name: &str) -> usize {
    let mut needle = (name.len() as u64).to_le_bytes().to_vec();
    needle.extend(name.as_bytes());
    let at = bytes.windows(needle.len()).position(|window| window == needle);
    at.unwrap_or_else(|| panic!("{name} is not in the file")) + needle.len()
}

/// Returns the place of a metadata value, after key and type.
fn value(bytes: &[u8], key: &str) -> usize {
    after(bytes, key) + 4
}

fn set(bytes: &mut [u8], at: usize, new: &[u8]) {
    bytes[at..at + new.len()].copy_from_slice(new);
}

/// Returns the start of the tensor data and the offset of a matrix in it.
fn tensor_start(bytes: &[u8], name: &str) -> usize {
    let at = after(bytes, name);
    let dimensions = usize::from(bytes[at]);
    let at = at + 4 + dimensions * 8 + 4;
    let offset = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    // The fixture's header ends at 14092.
    14_112 + usize::try_from(offset).unwrap()
}

#[test]
fn the_whole_file_loads() {
    try_load(whole()).unwrap();
    let q = "blk.0.attn_q.weight";
    let model = open_bytes(whole()).unwrap();
    let summary = model.tensors.iter().find(|tensor| tensor.name == q).unwrap();
    assert_eq!(summary.range.start, tensor_start(&whole(), q));
}

#[test]
fn every_truncation_is_an_error() {
    let whole = whole();
    let header = 14_112;
    let points = (0..header).step_by(13).chain((header..whole.len()).step_by(40_009));
    for length in points.chain([header - 1, header, whole.len() - 1, 1, 4, 23, 24]) {
        let error = open_bytes(whole[..length].to_vec()).unwrap_err().to_string();
        assert!(
            error.contains("the file ends at") || error.contains("bytes left"),
            "cut at {length}: {error}"
        );
    }
}

#[test]
fn malformed_headers_are_refused() {
    type Change = fn(&mut Vec<u8>);
    let cases: [(Change, &str); 26] = [
        (|b| set(b, 0, b"GGML"), "it starts with the bytes [47, 47, 4d, 4c]"),
        (|b| set(b, 4, &[2]), "GGUF version 2 is not supported, expected 3"),
        (|b| set(b, 4, &[0, 0, 0, 3]), "the file is big-endian"),
        (|b| set(b, 8, &[0xff; 8]), "it claims 18446744073709551615 tensors"),
        (|b| set(b, 16, &[0xff; 8]), "it claims 18446744073709551615 metadata entries"),
        (|b| set(b, 8, &[0xff, 0x3f]), "file"),
        (|b| set(b, 24, &[0xff; 8]), "key 0 of 23 takes 18446744073709551615 bytes at 32"),
        (|b| set(b, 32, &[0xff]), "is not UTF-8"),
        (
            |b| {
                let at = after(b, "general.name");
                set(b, at, &[99]);
            },
            "the value of `general.name` has type 99, expected 0 to 12",
        ),
        (
            |b| {
                let at = value(b, "tokenizer.ggml.add_bos_token");
                set(b, at, &[7]);
            },
            "is the truth value 7, expected 0 or 1",
        ),
        (
            |b| {
                let at = value(b, "tokenizer.ggml.tokens") + 4;
                set(b, at, &[0xff; 8]);
            },
            "it claims 18446744073709551615 entries in the value of `tokenizer.ggml.tokens`",
        ),
        (
            |b| {
                let at = value(b, "tokenizer.ggml.tokens");
                set(b, at, &[13]);
            },
            "has type 13, expected 0 to 12",
        ),
        (
            |b| {
                let at = after(b, "tokenizer.ggml.eos_token_id") - 12;
                set(b, at, b"b");
            },
            "appears twice",
        ),
        (
            |b| {
                let at = after(b, "blk.1.attn_q.weight");
                set(b, at - 15, b"0");
            },
            "the tensor `blk.0.attn_q.weight` appears twice",
        ),
        (
            |b| {
                let at = after(b, "blk.1.attn_q.weight");
                set(b, at, &[0]);
            },
            "has 0 dimensions, expected 1 to 4",
        ),
        (
            |b| {
                let at = after(b, "blk.1.attn_q.weight");
                set(b, at, &[5]);
            },
            "has 5 dimensions, expected 1 to 4",
        ),
        (
            |b| {
                let at = after(b, "blk.1.attn_q.weight");
                set(b, at + 4, &[0; 8]);
            },
            "has dimensions [0, 256], none may be 0",
        ),
        (
            |b| {
                let at = after(b, "blk.1.attn_q.weight");
                set(b, at + 4, &[0xff; 16]);
            },
            "the configuration asks for [256, 256]",
        ),
        (
            |b| {
                let at = after(b, "blk.1.attn_q.weight");
                set(b, at + 20, &[39]);
            },
            "`blk.1.attn_q.weight` has type 39, expected I2_S",
        ),
        (
            |b| {
                let at = after(b, "blk.1.attn_q.weight");
                set(b, at + 24, &[0xe0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
            },
            "takes 16416 bytes at offset 18446744073709551584 of the data",
        ),
        (
            |b| {
                let at = after(b, "blk.1.attn_q.weight");
                set(b, at + 24, &[1]);
            },
            "not a multiple of the alignment 32",
        ),
        (
            |b| {
                let from = after(b, "blk.1.attn_q.weight") + 24;
                let to = after(b, "blk.2.attn_q.weight") + 24;
                b.copy_within(from..from + 8, to);
            },
            "`blk.1.attn_q.weight` (bytes",
        ),
        (
            |b| {
                let at = after(b, "output_norm.weight");
                set(b, at - 1, b"T");
            },
            "tensor `output_norm.weight` is missing",
        ),
        (
            |b| {
                let at = value(b, "general.architecture") + 8;
                set(b, at, b"mamba-2-1.58");
            },
            "architecture `mamba-2-1.58` is not supported by this version; supported: BitNetFor",
        ),
        (
            |b| {
                let at = after(b, "general.architecture");
                set(b, at - 1, b"E");
            },
            "`general.architecture` is missing, expected one of",
        ),
        (
            |b| {
                let at = after(b, "token_embd.weight");
                set(b, at + 20, &[8]);
                set(b, at + 4, &[250]);
            },
            "token_embd.weight` has dimensions [506, 512]",
        ),
    ];
    for (index, (change, expected)) in cases.into_iter().enumerate() {
        let mut bytes = whole();
        change(&mut bytes);
        let error = try_load(bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "case {index}, `{expected}`: {error}");
        assert!(error.starts_with("test.gguf"), "case {index}: {error}");
    }
}

#[test]
fn impossible_metadata_is_refused() {
    let float = f32::to_le_bytes;
    let number = u32::to_le_bytes;
    let cases = [
        ("bitnet-b1.58.embedding_length", number(0), "`embedding_length` is 0, expected 1 to"),
        ("bitnet-b1.58.embedding_length", number(u32::MAX), "is 4294967295, expected 1 to"),
        ("bitnet-b1.58.block_count", number(4), "blk.3.attn_norm.weight` is missing"),
        ("bitnet-b1.58.block_count", number(u32::MAX), "`block_count` is 4294967295"),
        ("bitnet-b1.58.feed_forward_length", number(513), "the configuration asks for [256, 513]"),
        ("bitnet-b1.58.attention.head_count", number(3), "a divisor of the 3 query heads"),
        ("bitnet-b1.58.attention.head_count_kv", number(0), "head_count_kv` is 0"),
        ("bitnet-b1.58.attention.value_length", number(32), "is 32, expected the head width 64"),
        ("bitnet-b1.58.rope.dimension_count", number(32), "is 32, expected the head width 64"),
        ("bitnet-b1.58.vocab_size", number(500), "the configuration asks for [256, 500]"),
        ("bitnet-b1.58.context_length", number(0), "`context_length` is 0"),
        ("bitnet-b1.58.rope.freq_base", float(f32::NAN), "`rope.freq_base` is NaN"),
        ("bitnet-b1.58.attention.layer_norm_rms_epsilon", float(-1.0), "is -1, expected a num"),
        ("bitnet-b1.58.attention.layer_norm_rms_epsilon", float(0.0), "epsilon` is 0, expected"),
        ("bitnet-b1.58.rope.freq_base", float(1.0), "is 1, expected a number from 1.001 to 1000"),
        ("tokenizer.ggml.eos_token_id", number(512), "an id below the vocabulary size 512"),
        ("tokenizer.ggml.bos_token_id", number(u32::MAX), "`bos_token_id` is 4294967295"),
    ];
    for (key, new, expected) in cases {
        let mut bytes = whole();
        let at = value(&bytes, key);
        set(&mut bytes, at, &new);
        let error = try_load(bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{key}, `{expected}`: {error}");
    }
}

#[test]
fn values_that_would_make_the_engine_wrong_are_refused() {
    let q = "blk.1.attn_q.weight";
    let (q_bytes, norm) = (256 * 256 / 4, "blk.2.ffn_sub_norm.weight");
    let cases: [(&str, usize, &[u8], &str); 6] = [
        (q, q_bytes, &f32::NAN.to_le_bytes(), "has the scale NaN, expected a positive number"),
        (q, q_bytes, &f32::INFINITY.to_le_bytes(), "has the scale inf"),
        (q, q_bytes, &0.0_f32.to_le_bytes(), "has the scale 0,"),
        (q, q_bytes, &(-0.5_f32).to_le_bytes(), "has the scale -0.5,"),
        (q, 77, &[0b0011_0000], "is damaged: packed code 3"),
        (norm, 12, &f32::INFINITY.to_le_bytes(), "holds inf at 3, not finite"),
    ];
    for (tensor, at, new, expected) in cases {
        let mut bytes = whole();
        let start = tensor_start(&bytes, tensor);
        set(&mut bytes, start + at, new);
        // Opening reads no weights, and neither does loading the other layers.
        let model = open_bytes(bytes).unwrap();
        model.load(0..1).unwrap();
        let error = model.load(0..3).unwrap_err().to_string();
        assert!(error.contains(tensor) && error.contains(expected), "`{expected}`: {error}");
    }
}

#[test]
fn embeddings_that_are_not_finite_are_refused() {
    let embed = "token_embd.weight";
    let mut bytes = whole();
    let start = tensor_start(&bytes, embed);
    set(&mut bytes, start + 2 * (256 * 7 + 5), &0xfc00_u16.to_le_bytes());
    let model = open_bytes(bytes).unwrap();
    model.load(1..2).unwrap();
    let error = model.load(0..1).unwrap_err().to_string();
    assert!(error.contains(embed) && error.contains("row 7, column 5 is not finite"), "{error}");
}

#[test]
fn embeddings_of_four_bits_stay_as_they_are() {
    let embed = "token_embd.weight";
    let mut bytes = whole();
    let (at, start) = (after(&bytes, embed), tensor_start(&bytes, embed));
    set(&mut bytes, at + 4 + 2 * 8, &types::Q4_0.to_le_bytes());
    // One, as a half, and codes 0 to 15 in both halves of the block.
    let block: Vec<u8> = [0x00, 0x3c].into_iter().chain((0..16).map(|code| code * 17)).collect();
    set(&mut bytes, start, &block.repeat(512 * 256 / 32));
    let weights = load_all(&open_bytes(bytes).unwrap());
    let embed = weights.embed.unwrap();
    assert_eq!(embed.kind(), tercet_kernels::DenseType::Q4_0);
    let mut row = [0.0; 256];
    tercet_kernels::Kernels::detect().dense_row(&embed, 511, &mut row);
    let values: Vec<f32> = (-8_i8..8).map(f32::from).collect();
    assert_eq!(row.to_vec(), values.repeat(16));
}

#[test]
fn other_paths_are_not_models() {
    let folder = TempFolder::new("not-a-model");
    let error = ModelFile::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("the folder has no config.json"), "{error}");
    let error = ModelFile::open(&folder.file("absent")).unwrap_err().to_string();
    assert!(error.starts_with("open "), "{error}");
    for (name, bytes) in [("empty", &b""[..]), ("text", b"hello, this is no model at all")] {
        std::fs::write(folder.file(name), bytes).unwrap();
        let error = ModelFile::open(&folder.file(name)).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    std::fs::copy(fixture("bitnet-packed/config.json"), folder.file("config.json")).unwrap();
    let error = ModelFile::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("neither model.safetensors nor"), "{error}");
}

#[test]
fn damaged_safetensors_are_refused() {
    let folder = TempFolder::new("damaged-safetensors");
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(fixture("bitnet-packed").join(name), folder.file(name)).unwrap();
    }
    let error = |bytes: &[u8]| {
        std::fs::write(folder.file("model.safetensors"), bytes).unwrap();
        ModelFile::open(folder.path()).unwrap_err().to_string()
    };
    let file = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let tensor = |shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let cases = [
        (b"1234567".to_vec(), "it has 7 bytes, a safetensors file at least 8"),
        (vec![0xff; 16], "its header has 18446744073709551615 bytes, more than 100000000"),
        (file("{}", 0)[..9].to_vec(), "its header has 2 bytes, but the file ends after 1"),
        (file("{]", 0), "its header is not valid"),
        (file(r#"{"a":{"dtype":"U8"}}"#, 0), "its header is not valid: missing field `shape`"),
        (file(&tensor("[4]", "[0,4]"), 3), "takes bytes 0..4 of the data, but the data ends at 3"),
        (file(&tensor("[4]", "[4,0]"), 4), "takes bytes 4..0"),
        (file(&tensor("[3]", "[0,4]"), 4), "has the shape [3] of U8 but 4 bytes"),
        (
            // Passes the size check of a reader that adds without looking for overflow.
            file(&tensor("[18446744073709551615]", "[0,18446744073709551615]"), 0),
            "takes bytes 0..18446744073709551615",
        ),
        (
            file(&tensor("[4294967296,4294967296]", "[0,0]"), 0),
            "has the shape [4294967296, 4294967296] of U8 but 0 bytes",
        ),
        (
            file(
                concat!(
                    r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"#,
                    r#""b":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}}"#
                ),
                7,
            ),
            "tensors `a` (ends at 4) and `b` (starts at 3) overlap",
        ),
        (file(&tensor("[4]", "[0,4]"), 4), "`model.embed_tokens.weight` is missing"),
    ];
    for (bytes, expected) in cases {
        let error = error(&bytes);
        assert!(error.contains(expected), "`{expected}`: {error}");
    }
    let data = [0; 12];
    let one = TensorView::new(Dtype::F32, vec![3], &data).unwrap();
    let bytes = safetensors::serialize([("model.embed_tokens.weight", one)], None).unwrap();
    assert!(error(&bytes).contains("has shape [3], the configuration asks for [512, 256]"));
}

#[test]
fn sizes_of_types_never_overflow() {
    for kind in [types::F32, types::Q8_0, types::Q6_K, types::TQ1_0, types::I2_S, types::Q2_0] {
        for total in [0, 1, 128, 256, u64::MAX, u64::MAX - 255, 1 << 63] {
            if let Some(size) = types::size(kind, 256, total) {
                assert!(u128::from(size) <= u128::from(total) * 4 + 32, "{kind} {total}");
            }
        }
    }
    assert_eq!(types::size(types::Q6_K, 512, 1024), Some(840));
    assert_eq!(types::size(types::Q8_0, 48, 96), None);
    assert_eq!(types::size(types::I2_S, 96, 96), None);
    assert_eq!(types::size(99, 256, 256), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes overwritten anywhere in the header give a model or an error, never a panic.
    #[test]
    fn overwritten_headers_never_panic(
        edits in prop::collection::vec((0_usize..14_112, prop::collection::vec(any::<u8>(), 1..9)), 1..4)
    ) {
        let mut bytes = whole();
        for (at, new) in edits {
            set(&mut bytes, at, &new);
        }
        if let Ok(model) = open_bytes(bytes) {
            let layers = model.config.layers;
            if let Ok(weights) = model.load(0..layers) {
                prop_assert_eq!(weights.layers.len(), layers);
            }
            model.header_digest();
            model.summary().to_string();
        }
    }

    /// So do headers of arbitrary bytes after a valid beginning.
    #[test]
    fn arbitrary_headers_never_panic(
        counts in (0_u64..4, 0_u64..4),
        rest in prop::collection::vec(prop_oneof![Just(0_u8), 0_u8..13, any::<u8>()], 0..200)
    ) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(counts.0.to_le_bytes());
        bytes.extend(counts.1.to_le_bytes());
        bytes.extend(rest);
        prop_assert!(open_bytes(bytes).is_err());
    }
}
