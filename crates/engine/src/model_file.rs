//! Model files: Hugging Face folders and GGUF, opened, loaded by layer range, converted, made up.
//!
//! ```text
//! folder: config.json, *.safetensors, tokenizer.json ... --+
//!                                                          +--> ModelFile --load(A..B)--> weights
//! GGUF: metadata, tensors -------------------------------- +
//! ```
//!
//! Opening reads headers only; every count, offset, length and dimension is checked against the
//! file before it is used, and every tensor the configuration needs is found, with its type and
//! shape. [`ModelFile::load`] then touches the bytes of the layers asked for and checks the values
//! that could make the engine wrong: scales, norms and ternary codes.

mod config;
pub mod convert;
mod digest;
mod error;
mod folder;
mod gguf;
mod load;
mod mapping;
mod names;
mod native;
mod output;
mod summary;
pub mod synth;
mod tensors;
mod ternary;
mod tokenizer;
mod weights;

use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Arc;

use tercet_text::{SpecialTokens, TokenizerSource};

pub use self::{
    config::{
        Activation, ActivationScheme, Architecture, GenerationDefaults, ModelConfig, RopeScaling,
    },
    digest::identity,
    error::ModelError,
    load::{LoadProgress, Placement, Report},
    output::Progress,
    summary::{DecodeBytes, Summary, TensorSummary, TokenizerSummary, Totals},
    weights::{HeadWeights, LayerWeights, StageWeights},
};

use digest::PartDigests;
use folder::json::Json;
use folder::model::FolderModel;
use folder::shards::Shards;
use folder::{FolderConfig, Quantization};
use gguf::Gguf;
use gguf::model::GgufModel;
use mapping::{Arena, FileBytes};
use tensors::{LayerTensors, Tensors};
use tokenizer::TextParts;
use weights::Claims;

/// File formats a model can be in.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ModelFormat {
    /// A Hugging Face folder with packed ternary weights.
    FolderPacked,
    /// A Hugging Face folder with training weights, quantised at load.
    FolderMaster,
    /// A Hugging Face folder with floating-point weights that are ternary already.
    FolderTernary,
    /// A GGUF file.
    Gguf,
}

/// An opened model: everything but its weights is in memory.
#[derive(Debug)]
pub struct ModelFile {
    /// The model's shape.
    pub config: ModelConfig,
    /// Where its tokenizer is.
    pub tokenizer: TokenizerSource,
    /// Ids that begin and end text.
    pub special: SpecialTokens,
    /// The Jinja template of its chat format, if it has one.
    pub chat_template: Option<String>,
    /// Sampling settings its authors recommend.
    pub generation: GenerationDefaults,
    /// A label; not part of the model's identity.
    pub name: String,
    /// The format it was read from.
    pub format: ModelFormat,
    tensors: Tensors,
    /// What a native file says of its parts.
    digests: Option<PartDigests>,
}

