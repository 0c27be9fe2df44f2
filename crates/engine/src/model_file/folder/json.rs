//! Bounded reading of the small JSON files beside the weights.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde_json::{Map, Value};

use crate::model_file::error::ModelError;

/// Most bytes of a configuration file; real ones have a few kilobytes, tokenizer settings with
/// hundreds of added tokens some hundred.
const MAX_CONFIG: u64 = 1 << 24;

/// Returns the text of a file of at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let io = |action| move |source| ModelError::Io { action, path: path.to_owned(), source };
    let file = File::open(path).map_err(io("open"))?;
    let mut text = Vec::new();
    file.take(limit + 1).read_to_end(&mut text).map_err(io("read"))?;
    let label = path.display().to_string();
    if text.len() as u64 > limit {
        let problem = format!("it has more than {limit} bytes, no such file is that large");
        return Err(ModelError::damaged(&label, problem));
    }
    String::from_utf8(text)
        .map_err(|error| ModelError::damaged(&label, format!("it is not UTF-8: {error}")))
}

/// One JSON object and the file it came from.
#[derive(Debug)]
pub(crate) struct Json {
    label: String,
    object: Map<String, Value>,
}

impl Json {
    /// Reads a file that must exist.
    pub(crate) fn read(path: &Path) -> Result<Self, ModelError> {
        let label = path.display().to_string();
        match serde_json::from_str(&read_text(path, MAX_CONFIG)?) {
            Ok(Value::Object(object)) => Ok(Self { label, object }),
            Ok(_) => Err(ModelError::damaged(&label, "it is not a JSON object")),
            Err(error) => Err(ModelError::damaged(&label, format!("it is not JSON: {error}"))),
        }
    }

    /// Reads a file that may be absent.
    pub(crate) fn read_optional(path: &Path) -> Result<Option<Self>, ModelError> {
        if path.exists() { Self::read(path).map(Some) } else { Ok(None) }
    }

    /// Returns the file's name for messages.
    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    /// Returns a field; `null` counts as absent.
    pub(crate) fn value(&self, field: &str) -> Option<&Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// Returns an object-valued field as if it were a file of its own.
    pub(crate) fn object(&self, field: &str) -> Result<Option<Self>, ModelError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Object(object)) => {
                Ok(Some(Self { label: self.label.clone(), object: object.clone() }))
            }
            Some(value) => Err(self.wrong(field, value, "an object")),
        }
    }

    /// Returns a whole number that must be present.
    pub(crate) fn size(&self, field: &str) -> Result<usize, ModelError> {
        self.optional_size(field)?.ok_or_else(|| self.missing(field, "a whole number"))
    }

    /// Returns a whole number.
    pub(crate) fn optional_size(&self, field: &str) -> Result<Option<usize>, ModelError> {
        self.read_as(field, "a whole number of at least 0", |value| {
            value.as_u64().and_then(|size| usize::try_from(size).ok())
        })
    }

    /// Returns a number.
    pub(crate) fn number(&self, field: &str) -> Result<Option<f64>, ModelError> {
        self.read_as(field, "a number", Value::as_f64)
    }

    /// Returns a truth value.
    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>, ModelError> {
        self.read_as(field, "true or false", Value::as_bool)
    }

    /// Returns text.
    pub(crate) fn text(&self, field: &str) -> Result<Option<&str>, ModelError> {
        self.read_as(field, "text", Value::as_str)
    }

    /// Returns one token id or a list of them; empty if absent.
    pub(crate) fn ids(&self, field: &str) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = self.read_as(field, "token ids", |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            other => id(other).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    fn read_as<'a, T>(
        &'a self,
        field: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(field, value, expected))
    }

    /// Returns the error for a field with an impossible value.
    pub(crate) fn wrong(&self, field: &str, value: &Value, expected: &str) -> ModelError {
        let mut found = value.to_string();
        // A wrong value can be a whole document; its beginning is enough to recognise it.
        if let Some((end, _)) = found.char_indices().nth(80) {
            found.truncate(end);
            found.push_str("...");
        }
        ModelError::config(&self.label, field, found, expected)
    }

    /// Returns the error for a field that must be there.
    pub(crate) fn missing(&self, field: &str, expected: &str) -> ModelError {
        ModelError::config(&self.label, field, "missing", expected)
    }
}
