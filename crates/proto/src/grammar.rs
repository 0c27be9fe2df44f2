//! What a completion has to look like.

use crate::v1::{self, grammar::Form};
use crate::violation::Violations;

/// Most bytes of a grammar.
pub const MAX_GRAMMAR_BYTES: usize = 64 << 10;

/// What a completion has to look like. At most [`MAX_GRAMMAR_BYTES`] in all; whether it can be
/// followed depends on the model.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum GrammarSpec {
    /// A value of this JSON Schema.
    JsonSchema(String),
    /// Any JSON object.
    JsonObject,
    /// A match of this regular expression, as a whole.
    Regex(String),
    /// One of these, of which there is at least one and none empty.
    Choice(Vec<String>),
}

/// Reports what is wrong with a grammar of a request with these stops.
pub(crate) fn check(grammar: &v1::Grammar, stop: &v1::Stop, violations: &mut Violations) {
    let ignores = stop.ignore_eos.unwrap_or_default();
    violations.require(!ignores, "stop.ignore_eos", || {
        "must not be set together with grammar: a complete answer has to end".to_owned()
    });
    let (field, bytes) = match &grammar.form {
        None => {
            violations.require(false, "grammar", || {
                "one of json_schema, json_object, regex and choice must be set, got none".to_owned()
            });
            return;
        }
        Some(Form::JsonObject(v1::JsonObject {})) => return,
        Some(Form::JsonSchema(schema)) => ("grammar.json_schema", schema.len()),
        Some(Form::Regex(regex)) => ("grammar.regex", regex.len()),
        Some(Form::Choice(v1::Choice { texts })) => {
            violations.require(!texts.is_empty(), "grammar.choice.texts", || {
                "must hold at least 1 text, got 0".to_owned()
            });
            if let Some(nth) = texts.iter().position(String::is_empty) {
                let field = format!("grammar.choice.texts[{nth}]");
                violations.require(false, &field, || "must not be empty".to_owned());
            }
            ("grammar.choice.texts", texts.iter().map(String::len).sum())
        }
    };
    violations.require(bytes <= MAX_GRAMMAR_BYTES, field, || {
        format!("must be at most {MAX_GRAMMAR_BYTES} bytes long, got {bytes}")
    });
}

impl GrammarSpec {
    /// Returns what a message says, unless it says nothing.
    pub fn read(grammar: v1::Grammar) -> Option<Self> {
        Some(match grammar.form? {
            Form::JsonSchema(schema) => Self::JsonSchema(schema),
            Form::JsonObject(v1::JsonObject {}) => Self::JsonObject,
            Form::Regex(regex) => Self::Regex(regex),
            Form::Choice(v1::Choice { texts }) => Self::Choice(texts),
        })
    }

    /// Returns the field that holds it in a request.
    pub fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "grammar.json_schema",
            Self::JsonObject => "grammar.json_object",
            Self::Regex(_) => "grammar.regex",
            Self::Choice(_) => "grammar.choice",
        }
    }
}

impl From<GrammarSpec> for v1::Grammar {
    fn from(spec: GrammarSpec) -> Self {
        Self {
            form: Some(match spec {
                GrammarSpec::JsonSchema(schema) => Form::JsonSchema(schema),
                GrammarSpec::JsonObject => Form::JsonObject(v1::JsonObject {}),
                GrammarSpec::Regex(regex) => Form::Regex(regex),
                GrammarSpec::Choice(texts) => Form::Choice(v1::Choice { texts }),
            }),
        }
    }
}