impl ModelFile {
    /// Opens a GGUF file or a Hugging Face folder, reading headers only.
    ///
    /// # Errors
    /// If the path is no model, the model is damaged, or this version does not run it.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file_name = |path: &Path| {
            path.file_name()
                .map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
        };
        if path.is_dir() {
            // "." has no name of its own.
            let name = file_name(&path.canonicalize().unwrap_or_else(|_| path.to_owned()));
            return Self::open_folder(path, name);
        }
        let file = FileBytes::map(path)?;
        let name = path.file_stem().map_or_else(|| file_name(path), |n| n.to_string_lossy().into());
        Self::open_gguf(file, Some(name), None)
    }

    /// Opens a GGUF file that is part of the program.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_static(bytes: &'static [u8], name: &str) -> Result<Self, ModelError> {
        Self::open_gguf(FileBytes::new(name, Arc::new(bytes)), None, Some(name.to_owned()))
    }

    /// `name`, else the file's own name for itself, else `fallback`.
    fn open_gguf(
        file: FileBytes,
        fallback: Option<String>,
        name: Option<String>,
    ) -> Result<Self, ModelError> {
        let model = GgufModel::new(Gguf::parse(file)?)?;
        let gguf = model.gguf();
        let own = gguf.value("general.name").and_then(|name| name.as_str()).map(str::to_owned);
        let name = name.or(own).or(fallback).unwrap_or_default();
        let config = model.config()?;
        let mut tensors = Tensors::find(&model, &config)?;
        gguf.check_layout()?;
        let digests = native::read(gguf, config.layers)?;
        if digests.is_some() {
            tensors.trust(true);
        }
        let text = TextParts::from_gguf(gguf)?;
        text.check(gguf.file().label(), config.vocab)?;
        let generation = model.generation()?;
        let file = Self::assemble(ModelFormat::Gguf, name, config, text, generation, tensors);
        Ok(Self { digests, ..file })
    }

    fn open_folder(path: &Path, name: String) -> Result<Self, ModelError> {
        let label = path.display().to_string();
        if !folder::is_model(path) {
            let found = "the folder has no config.json".to_owned();
            return Err(ModelError::NotAModel { file: label, found });
        }
        let json = Json::read(&path.join("config.json"))?;
        folder::check_architecture(&json)?;
        let shards = Shards::open(path)?;
        let has_head = shards.get("lm_head.weight").is_some();
        let FolderConfig { config, quantization, sub_norms } = FolderConfig::read(&json, has_head)?;
        let source = FolderModel { shards, quantization, sub_norms };
        let tensors = Tensors::find(&source, &config)?;
        let generation = Json::read_optional(&path.join("generation_config.json"))?;
        let text = TextParts::from_folder(path, &json, generation.as_ref())?;
        text.check(&label, config.vocab)?;
        let generation = folder::generation(generation.as_ref())?;
        let format = match quantization {
            Quantization::Packed(_) => ModelFormat::FolderPacked,
            Quantization::Master => ModelFormat::FolderMaster,
            Quantization::Groups => ModelFormat::FolderTernary,
        };
        Ok(Self::assemble(format, name, config, text, generation, tensors))
    }

    fn assemble(
        format: ModelFormat,
        name: String,
        config: ModelConfig,
        text: TextParts,
        generation: GenerationDefaults,
        tensors: Tensors,
    ) -> Self {
        let TextParts { tokenizer, special, chat_template } = text;
        Self {
            config,
            tokenizer,
            special,
            chat_template,
            generation,
            name,
            format,
            tensors,
            digests: None,
        }
    }

    /// Returns the model without faith in what a native file says of itself: its weights are
    /// checked when they are loaded, and their digests computed.
    #[must_use]
    pub fn doubted(mut self) -> Self {
        self.tensors.trust(false);
        self
    }

    /// Compares the digests of all parts with those that a native file tells.
    ///
    /// # Errors
    /// If they differ.
    pub fn check_digests(&self, found: &[(String, [u8; 32])]) -> Result<(), ModelError> {
        self.claims(0..self.config.layers).map_or(Ok(()), |claims| claims.check(found))
    }

    /// Returns what a native file says of the parts of a range of layers.
    fn claims(&self, layers: Range<usize>) -> Option<Claims> {
        let (first, last) = (layers.start == 0, layers.end == self.config.layers);
        // The embedding, the layers, the head.
        let parts = layers.start + usize::from(!first)..=layers.end + usize::from(last);
        let file = self.tensors.embed.file.label().to_owned();
        Some(Claims { file, digests: self.digests.as_ref()?[parts].to_vec() })
    }

    /// Loads a range of layers: the embedding too if it starts the model, the head if it ends it.
    ///
    /// Only the bytes of that range are touched. Dense matrices stay where they are in the mapped
    /// file, and ternary rows of whole 128-weight blocks too unless they are copied to huge pages.
    ///
    /// # Errors
    /// If the range is not part of the model, or its values are damaged.
    pub fn load(&self, layers: Range<usize>) -> Result<StageWeights, ModelError> {
        self.load_reporting(layers, Placement::default(), &mut |_| ControlFlow::Continue(()))
    }

    /// As [`Self::load`], and tells `report` how far it is, which may end it.
    ///
    /// # Errors
    /// As [`Self::load`], and [`ModelError::Interrupted`].
    pub fn load_reporting(
        &self,
        layers: Range<usize>,
        placement: Placement,
        report: Report<'_>,
    ) -> Result<StageWeights, ModelError> {
        let total = self.config.layers;
        if layers.is_empty() || layers.end > total {
            let Range { start, end } = layers;
            return Err(ModelError::Layers { start, end, layers: total });
        }
        let (first, last) = (layers.start == 0, layers.end == total);
        let embed_is_head = last && self.tensors.head.is_none();
        let embed =
            (first || embed_is_head).then(|| self.tensors.embed.read_dense()).transpose()?;
        let mut loaded = Vec::with_capacity(layers.len());
        let held = &self.tensors.layers[layers.clone()];
        let packed: Vec<usize> = held.iter().flat_map(LayerTensors::packed_bytes).collect();
        let arena = match placement {
            Placement::Auto => Arena::new(packed.iter().sum(), packed.len()),
            Placement::Mapped => None,
        };
        let mut progress = LoadProgress::of(held.iter().map(LayerTensors::bytes).sum());
        for layer in held {
            loaded.push(layer.load(arena.as_ref())?);
            progress.advance(layer.bytes(), report)?;
        }
        let head = if last {
            let norm = self.tensors.norm.read_vector()?;
            let matrix = match (&self.tensors.head, &embed) {
                (Some(head), _) => head.read_dense()?,
                (None, Some(embed)) => Arc::clone(embed),
                (None, None) => self.tensors.embed.read_dense()?,
            };
            Some(HeadWeights { norm, matrix })
        } else {
            None
        };
        let claims = self.claims(layers.clone());
        let embed = embed.filter(|_| first);
        Ok(StageWeights { range: layers, embed, layers: loaded, head, claims })
    }
}

#[cfg(test)]
pub(crate) mod tests;
