//! All the ways to ask.

use tercet_proto::v1::{
    Chat, ChatMessage, Choice, GenerateRequest, Grammar, JsonObject, Logprobs, Sampling, Stop,
    TokenIds, generate_request::Input, grammar::Form,
};

use crate::Dice;

/// A way to ask: its name, and what it makes of a request.
pub type Feature = (&'static str, fn(&mut GenerateRequest));

/// Every parameter of a request that decides the answer, alone and together with others. A new one
/// is one more line.
pub const FEATURES: &[Feature] = &[
    ("the model's defaults", |_| ()),
    ("greedy", |r| sampling(r).temperature = Some(0.0)),
    ("temperature", |r| sampling(r).temperature = Some(1.4)),
    ("top_k", |r| sampling(r).top_k = Some(7)),
    ("top_p", |r| sampling(r).top_p = Some(0.6)),
    ("min_p", |r| sampling(r).min_p = Some(0.08)),
    ("repetition penalty", |r| sampling(r).repetition_penalty = Some(1.3)),
    ("frequency penalty", |r| sampling(r).frequency_penalty = Some(0.7)),
    ("presence penalty", |r| sampling(r).presence_penalty = Some(-0.4)),
    ("logit bias", |r| sampling(r).logit_bias = [(11, -100.0), (23, 4.5), (300, 2.0)].into()),
    ("everything at once", |r| {
        let sampling = sampling(r);
        (sampling.temperature, sampling.top_k, sampling.top_p) = (Some(1.1), Some(40), Some(0.9));
        (sampling.min_p, sampling.repetition_penalty) = (Some(0.01), Some(1.1));
        (sampling.frequency_penalty, sampling.presence_penalty) = (Some(0.2), Some(0.3));
        sampling.logit_bias = [(7, 1.0), (450, -2.0)].into();
    }),
    ("log-probabilities", |r| r.logprobs = Some(Logprobs { top: 5 })),
    ("stop ids", |r| stop(r).token_ids = (100..120).collect()),
    ("end of text", |r| stop(r).ignore_eos = Some(false)),
    ("stop strings", |r| stop(r).strings = ["\n\n", "the ", "?"].map(str::to_owned).into()),
    ("text withheld to the end", |r| {
        stop(r).strings = ["\nTHE END OF ALL PLAYS", "thou art not"].map(str::to_owned).into();
    }),
    ("echo", |r| r.echo = Some(true)),
    ("echo and log-probabilities", |r| {
        (r.echo, r.logprobs) = (Some(true), Some(Logprobs { top: 0 }));
        sampling(r).presence_penalty = Some(1.2);
    }),
    ("cache salt", |r| r.cache_salt = "one of the tenants".to_owned()),
    ("endless regex", |r| keep_to(r, Form::Regex("[A-Z]([a-z]{1,9} ){2000}\\.".to_owned()))),
    ("short regex, likelihoods", |r| {
        keep_to(r, Form::Regex("(king|queen|fool) [0-9]{1,4}!".to_owned()));
        r.logprobs = Some(Logprobs { top: 3 });
    }),
    ("JSON schema, penalties", |r| {
        keep_to(r, Form::JsonSchema(SCHEMA.to_owned()));
        let sampling = sampling(r);
        (sampling.repetition_penalty, sampling.frequency_penalty) = (Some(1.2), Some(0.4));
    }),
    ("JSON object", |r| keep_to(r, Form::JsonObject(JsonObject {}))),
    ("choice", |r| {
        let texts = ["to be", "not to be", "to be or not to be"].map(str::to_owned).into();
        keep_to(r, Form::Choice(Choice { texts }));
    }),
];

const SCHEMA: &str = r#"{
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "plays": {"type": "array", "items": {"enum": ["tragedy", "comedy"]}, "maxItems": 4}
    },
    "required": ["name", "age", "plays"],
    "additionalProperties": false
}"#;

fn keep_to(request: &mut GenerateRequest, form: Form) {
    request.grammar = Some(Grammar { form: Some(form) });
    // A grammar decides where the answer ends.
    stop(request).ignore_eos = None;
}

fn sampling(request: &mut GenerateRequest) -> &mut Sampling {
    request.sampling.get_or_insert_default()
}

fn stop(request: &mut GenerateRequest) -> &mut Stop {
    request.stop.get_or_insert_default()
}

/// What prompts for a model are made of.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Name of the model in requests.
    pub model: &'a str,
    /// Ids from 0 to this are ordinary tokens.
    pub vocab: u32,
    /// Most tokens of prompt and completion together.
    pub context: u32,
    /// Text in the manner of the model.
    pub text: &'a str,
    /// Whether it has a chat template.
    pub chat: bool,
}

impl Source<'_> {
    /// Draws a request: a prompt of any kind, and any of [`FEATURES`].
    pub fn draw(&self, dice: &mut Dice) -> GenerateRequest {
        let max_tokens = dice.between(1, self.context / 6);
        let mut request = GenerateRequest {
            model: self.model.to_owned(),
            input: Some(self.prompt(dice)),
            ..GenerateRequest::default()
        };
        sampling(&mut request).seed = Some(dice.roll());
        *stop(&mut request) =
            Stop { max_tokens: Some(max_tokens), ignore_eos: Some(true), ..Stop::default() };
        let (_, apply) = dice.pick(FEATURES);
        apply(&mut request);
        request
    }

    /// Draws a prompt, that leaves room for a sixth of the context. A character is a token at most.
    fn prompt(&self, dice: &mut Dice) -> Input {
        let most = self.context * 4 / 5;
        match dice.between(0, if self.chat { 6 } else { 5 }) {
            0 => Input::Prompt(self.cut(dice, 60)),
            1 => Input::Prompt(self.cut(dice, most)),
            // One of three long prefixes, so that their pages come again, with a tail of its own.
            2 => {
                let prefix = Self::cut_at(self.text, dice.between(0, 3) * 997, most * 3 / 4);
                Input::Prompt(format!("{prefix}{}", self.cut(dice, most / 4)))
            }
            3 => {
                let mut shared = Dice::new(u64::from(dice.between(0, 3)));
                let mut ids = self.ids(&mut shared, most * 3 / 4);
                let tail = dice.between(0, most / 4);
                ids.extend(self.ids(dice, tail));
                Input::Tokens(TokenIds { ids })
            }
            4 => {
                let count = dice.between(1, 50);
                Input::Tokens(TokenIds { ids: self.ids(dice, count) })
            }
            _ => {
                let turns = ["user", "assistant", "user"].map(|role| ChatMessage {
                    role: role.to_owned(),
                    content: self.cut(dice, 100),
                });
                Input::Chat(Chat { messages: turns.into(), ..Chat::default() })
            }
        }
    }

    fn ids(&self, dice: &mut Dice, count: u32) -> Vec<u32> {
        (0..count).map(|_| dice.between(0, self.vocab)).collect()
    }

    /// Draws a piece of the text, of `most` bytes at most.
    fn cut(&self, dice: &mut Dice, most: u32) -> String {
        let last = u32::try_from(self.text.len()).expect("a short text").saturating_sub(most);
        let (from, length) = (dice.between(0, last), dice.between(1, most));
        Self::cut_at(self.text, from, length).to_owned()
    }

    fn cut_at(text: &str, from: u32, length: u32) -> &str {
        let index = |at: u32| text.floor_char_boundary(usize::try_from(at).expect("an index"));
        &text[index(from)..index(from + length)]
    }
}
