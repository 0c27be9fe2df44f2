//! Model files as a whole: the fixtures, folders made up here, and damaged files.

mod converted;
mod fixtures;
mod folders;
mod formats;
mod malformed;
mod natives;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tercet_kernels::TernaryMatrix;

use super::convert::{ConvertOptions, to_gguf};
use super::gguf::Gguf;
use super::mapping::FileBytes;
use super::{LayerWeights, ModelError, ModelFile, StageWeights};

/// Returns a path under `tests/fixtures`.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

/// A folder that disappears with the value.
#[derive(Debug)]
pub(crate) struct TempFolder(PathBuf);

impl TempFolder {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tercet-{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&path));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Returns the names of all files, hidden ones too.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Opens a GGUF file in memory.
fn open_bytes(bytes: Vec<u8>) -> Result<ModelFile, ModelError> {
    ModelFile::open_gguf(FileBytes::new("test.gguf", Arc::new(bytes)), None, None)
}

fn load_all(model: &ModelFile) -> StageWeights {
    model.load(0..model.config.layers).unwrap()
}

/// Returns the ternary matrices of a layer.
fn matrices(layer: &LayerWeights) -> [&TernaryMatrix; 7] {
    let LayerWeights { q, k, v, o, gate, up, down, .. } = layer;
    [q, k, v, o, gate, up, down]
}

fn identity(model: &ModelFile) -> String {
    super::identity(&model.header_digest(), &load_all(model).part_digests())
}

/// Converts and returns the written bytes.
fn converted(model: &ModelFile, name: &str) -> Vec<u8> {
    let folder = TempFolder::new(name);
    let out = folder.file("out.gguf");
    let size = to_gguf(model, &out, &ConvertOptions::default(), &mut |_| {}).unwrap().bytes;
    let bytes = std::fs::read(&out).unwrap();
    assert_eq!(bytes.len() as u64, size);
    bytes
}
