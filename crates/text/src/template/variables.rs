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
        let object = parse(json)?;
        if object.kind() != minijinja::value::ValueKind::Map {
            return Err(invalid(format!("found a {}, expected an object", object.kind())));
        }
        let mut variables = Self { entries: Vec::new(), bytes: json.len() };
        for key in object.try_iter().map_err(invalid)? {
            let value = object.get_item(&key).map_err(invalid)?;
            variables.add(key.to_string(), value)?;
        }
        Ok(variables)
    }

    /// Sets a variable to a JSON value; the order of keys inside it is kept.
    ///
    /// # Errors
    /// The text is no JSON value, or the variable is the conversation's.
    pub fn set(&mut self, name: &str, json: &str) -> Result<(), TemplateError> {
        self.add(name.to_owned(), parse(json)?)?;
        self.bytes += name.len() + json.len();
        Ok(())
    }

    fn add(&mut self, name: String, value: Value) -> Result<(), TemplateError> {
        if matches!(name.as_str(), "messages" | "add_generation_prompt") {
            return Err(invalid(format!("`{name}` is set by the conversation: leave it out")));
        }
        if name.starts_with(super::metered::PREFIX) {
            return Err(invalid(format!("`{name}` is no name of a variable")));
        }
        self.entries.push((name, value));
        Ok(())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, Value)> {
        self.entries.iter().map(|(name, value)| (name.as_str(), value.clone()))
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

fn parse(json: &str) -> Result<Value, TemplateError> {
    serde_json::from_str(json).map_err(invalid)
}

fn invalid(reason: impl ToString) -> TemplateError {
    TemplateError::Variables { reason: reason.to_string() }
}
