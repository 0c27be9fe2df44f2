//! What is known of a worker, and its form in the store: versioned JSON.

mod rate;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::rate::{InvalidRate, Rate};

/// Version of the stored form. Readers skip records of other versions; fields may be added to a
/// version as long as old readers can do without them.
const VERSION: u32 = 1;

/// Longest name, in bytes.
const NAME_LIMIT: usize = 128;

/// Why a name cannot be used in a key.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error(
    "`{0}` is not a usable name: expected 1 to {NAME_LIMIT} ASCII letters, digits, `-`, `_` or `.`"
)]
pub struct InvalidName(String);

/// Returns `name` if it can stand in a key unescaped.
fn checked(name: String) -> Result<String, InvalidName> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=NAME_LIMIT).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(name)
    } else {
        Err(InvalidName(name))
    }
}

/// Name of a worker, unique in its cluster.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(into = "String", try_from = "String")]
pub struct WorkerId(String);

impl WorkerId {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for WorkerId {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        checked(name.to_owned()).map(Self)
    }
}

impl TryFrom<String> for WorkerId {
    type Error = InvalidName;

    fn try_from(name: String) -> Result<Self, InvalidName> {
        checked(name).map(Self)
    }
}

impl From<WorkerId> for String {
    fn from(id: WorkerId) -> Self {
        id.0
    }
}

/// Name of a cluster: workers and gateways of one name see each other.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ClusterName(String);

impl ClusterName {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ClusterName {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        checked(name.to_owned()).map(Self)
    }
}

/// How far a worker is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// Reads its model, or waits for the other stages of its pipeline.
    Loading,
    /// Takes requests, or steps if it is a later stage.
    Ready,
    /// Finishes what it has and takes nothing new.
    Draining,
}

/// How far a model of a worker is.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    /// Being read, or waiting for the other stages of its pipeline.
    Loading,
    /// Takes requests, or steps if it is a later stage. What a record that does not say means.
    #[default]
    Ready,
    /// Finishes what it has and takes nothing new.
    Draining,
    /// Cannot be computed any more.
    Failed,
}

/// A half-open range of layers.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct LayerRange {
    /// First layer.
    pub start: u32,
    /// One past the last layer.
    pub end: u32,
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// A model, or some layers of one, that a worker holds.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ModelRecord {
    /// Its name in requests.
    pub name: String,
    /// Digest of the whole model in hex; empty while only some layers are known.
    pub identity: String,
    /// Digest of configuration, tokenizer, template and numerics, in hex.
    pub header_digest: String,
    /// Layers held.
    pub layers: LayerRange,
    /// Layers of the whole model.
    pub layer_count: u32,
    /// Most tokens of prompt and completion together.
    pub context_length: u32,
    /// Number of token ids.
    pub vocab_size: u32,
    /// How far it is.
    #[serde(default)]
    pub state: ModelState,
    /// Greater for each later model of the worker, also of the same name.
    #[serde(default)]
    pub generation: u64,
    /// Tokens of all sequences together that its KV memory holds; 0 until it is loaded.
    #[serde(default)]
    pub kv_tokens: u64,
    /// Completion tokens it made, of all sequences together, while it made any.
    #[serde(default, skip_serializing_if = "Rate::is_unknown")]
    pub decode_rate: Rate,
    /// Prompt tokens it took in while it took in any.
    #[serde(default, skip_serializing_if = "Rate::is_unknown")]
    pub prefill_rate: Rate,
}

/// What a worker tells of itself.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct WorkerRecord {
    /// Its name.
    pub id: WorkerId,
    /// Where it serves gRPC: `host:port`.
    pub address: String,
    /// Greater for each later incarnation of the worker.
    pub epoch: u64,
    /// How far it is.
    pub state: WorkerState,
    /// What it holds.
    pub models: Vec<ModelRecord>,
    /// Most sequences it computes at once.
    pub max_sequences: u32,
}

