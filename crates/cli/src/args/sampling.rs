//! How tokens are chosen, when a text ends and what it looks like: flags, and the requests they make.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use tercet_proto::v1::{
    Choice, GenerateRequest, Grammar, JsonObject, Sampling, Stop, generate_request::Input,
    grammar::Form,
};

use super::values::{bias, factor, fraction, penalty, share, temperature};
use crate::failure::misconfigured;

/// How tokens are chosen and when a text ends.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct SamplingArgs {
    /// Most tokens to generate [default: what is left of the context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    /// Makes the draws repeatable: the same seed gives the same text [default: drawn]
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Flattens (above 1) or sharpens (below 1) the choice; 0 takes the likeliest token
    /// [default: the model's]
    #[arg(long, env = "TERCET_TEMPERATURE", value_name = "T", value_parser = temperature)]
    pub(crate) temperature: Option<f32>,
    /// Chooses among the N likeliest tokens; 0 among all [default: the model's]
    #[arg(long, env = "TERCET_TOP_K", value_name = "N")]
    pub(crate) top_k: Option<u32>,
    /// Chooses among the likeliest tokens that together have this probability [default: the
    /// model's]
    #[arg(long, env = "TERCET_TOP_P", value_name = "P", value_parser = fraction)]
    pub(crate) top_p: Option<f32>,
    /// Ends the text before this string; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Goes on past the tokens that end a text
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Ends the text with this token, which it includes; may be given several times, or once with
    /// commas between
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    pub(crate) stop_token: Vec<u32>,
    /// Chooses among the tokens at least this many times as likely as the likeliest; 0 among all
    /// [default: the model's]
    #[arg(long, env = "TERCET_MIN_P", value_name = "P", value_parser = share)]
    pub(crate) min_p: Option<f32>,
    /// Makes tokens that the prompt or the text has less likely, above 1, or likelier, below 1
    /// [default: the model's]
    #[arg(long, env = "TERCET_REPETITION_PENALTY", value_name = "X", value_parser = factor)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Taken from a token's logit for each time the text has it [default: 0]
    #[arg(long, env = "TERCET_FREQUENCY_PENALTY", value_name = "X", value_parser = penalty)]
    #[arg(allow_hyphen_values = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Taken from the logit of a token that the text has [default: 0]
    #[arg(long, env = "TERCET_PRESENCE_PENALTY", value_name = "X", value_parser = penalty)]
    #[arg(allow_hyphen_values = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Adds to a token's logit, such as 42=-100 to forbid token 42; may be given several times, or
    /// once with commas between
    #[arg(long, value_name = "ID=X", value_parser = bias, value_delimiter = ',')]
    pub(crate) logit_bias: Vec<(u32, f32)>,
    /// Keeps computed prompts apart from those of requests with other salts
    #[arg(long, env = "TERCET_CACHE_SALT", value_name = "TEXT")]
    pub(crate) cache_salt: Option<String>,
    /// Keeps the text to a JSON Schema: a file, or the schema itself if it begins with {
    #[arg(long, value_name = "FILE_OR_SCHEMA")]
    pub(crate) json_schema: Option<String>,
    /// Keeps the text to any JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Keeps the text to a regular expression, which matches all of it
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    pub(crate) regex: Option<String>,
    /// Makes the text one of several; given once for each
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) choice: Vec<String>,
}

