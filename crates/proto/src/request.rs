//! Validated requests: what is left to check here is only what depends on the model.
//!
//! Servers turn wire messages into these at the edge and pass only these on; a gateway turns them
//! back, without copying, to ask a worker.

use std::collections::BTreeMap;

use crate::grammar::{self, GrammarSpec};
use crate::v1;
use crate::violation::{InvalidRequest, Violations};

#[cfg(test)]
mod tests;

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
}

/// What a completion continues.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Input {
    /// Text for the model's tokenizer; may be empty.
    Prompt(String),
    /// Token ids, used as given; at least one.
    Tokens(Vec<u32>),
    /// Messages for the model's chat template; at least one, each with a role.
    Chat(Vec<v1::ChatMessage>),
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
        } = request;
        let sampling = sampling.unwrap_or_default();
        let stop = stop.unwrap_or_default();

        let mut violations = Violations::default();
        check_input(input.as_ref(), &mut violations);
        check_sampling(&sampling, &mut violations);
        check_stop(&stop, &mut violations);
        if let Some(resume) = &resume {
            check_resume(resume, &sampling, &stop, &mut violations);
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
            model: name(model),
            input: match input.expect("checked above") {
                v1::generate_request::Input::Prompt(text) => Input::Prompt(text),
                v1::generate_request::Input::Tokens(tokens) => Input::Tokens(tokens.ids),
                v1::generate_request::Input::Chat(chat) => Input::Chat(chat.messages),
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
        } = spec;
        Self {
            model: model.unwrap_or_default(),
            input: Some(match input {
                Input::Prompt(text) => v1::generate_request::Input::Prompt(text),
                Input::Tokens(ids) => v1::generate_request::Input::Tokens(v1::TokenIds { ids }),
                Input::Chat(messages) => v1::generate_request::Input::Chat(v1::Chat { messages }),
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
        }
    }
}

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

/// A text to tokenize.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TokenizeSpec {
    /// Name of the model; `None` asks for the only one served.
    pub model: Option<String>,
    /// The text; may be empty.
    pub text: String,
}

impl From<v1::TokenizeRequest> for TokenizeSpec {
    fn from(request: v1::TokenizeRequest) -> Self {
        Self { model: name(request.model), text: request.text }
    }
}

impl From<TokenizeSpec> for v1::TokenizeRequest {
    fn from(spec: TokenizeSpec) -> Self {
        Self { model: spec.model.unwrap_or_default(), text: spec.text }
    }
}

fn name(model: String) -> Option<String> {
    (!model.is_empty()).then_some(model)
}

fn check_input(input: Option<&v1::generate_request::Input>, violations: &mut Violations) {
    match input {
        None => violations.require(false, "input", || {
            "one of prompt, tokens and chat must be set, got none".to_owned()
        }),
        Some(v1::generate_request::Input::Prompt(_)) => {}
        Some(v1::generate_request::Input::Tokens(tokens)) => {
            violations.require(!tokens.ids.is_empty(), "tokens.ids", || {
                "must hold at least 1 id, got 0".to_owned()
            });
        }
        Some(v1::generate_request::Input::Chat(chat)) => {
            violations.require(!chat.messages.is_empty(), "chat.messages", || {
                "must hold at least 1 message, got 0".to_owned()
            });
            for (nth, message) in chat.messages.iter().enumerate() {
                let field = format!("chat.messages[{nth}].role");
                violations.require(!message.role.is_empty(), &field, || {
                    "must not be empty: say who speaks, such as user".to_owned()
                });
            }
        }
    }
}

fn check_sampling(sampling: &v1::Sampling, violations: &mut Violations) {
    if let Some(temperature) = sampling.temperature {
        // NaN fails both comparisons.
        let holds = temperature.is_finite() && temperature >= 0.0;
        violations.require(holds, "sampling.temperature", || {
            format!("must be finite and at least 0, got {temperature}")
        });
    }
    if let Some(top_p) = sampling.top_p {
        violations.require(top_p > 0.0 && top_p <= 1.0, "sampling.top_p", || {
            format!("must be above 0 and at most 1, got {top_p}")
        });
    }
    if let Some(min_p) = sampling.min_p {
        violations.require((0.0..=1.0).contains(&min_p), "sampling.min_p", || {
            format!("must be 0 to 1, got {min_p}")
        });
    }
    if let Some(penalty) = sampling.repetition_penalty {
        let holds = penalty.is_finite() && penalty > 0.0;
        violations.require(holds, "sampling.repetition_penalty", || {
            format!("must be finite and above 0, got {penalty}")
        });
    }
    for (field, penalty) in [
        ("sampling.frequency_penalty", sampling.frequency_penalty),
        ("sampling.presence_penalty", sampling.presence_penalty),
    ] {
        let penalty = penalty.unwrap_or_default();
        violations.require((-MAX_PENALTY..=MAX_PENALTY).contains(&penalty), field, || {
            format!("must be -{MAX_PENALTY} to {MAX_PENALTY}, got {penalty}")
        });
    }
    let biases = sampling.logit_bias.len();
    violations.require(biases <= MAX_LOGIT_BIASES, "sampling.logit_bias", || {
        format!("must hold at most {MAX_LOGIT_BIASES} ids, got {biases}")
    });
    for (id, bias) in sampling.logit_bias.iter().take(MAX_LOGIT_BIASES) {
        let holds = (-MAX_LOGIT_BIAS..=MAX_LOGIT_BIAS).contains(bias);
        violations.require(holds, &format!("sampling.logit_bias[{id}]"), || {
            format!("must be -{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}, got {bias}")
        });
    }
}

fn check_stop(stop: &v1::Stop, violations: &mut Violations) {
    violations.require(stop.max_tokens != Some(0), "stop.max_tokens", || {
        "must be at least 1, got 0; leave it out for no bound".to_owned()
    });
    violations.require(stop.strings.len() <= MAX_STOP_STRINGS, "stop.strings", || {
        format!("must hold at most {MAX_STOP_STRINGS} strings, got {}", stop.strings.len())
    });
    violations.require(stop.token_ids.len() <= MAX_STOP_TOKENS, "stop.token_ids", || {
        format!("must hold at most {MAX_STOP_TOKENS} ids, got {}", stop.token_ids.len())
    });
    for (nth, string) in stop.strings.iter().take(MAX_STOP_STRINGS).enumerate() {
        let field = format!("stop.strings[{nth}]");
        violations.require(!string.is_empty(), &field, || "must not be empty".to_owned());
        violations.require(string.len() <= MAX_STOP_STRING_BYTES, &field, || {
            format!("must be at most {MAX_STOP_STRING_BYTES} bytes long, got {}", string.len())
        });
    }
}

fn check_resume(
    resume: &v1::Resume,
    sampling: &v1::Sampling,
    stop: &v1::Stop,
    violations: &mut Violations,
) {
    if let Some(seed) = sampling.seed {
        violations.require(seed == resume.seed, "resume.seed", || {
            format!("must equal sampling.seed {seed}, got {}", resume.seed)
        });
    }
    if let Some(max_tokens) = stop.max_tokens {
        // A resume of exactly max_tokens ids is fine: all that was lost is `finished`.
        let holds = u64::try_from(resume.token_ids.len()).is_ok_and(|n| n <= max_tokens.into());
        violations.require(holds, "resume.token_ids", || {
            format!(
                "must hold at most stop.max_tokens {max_tokens} ids, got {}",
                resume.token_ids.len()
            )
        });
    }
}
