//! What a request offers to choose a worker by.

use tercet_proto::{GenerateSpec, Input, v1};
use tercet_text::prefix::{PAGE_IDS, PageName};
use tonic::metadata::MetadataMap;

use crate::policy::hash::hash;

/// Metadata key by which a client says what session a request belongs to.
pub const SESSION_ID: &str = "tercet-session-id";

/// Most pages named of one prompt: what follows differs between few prompts that begin alike.
const MAX_PAGES: usize = 64;

/// Bytes of text taken for a token.
const BYTES_PER_TOKEN: usize = 4;

/// Bytes of text that stand for a page: as many as its ids have.
const PAGE_BYTES: usize = PAGE_IDS * 4;

/// What a policy may choose by, besides the workers.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Offer {
    /// What stands for the session that the client named.
    pub session: Option<u64>,
    /// Names of the first pages of the prompt, if the policy asked for them. Those of ids are the
    /// names that workers know; of text, and of messages, which are no ids yet, they are others.
    pub pages: Vec<PageName>,
    /// Tokens of the prompt, estimated unless it came as tokens.
    pub prompt_tokens: u64,
}

impl Offer {
    /// Returns what stands for the session named in the metadata of a call.
    pub(crate) fn session(metadata: &MetadataMap) -> Option<u64> {
        let id = metadata.get(SESSION_ID)?.as_encoded_bytes();
        (!id.is_empty()).then(|| hash(id))
    }

    /// Returns the tokens of a prompt, as far as can be told without the model's tokenizer.
    pub(crate) fn prompt_tokens(spec: &GenerateSpec) -> u64 {
        let length = match &spec.input {
            Input::Tokens(ids) => ids.len(),
            Input::Prompt(text) => text.len() / BYTES_PER_TOKEN,
            Input::Chat(chat) => {
                let bytes = |message: &v1::ChatMessage| message.role.len() + message.content.len();
                chat.messages.iter().map(bytes).sum::<usize>() / BYTES_PER_TOKEN
            }
        };
        u64::try_from(length).unwrap_or(u64::MAX)
    }

    /// Returns the names of the pages of a prompt for the model of that identity.
    pub(crate) fn pages(spec: &GenerateSpec, identity: &str) -> Vec<PageName> {
        let model = digest(identity);
        match &spec.input {
            Input::Tokens(ids) => {
                let root = PageName::root(&model, &spec.cache_salt);
                root.chain(&ids[..ids.len().min(MAX_PAGES * PAGE_IDS)]).collect()
            }
            Input::Prompt(text) => Blocks::new(&model, spec).text(text).names,
            Input::Chat(chat) => {
                let messages = chat.messages.iter();
                let blocks = Blocks::new(&model, spec);
                // The separators keep a role from looking like a part of the text.
                let named = messages.fold(blocks, |blocks, message| {
                    let blocks = blocks.text(&message.role).text("\u{1f}");
                    blocks.text(&message.content).text("\u{1e}")
                });
                named.names
            }
        }
    }
}

/// Names of blocks of text, as far as they are full.
struct Blocks {
    last: PageName,
    open: Vec<u8>,
    names: Vec<PageName>,
}

impl Blocks {
    fn new(model: &[u8], spec: &GenerateSpec) -> Self {
        let root: Vec<u8> = b"text".iter().chain(model).copied().collect();
        Self {
            last: PageName::root(&root, &spec.cache_salt),
            open: Vec::with_capacity(PAGE_BYTES),
            names: Vec::new(),
        }
    }

    fn text(mut self, text: &str) -> Self {
        let mut bytes = text.as_bytes();
        while !bytes.is_empty() && self.names.len() < MAX_PAGES {
            let (now, later) = bytes.split_at(bytes.len().min(PAGE_BYTES - self.open.len()));
            self.open.extend_from_slice(now);
            bytes = later;
            if self.open.len() == PAGE_BYTES {
                let mut ids = [0; PAGE_IDS];
                let (words, _) = self.open.as_chunks();
                for (id, word) in ids.iter_mut().zip(words) {
                    *id = u32::from_le_bytes(*word);
                }
                self.last = self.last.next(&ids);
                self.names.push(self.last);
                self.open.clear();
            }
        }
        self
    }
}

