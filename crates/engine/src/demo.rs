//! The built-in model, so that everything runs without a download.

use crate::model_file::{ModelError, ModelFile};

/// Puts the file at a cache line, as a mapping would.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// `demo-model/demo.gguf`, written by `tercet model convert`; see the README beside it.
static DEMO: &Aligned<[u8]> = &Aligned(*include_bytes!("../demo-model/demo.gguf"));

/// Name of the built-in model.
pub const NAME: &str = "demo";

/// Opens the built-in model: 2 million parameters trained on Shakespeare's plays.
///
/// # Errors
/// Never in a released build; a test opens it.
pub fn model() -> Result<ModelFile, ModelError> {
    ModelFile::from_static(&DEMO.0, NAME)
}
