//! Tokenizer files of a Hugging Face folder.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;
use tercet_text::{SpecialTokens, TokenizerSource};

use super::{TextParts, sorted};
use crate::model_file::error::ModelError;
use crate::model_file::folder::json::{Json, read_text};

/// Most bytes of a `tokenizer.json`; the largest known one has 34 MB.
const MAX_TOKENIZER: u64 = 1 << 28;
/// Most bytes of a chat template.
const MAX_TEMPLATE: u64 = 1 << 20;

impl TextParts {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a folder.
    ///
    /// End ids are those of `generation_config.json`, else of `config.json`, else of the
    /// tokenizer: the order transformers looks in.
    pub(crate) fn from_folder(
        folder: &Path,
        config: &Json,
        generation: Option<&Json>,
    ) -> Result<Self, ModelError> {
        let path = folder.join("tokenizer.json");
        let text = read_text(&path, MAX_TOKENIZER)?;
        let file = path.display().to_string();
        let json: Value = serde_json::from_str(&text)
            .map_err(|error| ModelError::damaged(&file, format!("not valid JSON: {error}")))?;
        let settings = Json::read_optional(&folder.join("tokenizer_config.json"))?;

        let named = |field: &str| -> Result<Option<u32>, ModelError> {
            let Some(settings) = &settings else { return Ok(None) };
            let token = match settings.value(field) {
                None => return Ok(None),
                Some(Value::String(token)) => token,
                Some(value) => match value["content"].as_str() {
                    Some(token) => token,
                    None => return Err(settings.wrong(field, value, "a token")),
                },
            };
            token_id(&json, token).map(Some).ok_or_else(|| {
                settings.wrong(field, &Value::from(token), "a token of tokenizer.json")
            })
        };
        let bos = match named("bos_token")? {
            Some(bos) => Some(bos),
            None => config.ids("bos_token_id")?.first().copied(),
        };
        let mut eos = generation.map_or(Ok(Vec::new()), |file| file.ids("eos_token_id"))?;
        if eos.is_empty() {
            eos = config.ids("eos_token_id")?;
        }
        if eos.is_empty() {
            eos.extend(named("eos_token")?);
        }
        let add_bos = bos.is_some_and(|bos| adds_first(&json["post_processor"], bos));
        Ok(Self {
            chat_template: chat_template(folder, settings.as_ref())?,
            tokenizer: TokenizerSource::Json(text),
            special: SpecialTokens { bos, eos: sorted(eos), add_bos },
        })
    }
}

/// Returns the id of a token spelled `token`.
fn token_id(json: &Value, token: &str) -> Option<u32> {
    let added = json["added_tokens"].as_array().into_iter().flatten();
    let mut added = added.filter(|entry| entry["content"] == token).map(|entry| &entry["id"]);
    let id = added.next().or_else(|| json["model"]["vocab"].get(token))?;
    u32::try_from(id.as_u64()?).ok()
}

/// Whether a post-processor puts `bos` before a single text.
fn adds_first(post_processor: &Value, bos: u32) -> bool {
    match post_processor["type"].as_str() {
        Some("Sequence") => post_processor["processors"]
            .as_array()
            .is_some_and(|steps| steps.iter().any(|step| adds_first(step, bos))),
        Some("TemplateProcessing") => {
            let first = &post_processor["single"][0]["SpecialToken"]["id"];
            first.as_str().is_some_and(|name| {
                post_processor["special_tokens"][name]["ids"][0].as_u64() == Some(bos.into())
            })
        }
        _ => false,
    }
}

/// Returns the chat template: its own file first, as in transformers, then the configuration,
/// where it is one text or a list of named ones.
fn chat_template(folder: &Path, settings: Option<&Json>) -> Result<Option<String>, ModelError> {
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        return read_text(&path, MAX_TEMPLATE).map(Some);
    }
    let Some(settings) = settings else { return Ok(None) };
    match settings.value("chat_template") {
        None => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(value @ Value::Array(entries)) => {
            let named: HashMap<&str, &str> = entries
                .iter()
                .filter_map(|entry| Some((entry["name"].as_str()?, entry["template"].as_str()?)))
                .collect();
            let expected = "a template, or a list with one named `default`";
            let default = named.get("default");
            default
                .map(|template| Some((*template).to_owned()))
                .ok_or_else(|| settings.wrong("chat_template", value, expected))
        }
        Some(value) => Err(settings.wrong("chat_template", value, "a template")),
    }
}
