//! What has been said so far.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tercet_proto::v1::{Chat, ChatMessage, generate_request::Input};

/// A conversation: turns of user and assistant, after what the model was told before.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Conversation {
    #[serde(default)]
    pub(super) system: Option<String>,
    turns: Vec<Turn>,
}

/// What was said and what the model said to it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Turn {
    pub(super) user: String,
    pub(super) assistant: String,
}

impl Conversation {
    pub(super) fn new(system: Option<String>) -> Self {
        Self { system, turns: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.turns.len()
    }

    /// Returns the request for the answer to `text`.
    pub(super) fn asking(&self, text: &str) -> Input {
        let mut messages: Vec<_> =
            self.system.iter().map(|system| message("system", system)).collect();
        for turn in &self.turns {
            messages.push(message("user", &turn.user));
            messages.push(message("assistant", &turn.assistant));
        }
        messages.push(message("user", text));
        Input::Chat(Chat { messages, ..Chat::default() })
    }

    /// Remembers what was said and what the model said to it. Without an answer neither counts:
    /// templates expect user and assistant to take turns.
    pub(super) fn add(&mut self, user: String, assistant: String) {
        if !assistant.is_empty() {
            self.turns.push(Turn { user, assistant });
        }
    }

    /// Puts a turn back that was taken off.
    pub(super) fn restore(&mut self, turn: Turn) {
        self.turns.push(turn);
    }

    /// Takes the last turn off.
    pub(super) fn undo(&mut self) -> Option<Turn> {
        self.turns.pop()
    }

    /// Forgets all that was said.
    pub(super) fn clear(&mut self) {
        self.turns.clear();
    }

    /// Writes a file, which must not be there yet unless `replace` says so.
    pub(super) fn save(&self, path: &Path, replace: bool) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("write JSON")?;
        let mut options = fs::OpenOptions::new();
        options.write(true).truncate(true).create(replace).create_new(!replace);
        let mut file = options.open(path).with_context(|| format!("write {}", path.display()))?;
        std::io::Write::write_all(&mut file, format!("{text}\n").as_bytes())
            .with_context(|| format!("write {}", path.display()))
    }

    /// Reads a file.
    pub(super) fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} holds no conversation as /save writes it", path.display()))
    }
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(conversation: &Conversation, text: &str) -> Vec<(String, String)> {
        match conversation.asking(text) {
            Input::Chat(chat) => chat.messages.into_iter().map(|m| (m.role, m.content)).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn pair(role: &str, content: &str) -> (String, String) {
        (role.to_owned(), content.to_owned())
    }

    #[test]
    fn turns_are_kept_in_order() {
        let mut conversation = Conversation::default();
        conversation.add("first".to_owned(), "one".to_owned());
        conversation.add("cancelled".to_owned(), String::new());
        conversation.system = Some("brief".to_owned());
        assert_eq!(
            said(&conversation, "last"),
            [
                pair("system", "brief"),
                pair("user", "first"),
                pair("assistant", "one"),
                pair("user", "last"),
            ]
        );
        assert_eq!(conversation.undo().unwrap().user, "first");
        assert_eq!(conversation.undo(), None);
        assert_eq!(said(&conversation, "a"), [pair("system", "brief"), pair("user", "a")]);
    }

    #[test]
    fn a_file_keeps_a_conversation() {
        let path = std::env::temp_dir().join(format!("tercet-chat-{}.json", std::process::id()));
        drop(fs::remove_file(&path));
        let mut conversation = Conversation::new(Some("brief".to_owned()));
        conversation.add("é\n\"".to_owned(), "x".to_owned());
        conversation.save(&path, false).unwrap();
        assert!(conversation.save(&path, false).is_err(), "not over a file of someone else");
        conversation.save(&path, true).unwrap();
        assert_eq!(Conversation::load(&path).unwrap(), conversation);
        fs::write(&path, "{\"messages\": []}").unwrap();
        assert!(Conversation::load(&path).unwrap_err().to_string().contains("/save"));
        fs::remove_file(&path).unwrap();
    }
}
