//! Grammars between messages and the text crate.

use tercet_proto::{GrammarSpec, v1};
use tercet_text::Grammar;

/// Returns the grammar that a request asks for.
pub(crate) fn grammar(spec: GrammarSpec) -> Grammar {
    match spec {
        GrammarSpec::JsonSchema(schema) => Grammar::JsonSchema(schema),
        GrammarSpec::JsonObject => Grammar::JsonObject,
        GrammarSpec::Regex(regex) => Grammar::Regex(regex),
        GrammarSpec::Choice(texts) => Grammar::Choice(texts),
    }
}

/// Returns a grammar as a message.
pub(crate) fn message(grammar: &Grammar) -> v1::Grammar {
    match grammar.clone() {
        Grammar::JsonSchema(schema) => GrammarSpec::JsonSchema(schema),
        Grammar::JsonObject => GrammarSpec::JsonObject,
        Grammar::Regex(regex) => GrammarSpec::Regex(regex),
        Grammar::Choice(texts) => GrammarSpec::Choice(texts),
    }
    .into()
}
