//! Validated requests: what is left to check here is only what depends on the model.
//!
//! Servers turn wire messages into these at the edge and pass only these on; a gateway turns them
//! back, without copying, to ask a worker.

use std::collections::BTreeMap;

use crate::grammar::{self, GrammarSpec};
use crate::v1;
use crate::violation::{InvalidRequest, Violations};

mod check;
#[cfg(test)]
mod tests;
mod tokens;

pub use self::tokens::{DetokenizeSpec, GetModelSpec, ScoreSpec, TokenizeInput, TokenizeSpec};

/// Most stop strings of one request: each is matched against every token's text.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string, in bytes: text is withheld while it may become one.
pub const MAX_STOP_STRING_BYTES: usize = 1024;
/// Most stop tokens of one request.
pub const MAX_STOP_TOKENS: usize = 64;
/// Most token ids with a bias of one request.
pub const MAX_LOGIT_BIASES: usize = 1024;
/// Largest bias, and the smallest below 0.
pub const MAX_LOGIT_BIAS: f32 = 100.0;
/// Largest frequency and presence penalty, and the smallest below 0.
pub const MAX_PENALTY: f32 = 2.0;
/// Most alternatives named beside each token.
pub const MAX_TOP_LOGPROBS: u32 = 20;
/// Longest cache salt, in bytes.
pub const MAX_CACHE_SALT_BYTES: usize = 256;
/// Most variables for the chat template.
pub const MAX_TEMPLATE_VARIABLES: usize = 64;
/// Most bytes of their names and values together.
pub const MAX_TEMPLATE_VARIABLES_BYTES: usize = 64 << 10;

/// A completion to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateSpec {
    /// Name of the model; `None` asks for the only one served.
    pub model: Option<String>,
    /// What to continue.
    pub input: Input,
    /// Overrides of the model's sampling defaults.
    pub sampling: SamplingSpec,
    /// When to stop.
    pub stop: StopSpec,
    /// Where an earlier stream of the same request broke off.
    pub resume: Option<ResumeSpec>,
    /// How many alternatives to name beside each token and its log-probability, at most
    /// [`MAX_TOP_LOGPROBS`]; `None` asks for no log-probabilities.
    pub logprobs: Option<u32>,
    /// Whether to send the prompt back first.
    pub echo: bool,
    /// Keeps caches apart; at most [`MAX_CACHE_SALT_BYTES`] long.
    pub cache_salt: String,
    /// What the completion has to look like.
    pub grammar: Option<GrammarSpec>,
    /// Tokens for which the worker is to compute nothing else.
    pub alone_tokens: u32,
}

/// What a completion continues.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Text for the model's tokenizer; may be empty.
    Prompt(String),
    /// Token ids, used as given; at least one.
    Tokens(Vec<u32>),
    /// Messages for the model's chat template, at least one, each with a role; and at most
    /// [`MAX_TEMPLATE_VARIABLES`] variables, of which nobody has read the JSON yet.
    Chat(v1::Chat),
}

/// Overrides of the model's sampling defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingSpec {
    /// Finite and at least 0; 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 keeps all tokens.
    pub top_k: Option<u32>,
    /// In (0, 1]; 1 keeps all tokens.
    pub top_p: Option<f32>,
    /// Key of the draws; `None` lets the server draw one.
    pub seed: Option<u64>,
    /// In [0, 1]; 0 keeps all tokens.
    pub min_p: Option<f32>,
    /// Finite and above 0; 1 changes nothing.
    pub repetition_penalty: Option<f32>,
    /// At most [`MAX_PENALTY`] from 0.
    pub frequency_penalty: Option<f32>,
    /// At most [`MAX_PENALTY`] from 0.
    pub presence_penalty: Option<f32>,
    /// Of at most [`MAX_LOGIT_BIASES`] ids, at most [`MAX_LOGIT_BIAS`] from 0.
    pub logit_bias: BTreeMap<u32, f32>,
}

/// When a completion ends.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct StopSpec {
    /// Most completion tokens, at least 1; `None` for what is left of the context.
    pub max_tokens: Option<u32>,
    /// At most [`MAX_STOP_STRINGS`], none empty or longer than [`MAX_STOP_STRING_BYTES`].
    pub strings: Vec<String>,
    /// Whether to go on past end-of-sequence tokens.
    pub ignore_eos: bool,
    /// At most [`MAX_STOP_TOKENS`] ids that end the completion.
    pub token_ids: Vec<u32>,
}

