//! Chat templates: Jinja as `transformers` sets it up, on messages of role and content.
//!
//! `transformers` renders in a sandbox of Jinja2 with `trim_blocks` and `lstrip_blocks`, loop
//! controls, Python's string methods, a `tojson` that does not escape HTML, `raise_exception` and
//! `strftime_now`. A template is part of a downloaded model, so its work is bounded here.

mod clock;
mod generation;
mod json;
mod metered;
mod variables;

use std::{collections::BTreeMap, error::Error as _, fmt};

use minijinja::{Environment, Error, ErrorKind, State, Value};

use self::clock::Clock;
use crate::Excerpt;

pub use self::variables::TemplateVariables;

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
    source: String,
    bos: String,
    eos: String,
}

/// Why a chat could not be rendered.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template is not Jinja, or uses what is not supported: the model file's fault.
    #[error("the chat template does not parse, line {line}: {reason}", reason = Excerpt(.reason))]
    Syntax {
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// The variables for the template are not usable: the request's fault.
    #[error("the variables of the chat template are not usable: {reason}", reason = Excerpt(.reason))]
    Variables {
        /// What is wrong.
        reason: String,
    },
    /// The template refuses these messages with `raise_exception`: the request's fault.
    #[error("the chat template refuses the messages: {reason}", reason = Excerpt(.reason))]
    Refused {
        /// The template's own words.
        reason: String,
    },
    /// The template ran for too long or wrote too much.
    #[error("the chat template takes too long or writes too much, line {line}")]
    Endless {
        /// The line it was at, from 1.
        line: usize,
    },
    /// The template failed on these messages.
    #[error("the chat template fails, line {line}: {reason}", reason = Excerpt(.reason))]
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
        self.render_with(messages, add_generation_prompt, &TemplateVariables::default())
    }

    /// Renders a conversation with variables of the request, such as `enable_thinking` or `tools`.
    ///
    /// # Errors
    /// The template refuses the messages, fails on them or does not end.
    pub fn render_with(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        variables: &TemplateVariables,
    ) -> Result<String, TemplateError> {
        let value = |message: &ChatMessage| {
            Value::from_pairs([("role", &message.role), ("content", &message.content)])
        };
        let mut context = BTreeMap::from([
            // transformers always passes these two, so templates find them defined.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("bos_token", Value::from(&self.bos)),
            ("eos_token", Value::from(&self.eos)),
        ]);
        context.extend(variables.iter());
        context.insert("messages", messages.iter().map(value).collect());
        context.insert("add_generation_prompt", add_generation_prompt.into());
        let fuel = fuel(messages, variables);
        // An environment has one budget for all renderings, and a copy is cheap.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        // Values that a template nests are dropped, compared and written level by level on the
        // stack; this one is as deep as the fuel lets them become, and untouched pages cost nothing.
        let stack = usize::try_from(fuel).unwrap_or(usize::MAX).saturating_mul(STACK_PER_FUEL);
        stacker::maybe_grow(stack, stack, || {
            metered::render(&environment, &self.source, Value::from(context))
                .map_err(TemplateError::from)
        })
    }

    fn with_clock(source: &str, bos: &str, eos: &str, clock: Clock) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        metered::install(&mut environment);
        environment.set_recursion_limit(RECURSION);
        environment.add_filter("tojson", json::tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", move |format: &str| clock.format(format));
        let source = generation::without(source);
        metered::compile(&source)?;
        Ok(Self { environment, source, bos: bos.to_owned(), eos: eos.to_owned() })
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
            ErrorKind::OutOfFuel => Self::Endless { line },
            ErrorKind::SyntaxError => Self::Syntax { line, reason },
            _ => Self::Failed { line, reason },
        }
    }
}

/// Refuses the messages with a reason, which may be any value.
fn raise_exception(state: &State<'_, '_>, reason: Value) -> Result<String, Error> {
    metered::pay(state, &reason)?;
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception")
        .with_source(Raised(reason.to_string())))
}

/// Returns what the rendering of these messages may cost.
fn fuel(messages: &[ChatMessage], variables: &TemplateVariables) -> u64 {
    let bytes: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
    let bytes = (bytes + variables.bytes()) as u64;
    let messages = messages.len() as u64;
    (FUEL + messages * FUEL_PER_MESSAGE + bytes / BYTES_PER_FUEL * PASSES).min(MAX_FUEL)
}

/// The argument of `raise_exception`, on its way out of the template engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// What any rendering may cost: one for an instruction and for 64 bytes handled. Elaborate templates
/// take a few thousand before the first message. A template that means harm gets 1 MB out of it.
const FUEL: u64 = 20_000;
/// What each message adds; elaborate templates take some tens.
const FUEL_PER_MESSAGE: u64 = 500;
/// How often the template may handle each byte of the messages.
const PASSES: u64 = 16;
/// What any conversation may cost at most: 8 MB of text, more than any context holds.
const MAX_FUEL: u64 = 2_000_000;
/// Bytes of stack for one fuel. Nesting a value one level deeper costs eight.
const STACK_PER_FUEL: usize = 128;
/// What the engine charges one fuel for.
const BYTES_PER_FUEL: u64 = 64;
/// How deeply macros may call each other; real templates need fewer than ten levels.
const RECURSION: usize = 64;

#[cfg(test)]
mod tests;