/// Returns the digest that an identity is the hex form of, else the identity itself.
fn digest(identity: &str) -> Vec<u8> {
    let (pairs, rest) = identity.as_bytes().as_chunks::<2>();
    let byte = |pair: &[u8; 2]| {
        let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|it| u8::try_from(it).ok());
        Some(digit(pair[0])? * 16 + digit(pair[1])?)
    };
    let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
    bytes.filter(|_| rest.is_empty()).unwrap_or_else(|| identity.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(input: v1::generate_request::Input, salt: &str) -> GenerateSpec {
        let cache_salt = salt.to_owned();
        let request = v1::GenerateRequest {
            input: Some(input),
            cache_salt,
            ..v1::GenerateRequest::default()
        };
        GenerateSpec::try_from(request).unwrap()
    }

    fn prompt(text: &str) -> v1::generate_request::Input {
        v1::generate_request::Input::Prompt(text.to_owned())
    }

    fn chat(messages: &[(&str, &str)]) -> v1::generate_request::Input {
        let message = |(role, content): &(&str, &str)| v1::ChatMessage {
            role: (*role).to_owned(),
            content: (*content).to_owned(),
        };
        let messages = messages.iter().map(message).collect();
        v1::generate_request::Input::Chat(v1::Chat { messages, ..v1::Chat::default() })
    }

    #[test]
    fn ids_have_the_names_that_workers_know() {
        let ids: Vec<u32> = (0..200).collect();
        let tokens = v1::generate_request::Input::Tokens(v1::TokenIds { ids: ids.clone() });
        let identity = "0f".repeat(32);
        let pages = Offer::pages(&spec(tokens, "tenant"), &identity);
        let expected: Vec<_> = PageName::root(&[15; 32], "tenant").chain(&ids).collect();
        assert_eq!(pages, expected);
        assert_eq!(digest("no hex"), b"no hex");
        assert_eq!(digest("abc"), b"abc");
    }

    #[test]
    fn texts_that_begin_alike_begin_with_the_same_names() {
        let system = "You are terse. ".repeat(40);
        let pages = |input| Offer::pages(&spec(input, "s"), "ab");
        let one = pages(chat(&[("system", &system), ("user", &"a".repeat(300))]));
        let two = pages(chat(&[("system", &system), ("user", &"b".repeat(300))]));
        assert_eq!(one.len(), 3);
        assert_eq!(one[..2], two[..2]);
        assert_ne!(one[2], two[2]);
        let plain = pages(prompt(&system));
        assert_ne!(plain[0], one[0], "a role is in front of it");
        assert_eq!(plain.len(), system.len() / 256);
        assert_ne!(plain, Offer::pages(&spec(prompt(&system), "t"), "ab"), "another tenant");
        assert_ne!(plain, Offer::pages(&spec(prompt(&system), "s"), "cd"), "another model");
        assert_eq!(pages(prompt(&"x".repeat(255))), []);
        assert_eq!(pages(prompt(&"x".repeat(1 << 20))).len(), 64, "bounded");
    }

    #[test]
    fn a_session_is_whatever_the_client_names() {
        let mut metadata = MetadataMap::new();
        assert_eq!(Offer::session(&metadata), None);
        metadata.insert(SESSION_ID, "".parse().unwrap());
        assert_eq!(Offer::session(&metadata), None);
        metadata.insert(SESSION_ID, "a".parse().unwrap());
        let a = Offer::session(&metadata).unwrap();
        metadata.insert(SESSION_ID, "b".parse().unwrap());
        assert_ne!(Offer::session(&metadata), Some(a));
    }
}
