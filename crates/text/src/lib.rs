//! Tokenizers, chat templates and streaming text filters. Pure: no files, sockets or threads.
//!
//! ```text
//! chat messages --ChatTemplate--> text --Tokenizer--> ids      (a request, before the model)
//! ids --StreamDecoder--> text that may be shown                (an answer, token by token)
//! Grammar --Grammars--> Constraint: which ids may come next    (a structured answer)
//! ```
//!
//! Worker and gateway both hold these, and both must come to the same answer: everything here is a
//! pure function of the model's tokenizer, its template and the request.

mod excerpt;
mod grammar;
pub mod prefix;
mod stream;
mod template;
mod tokenizer;

pub use self::{
    excerpt::Excerpt,
    grammar::{Constraint, Grammar, GrammarError, Grammars, TokenMask},
    prefix::PageName,
    stream::{Piece, StreamDecoder},
    template::{ChatMessage, ChatTemplate, TemplateError, TemplateVariables},
    tokenizer::{SpecialTokens, TokenType, Tokenizer, TokenizerError, TokenizerSource, Vocabulary},
};