impl SamplingArgs {
    /// Returns the request for a text that continues `input`, of whatever model.
    ///
    /// # Errors
    /// If flags exclude each other, or a schema cannot be read.
    pub(crate) fn request(&self, input: Input) -> Result<GenerateRequest> {
        Ok(GenerateRequest {
            input: Some(input),
            sampling: Some(Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                seed: self.seed,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                frequency_penalty: self.frequency_penalty,
                presence_penalty: self.presence_penalty,
                logit_bias: self.logit_bias()?,
            }),
            stop: Some(Stop {
                max_tokens: self.max_tokens,
                strings: self.stop.clone(),
                ignore_eos: self.ignore_eos.then_some(true),
                token_ids: self.stop_token.clone(),
            }),
            cache_salt: self.cache_salt.clone().unwrap_or_default(),
            grammar: self.form()?.map(|form| Grammar { form: Some(form) }),
            ..GenerateRequest::default()
        })
    }

    fn logit_bias(&self) -> Result<BTreeMap<u32, f32>> {
        let mut all = BTreeMap::new();
        for &(id, bias) in &self.logit_bias {
            if let Some(other) = all.insert(id, bias) {
                return Err(misconfigured(anyhow!(
                    "--logit-bias gives token {id} both {other} and {bias}: expected one of them"
                )));
            }
        }
        Ok(all)
    }

    /// Returns what the text has to look like, if that was said.
    fn form(&self) -> Result<Option<Form>> {
        let given: Vec<&str> = [
            ("--json-schema", self.json_schema.is_some()),
            ("--json", self.json),
            ("--regex", self.regex.is_some()),
            ("--choice", !self.choice.is_empty()),
        ]
        .into_iter()
        .filter_map(|(flag, is_given)| is_given.then_some(flag))
        .collect();
        match given[..] {
            [] => return Ok(None),
            [flag] if self.ignore_eos => {
                return Err(misconfigured(anyhow!(
                    "--ignore-eos goes on past the end that {flag} has: expected one of them"
                )));
            }
            [_] => {}
            [first, second, ..] => {
                return Err(misconfigured(anyhow!(
                    "{first} and {second} are both given: expected one of --json-schema, --json, \
                     --regex and --choice"
                )));
            }
        }
        Ok(if let Some(schema) = &self.json_schema {
            Some(Form::JsonSchema(read_schema(schema)?))
        } else if self.json {
            Some(Form::JsonObject(JsonObject {}))
        } else if let Some(regex) = &self.regex {
            Some(Form::Regex(regex.clone()))
        } else {
            Some(Form::Choice(Choice { texts: self.choice.clone() }))
        })
    }
}

/// Returns a schema that is given as such, or as a file.
fn read_schema(given: &str) -> Result<String> {
    if given.trim_start().starts_with('{') {
        return Ok(given.to_owned());
    }
    let read = std::fs::read_to_string(Path::new(given));
    read.with_context(|| format!("read the JSON Schema {given}")).map_err(misconfigured)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(args: &SamplingArgs) -> Result<Option<Form>, String> {
        args.form().map_err(|error| error.to_string())
    }

    #[test]
    fn forms_exclude_each_other() {
        let json = SamplingArgs { json: true, ..SamplingArgs::default() };
        assert_eq!(form(&json), Ok(Some(Form::JsonObject(JsonObject {}))));
        let choice = vec!["a".to_owned(), "b".to_owned()];
        let both = SamplingArgs { choice: choice.clone(), ..json.clone() };
        let said = form(&both).unwrap_err();
        assert!(said.starts_with("--json and --choice are both given"), "{said}");
        let endless = SamplingArgs { ignore_eos: true, ..json };
        let said = form(&endless).unwrap_err();
        assert!(said.starts_with("--ignore-eos goes on past the end that --json has"), "{said}");
        let choices = SamplingArgs { choice: choice.clone(), ..SamplingArgs::default() };
        assert_eq!(form(&choices), Ok(Some(Form::Choice(Choice { texts: choice }))));
        assert_eq!(form(&SamplingArgs::default()), Ok(None));
    }

    #[test]
    fn schemas_are_files_or_themselves() {
        let schema = |given: &str| {
            form(&SamplingArgs { json_schema: Some(given.to_owned()), ..SamplingArgs::default() })
        };
        let text = " {\"type\": \"object\"}";
        assert_eq!(schema(text), Ok(Some(Form::JsonSchema(text.to_owned()))));
        let path = std::env::temp_dir().join(format!("tercet-schema-{}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        let read = schema(path.to_str().unwrap());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read, Ok(Some(Form::JsonSchema(text.to_owned()))));
        let said = schema("/no/such").unwrap_err();
        assert!(said.starts_with("read the JSON Schema /no/such"), "{said}");
    }

    #[test]
    fn one_token_has_one_bias() {
        let input = || Input::Prompt("x".to_owned());
        let args = |logit_bias| SamplingArgs { logit_bias, ..SamplingArgs::default() };
        let request = args(vec![(1, 0.5), (2, -1.0)]).request(input()).unwrap();
        let bias = request.sampling.unwrap().logit_bias;
        assert_eq!((bias.len(), bias[&1], bias[&2]), (2, 0.5, -1.0));
        let said = args(vec![(1, 0.5), (1, -1.0)]).request(input()).unwrap_err().to_string();
        assert!(said.starts_with("--logit-bias gives token 1 both 0.5 and -1"), "{said}");
    }
}
