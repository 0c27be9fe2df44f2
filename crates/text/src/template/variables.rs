//! Variables of a request for the chat template.

use minijinja::Value;

use super::TemplateError;

/// Variables of a request for the chat template: what `transformers` takes as further arguments of
/// `apply_chat_template`.
#[derive(Clone, Debug, Default)]
pub struct TemplateVariables {
    entries: Vec<(String, Value)>,
    /// Of the JSON text.
    bytes: usize,
}

impl TemplateVariables {
    /// Reads variables from a JSON object; the order of keys inside them is kept.
    ///
    /// # Errors
    /// The text is no JSON object, or sets a variable that is the conversation's.
    pub fn from_json(json: &str) -> Result<Self, TemplateError> {
        let invalid = |reason: String| TemplateError::Variables { reason };
        let object: Value =
            serde_json::from_str(json).map_err(|error| invalid(error.to_string()))?;
        if object.kind() != minijinja::value::ValueKind::Map {
            return Err(invalid(format!("found a {}, expected an object", object.kind())));
        }
        let mut entries = Vec::new();
        for key in object.try_iter().map_err(|error| invalid(error.to_string()))? {
            let name = key.to_string();
            if matches!(name.as_str(), "messages" | "add_generation_prompt") {
                return Err(invalid(format!("`{name}` is set by the conversation: leave it out")));
            }
            if name.starts_with(super::metered::PREFIX) {
                return Err(invalid(format!("`{name}` is no name of a variable")));
            }
            let value = object.get_item(&key).map_err(|error| invalid(error.to_string()))?;
            entries.push((name, value));
        }
        Ok(Self { entries, bytes: json.len() })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, Value)> {
        self.entries.iter().map(|(name, value)| (name.as_str(), value.clone()))
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