impl WorkerRecord {
    /// Returns the model of that name if requests for it can be sent to this worker now.
    ///
    /// That is a ready worker that answers for a whole model: alone, or as the head of a complete
    /// pipeline. Later stages of a pipeline know no identity.
    pub fn serves(&self, model: &str) -> Option<&ModelRecord> {
        self.served_models().find(|held| held.name == model)
    }

    /// Returns whether `other` says the same, except for rates that hardly differ: that is not worth
    /// a write.
    pub fn is_near(&self, other: &Self) -> bool {
        let mut other = other.clone();
        for (ours, theirs) in self.models.iter().zip(&mut other.models) {
            if ours.decode_rate.is_near(theirs.decode_rate) {
                theirs.decode_rate = ours.decode_rate;
            }
            if ours.prefill_rate.is_near(theirs.prefill_rate) {
                theirs.prefill_rate = ours.prefill_rate;
            }
        }
        *self == other
    }

    /// Returns the models for which requests can be sent to this worker now.
    pub fn served_models(&self) -> impl Iterator<Item = &ModelRecord> {
        let ready = self.state == WorkerState::Ready;
        self.models
            .iter()
            .filter(move |held| ready && held.state == ModelState::Ready)
            .filter(|held| held.layers.start == 0 && !held.identity.is_empty())
    }
}

/// Why a stored record cannot be used.
#[derive(Debug, Error)]
pub enum RecordError {
    /// Not JSON, or a field is missing or malformed.
    #[error("malformed record: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Written by another release.
    #[error("record of version {0}: this release reads version {VERSION}")]
    Version(u32),
    /// Stored under the key of another worker.
    #[error("record of worker `{0}` under another worker's key")]
    Misplaced(WorkerId),
}

