//! What is typed: commands, or something to say.

use crate::output::alike;

/// The commands, with what they take and what they do.
pub(super) const COMMANDS: [(&str, &str); 13] = [
    ("/help", "shows this"),
    ("/new", "forgets the conversation, as /clear does"),
    ("/system [TEXT]", "tells the model TEXT before the conversation, or nothing"),
    ("/set NAME [VALUE]", "sets a flag such as temperature, or sets it back"),
    ("/show", "shows what is set"),
    ("/regenerate", "asks for another answer to what was said last"),
    ("/undo", "takes back what was said last and its answer"),
    ("/save FILE", "writes the conversation to a file"),
    ("/load FILE", "goes on with the conversation of a file"),
    ("/model [NAME]", "shows the models, or asks another from now on"),
    ("/verbose", "tells the tokens and their speed after each answer, or no longer"),
    ("/clear", "forgets the conversation"),
    ("/quit", "ends, as Ctrl-D does"),
];

/// What an entry says.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Entry {
    Nothing,
    Help,
    New,
    System(Option<String>),
    Set {
        name: String,
        value: Option<String>,
    },
    Show,
    Regenerate,
    Undo,
    Save(String),
    Load(String),
    Model(Option<String>),
    Verbose,
    Quit,
    /// No command, or not as it must be; says what is.
    Wrong(String),
    Say(String),
}

impl Entry {
    pub(super) fn parse(text: &str) -> Self {
        let text = text.trim();
        if text.is_empty() {
            return Self::Nothing;
        }
        if !text.starts_with('/') {
            return Self::Say(unfold(text));
        }
        let (command, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let rest = Some(rest.trim().to_owned()).filter(|rest| !rest.is_empty());
        match (command, rest) {
            ("/help", None) => Self::Help,
            ("/new" | "/clear", None) => Self::New,
            ("/system", rest) => Self::System(rest),
            ("/set", Some(rest)) => {
                let (name, value) = rest.split_once(char::is_whitespace).unwrap_or((&rest, ""));
                let value = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
                Self::Set { name: name.trim_start_matches("--").to_owned(), value }
            }
            ("/show", None) => Self::Show,
            ("/regenerate", None) => Self::Regenerate,
            ("/undo", None) => Self::Undo,
            ("/save", Some(path)) => Self::Save(path),
            ("/load", Some(path)) => Self::Load(path),
            ("/model", rest) => Self::Model(rest),
            ("/verbose", None) => Self::Verbose,
            ("/quit", None) => Self::Quit,
            (command, _) => Self::Wrong(wrong(command)),
        }
    }
}

/// Returns the name in a line of [`COMMANDS`].
pub(super) fn name(usage: &str) -> &str {
    usage.split(' ').next().unwrap_or(usage)
}

fn wrong(command: &str) -> String {
    if let Some((usage, _)) = COMMANDS.iter().find(|(usage, _)| name(usage) == command) {
        return format!("{command} is written {usage}");
    }
    match alike(command, COMMANDS.iter().map(|(usage, _)| name(usage))) {
        Some(known) => format!("{command} is no command: did you mean {known}?"),
        None => format!("{command} is no command: /help shows them"),
    }
}

/// Returns whether an entry goes on in the next line: it ends in a backslash, or it begins with
/// three quotes that are not closed.
pub(super) fn goes_on(text: &str) -> bool {
    match text.trim_start().strip_prefix(QUOTES) {
        Some(quoted) => !quoted.contains(QUOTES),
        None => text.ends_with('\\'),
    }
}

const QUOTES: &str = "\"\"\"";

/// Takes out what only held the lines of an entry together.
fn unfold(text: &str) -> String {
    match text.strip_prefix(QUOTES).map(|quoted| quoted.strip_suffix(QUOTES).unwrap_or(quoted)) {
        Some(quoted) => quoted.trim_matches('\n').to_owned(),
        None => text.replace("\\\n", "\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_said() {
        let own = str::to_owned;
        assert_eq!(Entry::parse("  "), Entry::Nothing);
        assert_eq!(Entry::parse(" hello /quit "), Entry::Say(own("hello /quit")));
        assert_eq!(Entry::parse("/quit"), Entry::Quit);
        assert_eq!(Entry::parse("/clear "), Entry::New);
        assert_eq!(Entry::parse("/system  Be brief."), Entry::System(Some(own("Be brief."))));
        assert_eq!(Entry::parse("/system"), Entry::System(None));
        assert_eq!(
            Entry::parse("/set temperature  0.7"),
            Entry::Set { name: own("temperature"), value: Some(own("0.7")) }
        );
        assert_eq!(Entry::parse("/set --seed"), Entry::Set { name: own("seed"), value: None });
        assert_eq!(Entry::parse("/save a b"), Entry::Save(own("a b")));
        assert_eq!(Entry::parse("/model"), Entry::Model(None));
    }

    #[test]
    fn mistakes_come_with_what_is_right() {
        let said = |text: &str| match Entry::parse(text) {
            Entry::Wrong(what) => what,
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(said("/quit now"), "/quit is written /quit");
        assert_eq!(said("/save"), "/save is written /save FILE");
        assert_eq!(said("/regnerate"), "/regnerate is no command: did you mean /regenerate?");
        assert_eq!(said("/xyz"), "/xyz is no command: /help shows them");
    }

    #[test]
    fn every_command_of_the_help_is_one() {
        for (usage, _) in COMMANDS {
            let full = usage.replace(['[', ']'], "");
            assert!(!matches!(Entry::parse(&full), Entry::Wrong(_) | Entry::Say(_)), "{full}");
        }
    }

    #[test]
    fn entries_may_have_several_lines() {
        assert!(goes_on("first \\") && !goes_on("first \\\nsecond"));
        assert!(goes_on("\"\"\"a\nb") && !goes_on("\"\"\"a\nb\"\"\"") && !goes_on("plain"));
        let said = |text: &str| match Entry::parse(text) {
            Entry::Say(text) => text,
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(said("first\\\nsecond"), "first\nsecond");
        assert_eq!(said("\"\"\"\nfn main() {\n}\n\"\"\""), "fn main() {\n}");
    }
}
