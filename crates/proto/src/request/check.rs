//! What every request has to keep to, whatever the model.

use super::{
    MAX_LOGIT_BIAS, MAX_LOGIT_BIASES, MAX_PENALTY, MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS,
    MAX_STOP_TOKENS, MAX_TEMPLATE_VARIABLES, MAX_TEMPLATE_VARIABLES_BYTES,
};
use crate::v1;
use crate::violation::Violations;

pub(super) fn input(input: Option<&v1::generate_request::Input>, violations: &mut Violations) {
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
        Some(v1::generate_request::Input::Chat(chat)) => self::chat(chat, violations),
    }
}

pub(super) fn chat(chat: &v1::Chat, violations: &mut Violations) {
    violations.require(!chat.messages.is_empty(), "chat.messages", || {
        "must hold at least 1 message, got 0".to_owned()
    });
    for (nth, message) in chat.messages.iter().enumerate() {
        let field = format!("chat.messages[{nth}].role");
        violations.require(!message.role.is_empty(), &field, || {
            "must not be empty: say who speaks, such as user".to_owned()
        });
    }
    let variables = &chat.template_variables;
    let field = "chat.template_variables";
    violations.require(variables.len() <= MAX_TEMPLATE_VARIABLES, field, || {
        format!("must hold at most {MAX_TEMPLATE_VARIABLES} variables, got {}", variables.len())
    });
    let bytes: usize = variables.iter().map(|(name, value)| name.len() + value.len()).sum();
    violations.require(bytes <= MAX_TEMPLATE_VARIABLES_BYTES, field, || {
        format!("must be at most {MAX_TEMPLATE_VARIABLES_BYTES} bytes long, got {bytes}")
    });
}

pub(super) fn sampling(sampling: &v1::Sampling, violations: &mut Violations) {
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

pub(super) fn stop(stop: &v1::Stop, violations: &mut Violations) {
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

pub(super) fn resume(
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
