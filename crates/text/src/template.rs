//! Chat templates: Jinja as `transformers` sets it up, on messages of role and content.
//!
//! `transformers` renders in a sandbox of Jinja2 with `trim_blocks` and `lstrip_blocks`, loop
//! controls, Python's string methods, a `tojson` that does not escape HTML, `raise_exception` and
//! `strftime_now`. A template is part of a downloaded model, so its work is bounded here.

mod clock;
mod json;

use std::{error::Error as _, fmt};

use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig};

use self::clock::Clock;

/// One message of a conversation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ChatMessage {
    /// Who speaks: usually `system`, `user` or `assistant`; templates may know more.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A model's chat template, parsed.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

/// Why a chat could not be rendered.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template is not Jinja, or uses what is not supported: the model file's fault.
    #[error("the chat template does not parse, line {line}: {reason}")]
    Syntax {
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// The template refuses these messages with `raise_exception`: the request's fault.
    #[error("the chat template refuses the messages: {reason}")]
    Refused {
        /// The template's own words.
        reason: String,
    },
    /// The template ran for too long or wrote too much.
    #[error("the chat template does not end within {fuel} steps, line {line}")]
    Endless {
        /// The line it was at, from 1.
        line: usize,
        /// The steps a rendering may take.
        fuel: u64,
    },
    /// The template failed on these messages.
    #[error("the chat template fails, line {line}: {reason}")]
    Failed {
        /// The line, from 1.
        line: usize,
        /// What went wrong there.
        reason: String,
    },
}

impl ChatTemplate {
    /// Parses a template. `bos` and `eos` are the texts of the model's special tokens, empty if it
    /// has none.
    ///
    /// # Errors
    /// The template does not parse; the message names the line.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        Self::with_clock(source, bos, eos, Clock::System)
    }

    /// Renders a conversation to the text the model continues; `add_generation_prompt` makes it end
    /// where the assistant's answer begins.
    ///
    /// # Errors
    /// The template refuses the messages, fails on them or does not end.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let message = |message: &ChatMessage| {
            Value::from_pairs([("role", &message.role), ("content", &message.content)])
        };
        let messages: Vec<Value> = messages.iter().map(message).collect();
        let variables = context! {
            messages,
            add_generation_prompt,
            bos_token => &self.bos,
            eos_token => &self.eos,
        };
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(variables))
            .map_err(TemplateError::from)
    }

    fn with_clock(source: &str, bos: &str, eos: &str, clock: Clock) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment
            .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.add_filter("tojson", json::tojson);
        environment.add_function("raise_exception", |reason: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, "raise_exception")
                .with_source(Raised(reason)))
        });
        environment.add_function("strftime_now", move |format: String| clock.format(&format));
        environment.add_template_owned(NAME, source.to_owned())?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl From<Error> for TemplateError {
    fn from(error: Error) -> Self {
        let mut cause = error.source();
        while let Some(inner) = cause {
            if let Some(Raised(reason)) = inner.downcast_ref() {
                return Self::Refused { reason: reason.clone() };
            }
            cause = inner.source();
        }
        let line = error.line().unwrap_or(1);
        let reason = match error.detail() {
            Some(detail) => format!("{}: {detail}", error.kind()),
            None => error.kind().to_string(),
        };
        match error.kind() {
            ErrorKind::OutOfFuel => Self::Endless { line, fuel: FUEL },
            ErrorKind::SyntaxError => Self::Syntax { line, reason },
            _ => Self::Failed { line, reason },
        }
    }
}

/// The argument of `raise_exception`, on its way out of the template engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// The name the only template goes by inside its environment.
const NAME: &str = "chat_template";
/// What a rendering may cost: one step per instruction and per 64 bytes handled. Long conversations
/// in elaborate templates take some tens of steps a message.
const FUEL: u64 = 2_000_000;
/// How deeply macros may call each other; real templates need fewer than ten levels.
const RECURSION: usize = 64;

#[cfg(test)]
mod tests;
