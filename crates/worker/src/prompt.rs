//! From a request to the ids the model continues, and back. Blocking: long texts and elaborate
//! templates take milliseconds.

use tercet_proto::{Input, InvalidRequest, TokenizeInput, v1};
use tercet_text::{ChatMessage, Excerpt, TemplateError, TemplateVariables, TokenizerError};
use tonic::Status;

use crate::core::Loaded;

/// The field with the messages of a conversation.
const MESSAGES: &str = "chat.messages";

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
            Input::Chat(chat) => (encode_chat(loaded, chat)?.0, MESSAGES),
        };
        if ids.is_empty() {
            let nothing = "holds nothing to continue: at least one token is needed";
            return Err(InvalidRequest::new(field, nothing).into());
        }
        Ok(Self { ids, field })
    }

    /// Returns the prompt as the caller may have it back.
    pub(crate) fn echo(&self, loaded: &Loaded) -> Result<v1::Prompt, InvalidRequest> {
        let text = decode(loaded, &self.ids, true, self.field)?;
        Ok(v1::Prompt { token_ids: self.ids.clone(), text })
    }
}

/// Answers `Tokenize`.
pub(crate) fn tokenize(
    loaded: &Loaded,
    input: TokenizeInput,
    token_bytes: bool,
) -> Result<v1::TokenizeResponse, Status> {
    let (ids, rendered) = match input {
        TokenizeInput::Text(text) => (encode(loaded, &text, "text")?, String::new()),
        TokenizeInput::Chat(chat) => encode_chat(loaded, chat)?,
    };
    let bytes = |id: &u32| loaded.tokenizer.token_bytes(*id).to_vec();
    let token_bytes = if token_bytes { ids.iter().map(bytes).collect() } else { Vec::new() };
    Ok(v1::TokenizeResponse { tokens: Some(v1::TokenIds { ids }), rendered, token_bytes })
}

/// Answers `Detokenize` of a model with `vocab` ids.
pub(crate) fn detokenize(
    loaded: &Loaded,
    vocab: usize,
    ids: &[u32],
    skip_special: bool,
) -> Result<v1::DetokenizeResponse, InvalidRequest> {
    let field = "tokens.ids";
    let beyond = |id: &u32| usize::try_from(*id).is_ok_and(|id| id >= vocab);
    if let Some(index) = ids.iter().position(beyond) {
        let description = format!("must be below {vocab}, got {}", ids[index]);
        return Err(InvalidRequest::new(format!("{field}[{index}]"), description));
    }
    Ok(v1::DetokenizeResponse { text: decode(loaded, ids, skip_special, field)? })
}

/// Turns a text into ids by the model's rules.
fn encode(loaded: &Loaded, text: &str, field: &'static str) -> Result<Vec<u32>, InvalidRequest> {
    loaded.tokenizer.encode_prompt(text).map_err(|error| refused(field, &error))
}

/// Turns a conversation into ids, and the text that its template makes of it.
fn encode_chat(loaded: &Loaded, chat: v1::Chat) -> Result<(Vec<u32>, String), InvalidRequest> {
    let v1::Chat { messages, template_variables } = chat;
    let template = loaded.template.as_ref().ok_or_else(|| {
        let missing = "the model has no chat template: send a text instead";
        InvalidRequest::new("chat", missing)
    })?;
    let mut variables = TemplateVariables::default();
    for (name, json) in template_variables {
        variables.set(&name, &json).map_err(|error| {
            let field = format!("chat.template_variables[{}]", Excerpt(&name));
            InvalidRequest::new(field, error.to_string())
        })?;
    }
    let messages: Vec<_> = messages
        .into_iter()
        .map(|message| ChatMessage { role: message.role, content: message.content })
        .collect();
    // Templates are made for certain conversations: this one may not be among them.
    let refused_chat = |error: TemplateError| InvalidRequest::new(MESSAGES, error.to_string());
    let text = template.render_with(&messages, true, &variables).map_err(refused_chat)?;
    let ids = loaded.tokenizer.encode_chat(&text).map_err(|error| refused(MESSAGES, &error))?;
    Ok((ids, text))
}

/// Turns ids into text. A model may have more ids than its tokenizer: those have none.
fn decode(
    loaded: &Loaded,
    ids: &[u32],
    skip_special: bool,
    field: &'static str,
) -> Result<String, InvalidRequest> {
    let tokenizer = &loaded.tokenizer;
    let known: Vec<_> =
        ids.iter().copied().filter(|id| tokenizer.token_text(*id).is_some()).collect();
    tokenizer.decode(&known, skip_special).map_err(|error| refused(field, &error))
}

fn refused(field: &'static str, error: &TokenizerError) -> InvalidRequest {
    InvalidRequest::new(field, error.to_string())
}
