//! What can be wrong with a model, with the values that show it.

use std::path::PathBuf;

use tercet_text::Excerpt;

/// Reasons a model cannot be opened, loaded, converted or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The operating system refused a file operation.
    #[error("{action} {}: {source}", Excerpt(.path.display()))]
    Io {
        /// What was being done, for example `open`.
        action: &'static str,
        /// The file or folder concerned.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The path holds neither a model folder nor a GGUF file.
    #[error(
        "{file} is not a model: {found}; expected a GGUF file or a folder with config.json and \
         safetensors weights",
        file = Excerpt(.file),
        found = Excerpt(.found),
    )]
    NotAModel {
        /// The path given.
        file: String,
        /// What is there instead.
        found: String,
    },
    /// The bytes contradict the file format.
    #[error(
        "{file}: {problem}; the file is damaged or incomplete, fetch or convert it again",
        file = Excerpt(.file),
        problem = Excerpt(.problem),
    )]
    Damaged {
        /// The file.
        file: String,
        /// The offending value and the limit it breaks.
        problem: String,
    },
    /// A well-formed file uses something this version does not handle.
    #[error("{file}: {problem}", file = Excerpt(.file), problem = Excerpt(.problem))]
    Unsupported {
        /// The file.
        file: String,
        /// What is not handled, and what would be.
        problem: String,
    },
    /// The architecture is not one of those this version runs.
    #[error(
        "{file}: architecture `{found}` is not supported by this version; supported: {supported}",
        file = Excerpt(.file),
        found = Excerpt(.found),
    )]
    Architecture {
        /// The file.
        file: String,
        /// The architecture it names.
        found: String,
        /// Everything that is supported, comma-separated.
        supported: &'static str,
    },
    /// A configuration value is missing or impossible.
    #[error(
        "{file}: `{field}` is {found}, expected {expected}",
        file = Excerpt(.file),
        field = Excerpt(.field),
        found = Excerpt(.found),
        expected = Excerpt(.expected),
    )]
    Config {
        /// The file.
        file: String,
        /// The configuration key.
        field: String,
        /// Its value, or `missing`.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// A tensor the architecture needs is absent.
    #[error(
        "{file}: tensor `{tensor}` is missing; the file is incomplete or of another architecture",
        file = Excerpt(.file),
        tensor = Excerpt(.tensor),
    )]
    MissingTensor {
        /// The file or folder.
        file: String,
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor's type, shape or values do not fit the model.
    #[error(
        "{file}: tensor `{tensor}` {problem}",
        file = Excerpt(.file),
        tensor = Excerpt(.tensor),
        problem = Excerpt(.problem),
    )]
    Tensor {
        /// The file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The offending value and what was expected.
        problem: String,
    },
    /// A layer range outside the model was asked for.
    #[error(
        "layers {start}..{end} are not a part of this model; expected a non-empty range within \
         0..{layers}"
    )]
    Layers {
        /// First layer asked for.
        start: usize,
        /// One past the last layer asked for.
        end: usize,
        /// Layers the model has.
        layers: usize,
    },
    /// Whoever asked for a model to be loaded does not want it any more.
    #[error("loading was interrupted")]
    Interrupted,
    /// The output file exists and overwriting was not asked for.
    #[error(
        "{} exists; choose another path or ask for it to be overwritten",
        Excerpt(.path.display()),
    )]
    Exists {
        /// The output path.
        path: PathBuf,
    },
    /// The requested file cannot exist in the requested format.
    #[error("cannot write {what}: {problem}", problem = Excerpt(.problem))]
    Unwritable {
        /// The tensor or file asked for.
        what: String,
        /// Why, and what would work.
        problem: String,
    },
}

impl ModelError {
    /// Returns a [`ModelError::Damaged`].
    pub(crate) fn damaged(file: &str, problem: impl Into<String>) -> Self {
        Self::Damaged { file: file.to_owned(), problem: problem.into() }
    }

    /// Returns a [`ModelError::Unsupported`].
    pub(crate) fn unsupported(file: &str, problem: impl Into<String>) -> Self {
        Self::Unsupported { file: file.to_owned(), problem: problem.into() }
    }

    /// Returns a [`ModelError::Config`].
    pub(crate) fn config(
        file: &str,
        field: &str,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Config {
            file: file.to_owned(),
            field: field.to_owned(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }

    /// Returns a [`ModelError::Tensor`].
    pub(crate) fn tensor(file: &str, tensor: &str, problem: impl Into<String>) -> Self {
        Self::Tensor { file: file.to_owned(), tensor: tensor.to_owned(), problem: problem.into() }
    }
}
