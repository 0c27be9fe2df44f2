//! Targets: model files.

use std::{cell::OnceCell, fs, path::Path};

use tercet_engine::{ModelFile, model_file::identity};
use tercet_tests::Scratch;
use tercet_text::{ChatTemplate, Tokenizer};

use crate::message::{check, good};
use crate::text;

/// Configurations of every kind of weights, all of one shape.
const CONFIGS: [&[u8]; 3] =
    [CONFIG, include_bytes!("../corpus/config/bitnet"), include_bytes!("../corpus/config/groups")];
/// A configuration that fits [`WEIGHTS`].
const CONFIG: &[u8] = include_bytes!("../corpus/config/llama");
/// Weights that fit a configuration of every architecture, with two layers of a few kilobytes.
const WEIGHTS: &[u8] = include_bytes!("../corpus/safetensors/packed");
/// A tokenizer of sixteen ids.
const TOKENIZER: &[u8] = include_bytes!("../corpus/tokenizer/byte-level");

thread_local! {
    static FOLDER: OnceCell<Scratch> = const { OnceCell::new() };
}

/// A GGUF file: header, metadata, tensors, its tokenizer and its chat template.
///
/// # Panics
/// Over a defect.
pub fn gguf(data: &[u8]) -> bool {
    in_folder(|folder| {
        let path = folder.join("model.gguf");
        write(&path, data);
        open(&path)
    })
}

/// The weights of a folder whose other files are good.
///
/// # Panics
/// Over a defect.
pub fn safetensors(data: &[u8]) -> bool {
    in_folder(|folder| {
        CONFIGS.iter().any(|config| {
            folder_of(folder, config, data);
            open(folder)
        })
    })
}

/// The `config.json` of a folder whose other files are good; the same bytes also as its
/// `generation_config.json` and `tokenizer_config.json`.
///
/// # Panics
/// Over a defect.
pub fn config(data: &[u8]) -> bool {
    in_folder(|folder| {
        folder_of(folder, data, WEIGHTS);
        let accepted = open(folder);
        write(&folder.join("config.json"), CONFIG);
        for name in ["generation_config.json", "tokenizer_config.json"] {
            let path = folder.join(name);
            write(&path, data);
            open(folder);
            fs::remove_file(&path).expect("the file was written");
        }
        accepted
    })
}

/// Opens a model and uses all of it.
fn open(path: &Path) -> bool {
    let Some(model) = good(ModelFile::open(path)) else { return false };
    assert!(!model.summary().tensors.is_empty(), "a model without tensors");
    let header = model.header_digest();
    assert_eq!(header, model.header_digest(), "the header has one digest");
    if let Some(tokenizer) = good(Tokenizer::new(&model.tokenizer, model.special.clone())) {
        text::use_tokenizer(&tokenizer);
    }
    if let Some(template) = &model.chat_template
        && let Some(template) = good(ChatTemplate::new(template, "<s>", "</s>"))
    {
        text::use_template(&template);
    }
    let layers = model.config.layers;
    // Each as a stage of its own: first and last stages load more than layers.
    let stages: Vec<_> = (0..layers).filter_map(|at| good(model.load(at..at + 1))).collect();
    let whole = good(model.load(0..layers));
    assert_eq!(stages.len() == layers, whole.is_some(), "the model is as good as its layers");
    let Some(whole) = whole else { return false };
    let digest = identity(&header, &whole.part_digests());
    check(&digest);
    true
}

/// Fills a folder, except for the files that are optional.
fn folder_of(folder: &Path, config: &[u8], weights: &[u8]) {
    write(&folder.join("config.json"), config);
    write(&folder.join("model.safetensors"), weights);
    write(&folder.join("tokenizer.json"), TOKENIZER);
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("the scratch directory takes a file");
}

/// Runs something with this thread's directory.
fn in_folder(run: impl FnOnce(&Path) -> bool) -> bool {
    FOLDER.with(|folder| {
        let new = || Scratch::new("fuzz").expect("the system has a directory for temporary files");
        run(folder.get_or_init(new).path())
    })
}
