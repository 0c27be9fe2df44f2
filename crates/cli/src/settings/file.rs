//! The configuration file, read: names, values and the lines they are on.

use std::{
    borrow::Cow,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::failure::misconfigured;

/// The table of aliases, which are settings of no single command.
const ALIASES: &str = "aliases";

/// A setting of the file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Entry {
    /// The table it is in, which is a command; none at the top.
    pub(super) table: Option<String>,
    pub(super) key: String,
    pub(super) value: Value,
    /// Line of the key, from 1.
    pub(super) line: usize,
}

/// A value, as a flag would be given it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Value {
    Switch(bool),
    One(String),
    Many(Vec<String>),
}

impl Value {
    /// Returns the words that a flag would be given.
    pub(super) fn words(&self) -> Vec<String> {
        match self {
            Self::Switch(on) => vec![on.to_string()],
            Self::One(word) => vec![word.clone()],
            Self::Many(words) => words.clone(),
        }
    }
}

/// Returns the file to read when none is named: the user's, else the machine's.
pub(super) fn default_path(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let user = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
    let places = user.into_iter().chain([PathBuf::from("/etc")]);
    places.map(|place| place.join("tercet/tercet.toml")).find(|path| path.is_file())
}

/// Reads a file.
pub(super) fn read(path: &Path) -> Result<Vec<Entry>> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("read the configuration file {}", path.display()))
        .map_err(misconfigured)?;
    parse(&text).map_err(|(line, what)| misconfigured(anyhow!("{}:{line}: {what}", path.display())))
}

/// Reads the text of a file; an error has its line.
fn parse(text: &str) -> Result<Vec<Entry>, (usize, String)> {
    let line = |offset: usize| 1 + text[..offset.min(text.len())].matches('\n').count();
    let document = DeTable::parse(text).map_err(|error| {
        (line(error.span().map_or(0, |span| span.start)), error.message().to_owned())
    })?;
    let mut entries = Vec::new();
    for (key, value) in document.get_ref() {
        let at = line(key.span().start);
        if let (ALIASES, DeValue::Table(table)) = (key.get_ref().as_ref(), value.get_ref()) {
            let aliases = table.iter().map(|(name, value)| {
                alias(name.get_ref(), value.get_ref()).ok_or_else(|| {
                    let (at, name) = (line(name.span().start), name.get_ref());
                    (at, format!("{name}: expected a model, or a table of models and weights"))
                })
            });
            let value = Value::Many(aliases.collect::<Result<_, _>>()?);
            entries.push(Entry { table: None, key: "alias".to_owned(), value, line: at });
        } else if let DeValue::Table(table) = value.get_ref() {
            for (inner, value) in table {
                let at = line(inner.span().start);
                let value = self::value(value.get_ref())
                    .ok_or_else(|| (at, wrong_kind(inner.get_ref())))?;
                let (table, key) = (Some(key.get_ref().to_string()), inner.get_ref().to_string());
                entries.push(Entry { table, key, value, line: at });
            }
        } else {
            let value =
                self::value(value.get_ref()).ok_or_else(|| (at, wrong_kind(key.get_ref())))?;
            let key = key.get_ref().to_string();
            entries.push(Entry { table: None, key, value, line: at });
        }
    }
    entries.sort_by_key(|entry| entry.line);
    Ok(entries)
}

/// Returns an alias as a flag would be given it.
fn alias(name: &str, value: &DeValue<'_>) -> Option<String> {
    // A name with these in it would be taken for something else.
    let is_plain = |name: &str| !name.contains(['=', ',', ';']);
    let targets = match value {
        DeValue::String(model) if is_plain(model) => model.to_string(),
        DeValue::Table(weights) => {
            let target = |(model, weight): (&Spanned<_>, &Spanned<DeValue<'_>>)| {
                let model: &Cow<'_, str> = model.get_ref();
                is_plain(model).then_some(format!("{model}={}", word(weight.get_ref())?))
            };
            weights.iter().map(target).collect::<Option<Vec<_>>>()?.join(",")
        }
        _ => return None,
    };
    is_plain(name).then(|| format!("{name}={targets}"))
}

fn wrong_kind(key: &str) -> String {
    format!(
        "{key} is no setting: expected a string, a number, true, false, or a list of strings or numbers"
    )
}

fn value(value: &DeValue<'_>) -> Option<Value> {
    match value {
        DeValue::Boolean(on) => Some(Value::Switch(*on)),
        DeValue::Array(items) => {
            items.iter().map(|item| word(item.get_ref())).collect::<Option<_>>().map(Value::Many)
        }
        other => word(other).map(Value::One),
    }
}

fn word(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(table: &str, key: &str, value: Value, line: usize) -> Entry {
        let table = Some(table.to_owned()).filter(|table| !table.is_empty());
        Entry { table, key: key.to_owned(), value, line }
    }

    #[test]
    fn settings_keep_their_lines() {
        let text = "# site\nthreads = 1_000\netcd = ['a:1', \"b:2\"]\n\n[chat]\ntemperature = 0.70\nignore-eos = true\n";
        let one = |word: &str| Value::One(word.to_owned());
        assert_eq!(
            parse(text).unwrap(),
            [
                entry("", "threads", one("1000"), 2),
                entry("", "etcd", Value::Many(vec!["a:1".to_owned(), "b:2".to_owned()]), 3),
                entry("chat", "temperature", one("0.70"), 6),
                entry("chat", "ignore-eos", Value::Switch(true), 7),
            ]
        );
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn mistakes_have_a_line() {
        for (text, line) in [
            ("a = 1\nb =\n", 2),
            ("a = 1\na = 2\n", 2),
            ("\n\nday = 1979-05-27\n", 3),
            ("[serve]\nx = { y = 1 }\n", 2),
            ("list = [[1]]\n", 1),
        ] {
            assert_eq!(parse(text).unwrap_err().0, line, "{text}");
        }
    }

    #[test]
    fn the_users_file_is_looked_for_first() {
        let root = std::env::temp_dir().join(format!("tercet-places-{}", std::process::id()));
        let user = root.join("x/tercet/tercet.toml");
        fs::create_dir_all(user.parent().unwrap()).unwrap();
        fs::write(&user, "").unwrap();
        let found = default_path(|name| (name == "XDG_CONFIG_HOME").then(|| root.join("x")));
        assert_eq!(found, Some(user));
        fs::remove_dir_all(&root).unwrap();
    }
}