/// Where an earlier stream of the same request broke off.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ResumeSpec {
    /// Its seed; equal to the request's own if that has one.
    pub seed: u64,
    /// Tokens it produced, at most `max_tokens`. The last may have ended the completion.
    pub token_ids: Vec<u32>,
}

impl GenerateSpec {
    /// Returns the seed the request fixes, by its sampling or by what it resumes.
    pub fn seed(&self) -> Option<u64> {
        self.resume.as_ref().map(|resume| resume.seed).or(self.sampling.seed)
    }
}

impl TryFrom<v1::GenerateRequest> for GenerateSpec {
    type Error = InvalidRequest;

    fn try_from(request: v1::GenerateRequest) -> Result<Self, Self::Error> {
        let v1::GenerateRequest {
            model,
            input,
            sampling,
            stop,
            resume,
            logprobs,
            echo,
            cache_salt,
            grammar,
            alone_tokens,
        } = request;
        let sampling = sampling.unwrap_or_default();
        let stop = stop.unwrap_or_default();

        let mut violations = Violations::default();
        check::input(input.as_ref(), &mut violations);
        check::sampling(&sampling, &mut violations);
        check::stop(&stop, &mut violations);
        if let Some(resume) = &resume {
            check::resume(resume, &sampling, &stop, &mut violations);
        }
        if let Some(v1::Logprobs { top }) = logprobs {
            violations.require(top <= MAX_TOP_LOGPROBS, "logprobs.top", || {
                format!("must be at most {MAX_TOP_LOGPROBS}, got {top}")
            });
        }
        if let Some(grammar) = &grammar {
            grammar::check(grammar, &stop, &mut violations);
        }
        violations.require(cache_salt.len() <= MAX_CACHE_SALT_BYTES, "cache_salt", || {
            format!("must be at most {MAX_CACHE_SALT_BYTES} bytes long, got {}", cache_salt.len())
        });
        violations.finish()?;

        Ok(Self {
            model: tokens::name(model),
            input: match input.expect("checked above") {
                v1::generate_request::Input::Prompt(text) => Input::Prompt(text),
                v1::generate_request::Input::Tokens(tokens) => Input::Tokens(tokens.ids),
                v1::generate_request::Input::Chat(chat) => Input::Chat(chat),
            },
            sampling: SamplingSpec {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                seed: sampling.seed,
                min_p: sampling.min_p,
                repetition_penalty: sampling.repetition_penalty,
                frequency_penalty: sampling.frequency_penalty,
                presence_penalty: sampling.presence_penalty,
                logit_bias: sampling.logit_bias,
            },
            stop: StopSpec {
                max_tokens: stop.max_tokens,
                strings: stop.strings,
                ignore_eos: stop.ignore_eos.unwrap_or_default(),
                token_ids: stop.token_ids,
            },
            resume: resume.map(|v1::Resume { seed, token_ids }| ResumeSpec { seed, token_ids }),
            logprobs: logprobs.map(|logprobs| logprobs.top),
            echo: echo.unwrap_or_default(),
            cache_salt,
            grammar: grammar.and_then(GrammarSpec::read),
            alone_tokens,
        })
    }
}

impl From<GenerateSpec> for v1::GenerateRequest {
    fn from(spec: GenerateSpec) -> Self {
        let GenerateSpec {
            model,
            input,
            sampling,
            stop,
            resume,
            logprobs,
            echo,
            cache_salt,
            grammar,
            alone_tokens,
        } = spec;
        Self {
            model: model.unwrap_or_default(),
            input: Some(match input {
                Input::Prompt(text) => v1::generate_request::Input::Prompt(text),
                Input::Tokens(ids) => v1::generate_request::Input::Tokens(v1::TokenIds { ids }),
                Input::Chat(chat) => v1::generate_request::Input::Chat(chat),
            }),
            sampling: Some(v1::Sampling {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                seed: sampling.seed,
                min_p: sampling.min_p,
                repetition_penalty: sampling.repetition_penalty,
                frequency_penalty: sampling.frequency_penalty,
                presence_penalty: sampling.presence_penalty,
                logit_bias: sampling.logit_bias,
            }),
            stop: Some(v1::Stop {
                max_tokens: stop.max_tokens,
                strings: stop.strings,
                ignore_eos: Some(stop.ignore_eos),
                token_ids: stop.token_ids,
            }),
            resume: resume.map(|ResumeSpec { seed, token_ids }| v1::Resume { seed, token_ids }),
            logprobs: logprobs.map(|top| v1::Logprobs { top }),
            echo: Some(echo),
            cache_salt,
            grammar: grammar.map(Into::into),
            alone_tokens,
        }
    }
}
