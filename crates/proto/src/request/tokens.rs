//! Requests with a single answer.

use super::check;
use crate::v1;
use crate::violation::{InvalidRequest, Violations};

/// Tokens to score.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ScoreSpec {
    /// Name of the model; `None` asks for the only one served.
    pub model: Option<String>,
    /// At least two.
    pub tokens: Vec<u32>,
}

impl TryFrom<v1::ScoreRequest> for ScoreSpec {
    type Error = InvalidRequest;

    fn try_from(request: v1::ScoreRequest) -> Result<Self, Self::Error> {
        let tokens = request.tokens.unwrap_or_default().ids;
        if tokens.len() < 2 {
            let description = format!("must hold at least 2 ids, got {}", tokens.len());
            return Err(InvalidRequest::new("tokens.ids", description));
        }
        Ok(Self { model: name(request.model), tokens })
    }
}

impl From<ScoreSpec> for v1::ScoreRequest {
    fn from(spec: ScoreSpec) -> Self {
        let tokens = Some(v1::TokenIds { ids: spec.tokens });
        Self { model: spec.model.unwrap_or_default(), tokens }
    }
}

/// A text or a chat to tokenize.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizeSpec {
    /// Name of the model; `None` asks for the only one served.
    pub model: Option<String>,
    /// What to tokenize.
    pub input: TokenizeInput,
    /// Whether the bytes of each token are wanted, too.
    pub token_bytes: bool,
}

/// What to tokenize.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenizeInput {
    /// A text; may be empty.
    Text(String),
    /// As in [`Input::Chat`](super::Input::Chat).
    Chat(v1::Chat),
}

impl TryFrom<v1::TokenizeRequest> for TokenizeSpec {
    type Error = InvalidRequest;

    fn try_from(request: v1::TokenizeRequest) -> Result<Self, Self::Error> {
        let v1::TokenizeRequest { model, text, chat, token_bytes } = request;
        let mut violations = Violations::default();
        if let Some(chat) = &chat {
            violations.require(text.is_empty(), "text", || {
                "must not be set together with chat: ask twice".to_owned()
            });
            check::chat(chat, &mut violations);
        }
        violations.finish()?;
        let input = chat.map_or(TokenizeInput::Text(text), TokenizeInput::Chat);
        Ok(Self { model: name(model), input, token_bytes })
    }
}

impl From<TokenizeSpec> for v1::TokenizeRequest {
    fn from(spec: TokenizeSpec) -> Self {
        let TokenizeSpec { model, input, token_bytes } = spec;
        let (text, chat) = match input {
            TokenizeInput::Text(text) => (text, None),
            TokenizeInput::Chat(chat) => (String::new(), Some(chat)),
        };
        Self { model: model.unwrap_or_default(), text, chat, token_bytes }
    }
}

/// Token ids whose text is wanted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DetokenizeSpec {
    /// Name of the model; `None` asks for the only one served.
    pub model: Option<String>,
    /// The ids; may be none.
    pub tokens: Vec<u32>,
    /// Whether special tokens are left out, instead of spelt.
    pub skip_special_tokens: bool,
}

impl From<v1::DetokenizeRequest> for DetokenizeSpec {
    fn from(request: v1::DetokenizeRequest) -> Self {
        let v1::DetokenizeRequest { model, tokens, skip_special_tokens } = request;
        Self { model: name(model), tokens: tokens.unwrap_or_default().ids, skip_special_tokens }
    }
}

impl From<DetokenizeSpec> for v1::DetokenizeRequest {
    fn from(spec: DetokenizeSpec) -> Self {
        let DetokenizeSpec { model, tokens, skip_special_tokens } = spec;
        let tokens = Some(v1::TokenIds { ids: tokens });
        Self { model: model.unwrap_or_default(), tokens, skip_special_tokens }
    }
}

/// A model to describe.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GetModelSpec {
    /// Name of the model; `None` asks for the only one served.
    pub model: Option<String>,
}

impl From<v1::GetModelRequest> for GetModelSpec {
    fn from(request: v1::GetModelRequest) -> Self {
        Self { model: name(request.model) }
    }
}

impl From<GetModelSpec> for v1::GetModelRequest {
    fn from(spec: GetModelSpec) -> Self {
        Self { model: spec.model.unwrap_or_default() }
    }
}

/// Returns the model that a request names, if it names one.
pub(super) fn name(model: String) -> Option<String> {
    (!model.is_empty()).then_some(model)
}
