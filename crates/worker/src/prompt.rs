//! From a request to the ids the model continues. Blocking: long texts and elaborate templates
//! take milliseconds.

use tercet_proto::{Input, InvalidRequest, v1};
use tercet_text::{ChatMessage, TemplateError};
use tonic::Status;

use crate::core::Loaded;

/// Ids to continue, and how the request calls them.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) ids: Vec<u32>,
    /// Field of the request that they come from.
    pub(crate) field: &'static str,
}

impl Prompt {
    /// Turns what a request gives into ids.
    pub(crate) fn new(input: Input, loaded: &Loaded) -> Result<Self, Status> {
        let (ids, field) = match input {
            Input::Tokens(ids) => (ids, "tokens.ids"),
            Input::Prompt(text) => (encode(loaded, &text, "prompt")?, "prompt"),
            Input::Chat(messages) => {
                let field = "chat.messages";
                let template = loaded.template.as_ref().ok_or_else(|| {
                    let missing = "the model has no chat template: send prompt instead";
                    Status::from(InvalidRequest::new("chat", missing))
                })?;
                let messages: Vec<_> = messages
                    .into_iter()
                    .map(|message| ChatMessage { role: message.role, content: message.content })
                    .collect();
                let text = template.render(&messages, true).map_err(|error| refused(&error))?;
                let ids = loaded.tokenizer.encode_chat(&text);
                (ids.map_err(|error| InvalidRequest::new(field, error.to_string()))?, field)
            }
        };
        if ids.is_empty() {
            let nothing = "holds nothing to continue: at least one token is needed";
            return Err(InvalidRequest::new(field, nothing).into());
        }
        Ok(Self { ids, field })
    }

    /// Returns the prompt as the caller may have it back.
    pub(crate) fn echo(&self, loaded: &Loaded) -> Result<v1::Prompt, InvalidRequest> {
        let text = loaded.tokenizer.decode(&self.ids, true);
        let text = text.map_err(|error| InvalidRequest::new(self.field, error.to_string()))?;
        Ok(v1::Prompt { token_ids: self.ids.clone(), text })
    }
}

/// Turns a text into ids by the model's rules.
pub(crate) fn encode(
    loaded: &Loaded,
    text: &str,
    field: &'static str,
) -> Result<Vec<u32>, InvalidRequest> {
    let ids = loaded.tokenizer.encode_prompt(text);
    ids.map_err(|error| InvalidRequest::new(field, error.to_string()))
}

/// Templates are made for certain conversations: this one is not among them.
fn refused(error: &TemplateError) -> Status {
    InvalidRequest::new("chat.messages", error.to_string()).into()
}
