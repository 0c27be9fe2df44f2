//! Just enough of a GGUF reader to find the keys of a fixture; the real one is the engine's.

use std::collections::HashMap;

use crate::{TokenType, Vocabulary};

pub(super) struct Keys(HashMap<String, Key>);

enum Key {
    Number(i64),
    Text(String),
    List(Vec<Self>),
}

pub(super) fn keys(bytes: &[u8]) -> Keys {
    let mut bytes = bytes;
    assert_eq!(take::<4>(&mut bytes), *b"GGUF");
    let _version = u32::from_le_bytes(take(&mut bytes));
    let _tensors = u64::from_le_bytes(take(&mut bytes));
    let count = u64::from_le_bytes(take(&mut bytes));
    let key = |_| {
        let name = text(&mut bytes);
        let kind = u32::from_le_bytes(take(&mut bytes));
        (name, value(&mut bytes, kind))
    };
    Keys((0..count).map(key).collect())
}

impl Keys {
    pub(super) fn number(&self, name: &str) -> Option<u32> {
        match self.0.get(name)? {
            Key::Number(number) => u32::try_from(*number).ok(),
            _ => None,
        }
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name)? {
            Key::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn vocabulary(&self) -> Vocabulary {
        let list = |name: &str| match self.0.get(name) {
            Some(Key::List(list)) => list.as_slice(),
            _ => &[],
        };
        let texts = |name: &str| {
            let text = |key: &Key| match key {
                Key::Text(text) => text.clone(),
                _ => panic!("{name} holds texts"),
            };
            list(name).iter().map(text).collect()
        };
        let kind = |key: &Key| match key {
            Key::Number(number) => TokenType::from_gguf(*number),
            _ => panic!("token_type holds numbers"),
        };
        Vocabulary {
            model: self.text("tokenizer.ggml.model").unwrap().to_owned(),
            pre: self.text("tokenizer.ggml.pre").unwrap_or_default().to_owned(),
            tokens: texts("tokenizer.ggml.tokens"),
            token_types: list("tokenizer.ggml.token_type").iter().map(kind).collect(),
            merges: texts("tokenizer.ggml.merges"),
            ..Vocabulary::default()
        }
    }
}

fn value(bytes: &mut &[u8], kind: u32) -> Key {
    Key::Number(match kind {
        0 | 1 | 7 => take::<1>(bytes)[0].into(),
        2 | 3 => u16::from_le_bytes(take(bytes)).into(),
        4..=6 => u32::from_le_bytes(take(bytes)).into(),
        8 => return Key::Text(text(bytes)),
        9 => {
            let kind = u32::from_le_bytes(take(bytes));
            let count = u64::from_le_bytes(take(bytes));
            return Key::List((0..count).map(|_| value(bytes, kind)).collect());
        }
        10..=12 => i64::from_le_bytes(take(bytes)),
        _ => panic!("key type {kind}"),
    })
}

fn text(bytes: &mut &[u8]) -> String {
    let length = usize::try_from(u64::from_le_bytes(take(bytes))).unwrap();
    let (text, rest) = bytes.split_at(length);
    *bytes = rest;
    String::from_utf8(text.to_vec()).unwrap()
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (head, rest) = bytes.split_first_chunk().unwrap();
    *bytes = rest;
    *head
}
