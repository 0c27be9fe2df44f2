//! Native files: what they say of their weights, and what becomes of one that lies.

use std::ops::ControlFlow;

use super::*;
use crate::model_file::native::KEY;
use crate::model_file::synth::TernaryType;
use crate::{ComputePool, Engine, EngineOptions};

fn native(source: &ModelFile, name: &str) -> Vec<u8> {
    let folder = TempFolder::new(name);
    let out = folder.file("native.gguf");
    let options = ConvertOptions { native: true, ..ConvertOptions::default() };
    to_gguf(source, &out, &options, &mut |_| {}).unwrap();
    std::fs::read(&out).unwrap()
}

#[test]
fn a_native_file_tells_the_digests_of_its_source() {
    for name in ["llama-packed", "bitnet-bf16", "gguf/qwen3-q2_0.gguf"] {
        let source = ModelFile::open(&fixture(name)).unwrap();
        let file = open_bytes(native(&source, "native-digests")).unwrap();
        assert_eq!(file.header_digest(), source.header_digest());
        let found = load_all(&source).part_digests();
        let layers = source.config.layers;
        for (range, parts) in [
            (0..layers, 0..layers + 2),
            (0..1, 0..2),
            (1..layers, 2..layers + 2),
            (layers - 1..layers, layers..layers + 2),
        ] {
            let weights = file.load(range.clone()).unwrap();
            let claims = weights.claims.as_ref().unwrap();
            assert_eq!(claims.digests, found[parts], "{name} {range:?}");
            assert_eq!(claims.digests, weights.part_digests(), "{name} {range:?}");
        }
        file.check_digests(&found).unwrap();
    }
}

#[test]
fn what_would_not_be_native_is_refused() {
    let source = ModelFile::open(&fixture("llama-packed")).unwrap();
    let folder = TempFolder::new("native-refused");
    let refused = |options: ConvertOptions| {
        let options = ConvertOptions { native: true, ..options };
        let error = to_gguf(&source, &folder.file("out.gguf"), &options, &mut |_| {});
        error.unwrap_err().to_string()
    };
    let ternary = Some(TernaryType::Tq2_0);
    let error = refused(ConvertOptions { ternary, ..ConvertOptions::default() });
    assert!(error.contains("tq2_0 is not the layout of memory, i2_s is"), "{error}");
    let lora = Some(fixture("no-adapter"));
    let error = refused(ConvertOptions { lora, ..ConvertOptions::default() });
    assert!(error.contains("in a conversion before this one"), "{error}");
    assert!(folder.names().is_empty());
}

#[test]
fn a_file_that_lies_is_found_out() {
    let source = ModelFile::open(&fixture("bitnet-bf16")).unwrap();
    let honest = native(&source, "native-lies");
    let pool = ComputePool::new(2).unwrap();
    let verify = |bytes: Vec<u8>| {
        let file = open_bytes(bytes).unwrap();
        let options = EngineOptions { kv_bytes: 1 << 20, ..EngineOptions::default() };
        let report = &mut |_| ControlFlow::Continue(());
        let engine = Engine::load_on(&file, &options, &pool, None, report).unwrap();
        // What it says is believed at first.
        assert_eq!(engine.part_digests(report).unwrap(), file.digests.clone().unwrap());
        let verified = engine.unverified().unwrap().verify(report);
        let doubted = file.doubted();
        let loaded = doubted.load(0..doubted.config.layers);
        let checked = loaded.and_then(|weights| doubted.check_digests(&weights.part_digests()));
        (verified.map_err(|e| e.to_string()), checked.map_err(|e| e.to_string()))
    };
    assert_eq!(verify(honest.clone()), (Ok(()), Ok(())));
    // Another valid weight somewhere in the last ternary matrix.
    let file = open_bytes(honest.clone()).unwrap();
    let last = file.config.layers - 1;
    let down = file.tensors.layers[last].get(crate::model_file::tensors::Part::Down).unwrap();
    let at = down.range.start + 5;
    let mut lying = honest;
    lying[at] = (lying[at] & !3) | (((lying[at] & 3) + 1) % 3);
    let part = format!("the digest of its part layer.{last} is not the one it tells");
    let (verified, checked) = verify(lying);
    assert!(verified.unwrap_err().contains(&part));
    assert!(checked.unwrap_err().contains(&part));
}

#[test]
fn damaged_digests_are_refused() {
    let source = ModelFile::open(&fixture("bitnet-bf16")).unwrap();
    let honest = native(&source, "native-damaged");
    let key = honest.windows(KEY.len()).position(|bytes| bytes == KEY.as_bytes()).unwrap();
    // The type of the value and its length are between the key and the text.
    let text = key + KEY.len() + 12;
    for (at, byte, expected) in [
        (text, b'x', "names other parts than embed"),
        (text + 5, b'x', "a part and 64 hexadecimal digits"),
        (text + 10, b'g', "a part and 64 hexadecimal digits"),
    ] {
        let mut damaged = honest.clone();
        damaged[at] = byte;
        let error = open_bytes(damaged).map(drop).unwrap_err().to_string();
        assert!(error.contains(KEY) && error.contains(expected), "{error}");
    }
}