/// The stored form around a record.
#[derive(Serialize)]
struct Stored<'a> {
    version: u32,
    #[serde(flatten)]
    record: &'a WorkerRecord,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl WorkerRecord {
    /// Returns the stored form.
    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(&Stored { version: VERSION, record: self })
            .expect("strings, numbers and lists always serialize")
    }

    /// Returns the epoch of a stored form, of whatever version.
    pub(crate) fn epoch_of(stored: &[u8]) -> Option<u64> {
        #[derive(Deserialize)]
        struct Epoch {
            epoch: u64,
        }
        serde_json::from_slice(stored).ok().map(|Epoch { epoch }| epoch)
    }

    /// Reads the stored form found under the key of the worker named `id`.
    pub(crate) fn decode(id: &str, stored: &[u8]) -> Result<Self, RecordError> {
        let Version { version } = serde_json::from_slice(stored)?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let record: Self = serde_json::from_slice(stored)?;
        if record.id.as_str() != id {
            return Err(RecordError::Misplaced(record.id));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> WorkerRecord {
        WorkerRecord {
            id: "w-1".parse().unwrap(),
            address: "10.0.0.1:7171".to_owned(),
            epoch: 7,
            state: WorkerState::Ready,
            models: vec![ModelRecord {
                name: "demo".to_owned(),
                identity: "ab".to_owned(),
                header_digest: "cd".to_owned(),
                layers: LayerRange { start: 0, end: 6 },
                layer_count: 6,
                context_length: 512,
                vocab_size: 1024,
                state: ModelState::Ready,
                generation: 0,
                kv_tokens: 8192,
                decode_rate: Rate::default(),
                prefill_rate: Rate::default(),
            }],
            max_sequences: 16,
        }
    }

    #[test]
    fn the_stored_form_is_pinned() {
        let stored = String::from_utf8(record().encode()).unwrap();
        assert_eq!(
            stored,
            concat!(
                r#"{"version":1,"id":"w-1","address":"10.0.0.1:7171","epoch":7,"state":"ready","#,
                r#""models":[{"name":"demo","identity":"ab","header_digest":"cd","#,
                r#""layers":{"start":0,"end":6},"layer_count":6,"context_length":512,"#,
                r#""vocab_size":1024,"state":"ready","generation":0,"kv_tokens":8192}],"#,
                r#""max_sequences":16}"#
            )
        );
        assert_eq!(WorkerRecord::decode("w-1", stored.as_bytes()).unwrap(), record());
    }

    #[test]
    fn measured_rates_are_stored() {
        let mut measured = record();
        measured.models[0].decode_rate = Rate::measured(11.7);
        measured.models[0].prefill_rate = Rate::measured(0.25);
        let stored = String::from_utf8(measured.encode()).unwrap();
        assert!(stored.contains(r#""decode_rate":12.0,"prefill_rate":0.25}]"#), "{stored}");
        assert_eq!(WorkerRecord::decode("w-1", stored.as_bytes()).unwrap(), measured);
    }

    #[test]
    fn records_are_near_when_only_rates_differ_and_hardly() {
        let rated = |decode: f64| {
            let mut record = record();
            record.models[0].decode_rate = Rate::measured(decode);
            record
        };
        assert!(rated(10.0).is_near(&rated(11.0)));
        assert!(!rated(10.0).is_near(&rated(20.0)));
        assert!(!record().is_near(&rated(1.0)), "the first reading is news");
        let mut drains = rated(11.0);
        drains.state = WorkerState::Draining;
        assert!(!rated(10.0).is_near(&drains));
        let empty = WorkerRecord { models: Vec::new(), ..rated(10.0) };
        assert!(!rated(10.0).is_near(&empty) && !empty.is_near(&rated(10.0)));
    }

    #[test]
    fn unusable_records_are_refused() {
        let stored = String::from_utf8(record().encode()).unwrap();
        let decode = |id: &str, stored: String| WorkerRecord::decode(id, stored.as_bytes());
        let newer = stored.replace("\"version\":1", "\"version\":2");
        assert_eq!(WorkerRecord::epoch_of(newer.as_bytes()), Some(7), "of whatever version");
        assert!(matches!(decode("w-1", newer), Err(RecordError::Version(2))));
        assert!(matches!(decode("w-2", stored.clone()), Err(RecordError::Misplaced(_))));
        for malformed in [
            String::new(),
            "{}".to_owned(),
            stored.replace("ready", "dancing"),
            stored.replace("w-1", "a/b"),
            stored.replace("\"epoch\":7,", ""),
        ] {
            let refused = decode("w-1", malformed.clone());
            assert!(matches!(refused, Err(RecordError::Malformed(_))), "{malformed}");
        }
        let (state, capacity) = (",\"state\":\"ready\",\"generation\":0", ",\"kv_tokens\":8192");
        let older = stored.replace(&format!("{state}{capacity}}}]"), "}]");
        assert_ne!(older, stored);
        let mut expected = record();
        expected.models[0].kv_tokens = 0;
        assert_eq!(decode("w-1", older).unwrap(), expected, "models without a state are ready");
        let grown = stored.replace("\"epoch\"", "\"zone\":\"a\",\"epoch\"");
        assert_eq!(decode("w-1", grown).unwrap(), record(), "an added field is skipped");
    }

    #[test]
    fn names_that_would_leave_their_key_are_refused() {
        for name in ["", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(name.parse::<WorkerId>().is_err(), "{name}");
            assert!(name.parse::<ClusterName>().is_err(), "{name}");
        }
        for name in ["a", "worker-0.pool_1", &"x".repeat(128)] {
            assert_eq!(name.parse::<WorkerId>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn only_a_ready_worker_with_a_whole_model_serves() {
        let mut worker = record();
        assert!(worker.serves("demo").is_some());
        assert!(worker.serves("other").is_none());
        worker.models[0].identity.clear();
        assert!(worker.serves("demo").is_none(), "a stage without identity");
        worker.models[0].identity.push_str("ab");
        worker.models[0].layers.start = 3;
        assert!(worker.serves("demo").is_none(), "a later stage");
        worker.models[0].layers.start = 0;
        for state in [ModelState::Loading, ModelState::Draining, ModelState::Failed] {
            worker.models[0].state = state;
            assert!(worker.serves("demo").is_none(), "{state:?}");
        }
        worker.models[0].state = ModelState::Ready;
        for state in [WorkerState::Loading, WorkerState::Draining] {
            worker.state = state;
            assert!(worker.serves("demo").is_none(), "{state:?}");
        }
    }
}
