//! What a file converted for speed says of its own weights.
//!
//! Reading every weight to check and hash it takes longer than copying it. A native file therefore
//! tells the digests of its parts, and a worker that believes them at first can answer at once; it
//! hashes the weights all the same, between the steps of requests, and gives the model up if the
//! file has lied.

use super::digest::PartDigests;
use super::error::ModelError;
use super::gguf::Gguf;

/// The key of the digests: a line each, such as `layer.0 <64 hexadecimal digits>`. Its number
/// changes with the way parts are hashed.
pub(crate) const KEY: &str = "tercet.native.1.digests";

/// Returns the value of [`KEY`].
pub(crate) fn encode(digests: &PartDigests) -> String {
    let line = |(name, digest): &(String, [u8; 32])| {
        format!("{name} {}\n", blake3::Hash::from_bytes(*digest).to_hex())
    };
    digests.iter().map(line).collect()
}

/// Returns the digests of a file, `None` if it is not a native one.
pub(crate) fn read(gguf: &Gguf, layers: usize) -> Result<Option<PartDigests>, ModelError> {
    let Some(value) = gguf.value(KEY) else { return Ok(None) };
    let problem = |found: String| ModelError::Damaged {
        file: gguf.file().label().to_owned(),
        problem: format!("`{KEY}` {found}"),
    };
    let text = value.as_str().ok_or_else(|| problem(format!("is {value}, expected text")))?;
    let line = |line: &str| {
        let (name, digest) = line.split_once(' ')?;
        Some((name.to_owned(), *blake3::Hash::from_hex(digest).ok()?.as_bytes()))
    };
    let digests: Option<PartDigests> = text.lines().map(line).collect();
    let digests = digests.ok_or_else(|| {
        problem("holds a line that is not a part and 64 hexadecimal digits".to_owned())
    })?;
    let parts = (0..layers).map(|layer| format!("layer.{layer}"));
    let expected = std::iter::once("embed".to_owned()).chain(parts).chain(["head".to_owned()]);
    if !digests.iter().map(|(name, _)| name.as_str()).eq(expected) {
        return Err(problem(format!("names other parts than embed, {layers} layers and head")));
    }
    Ok(Some(digests))
}
