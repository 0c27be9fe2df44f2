//! The settings in force, written as a configuration file.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, ArgMatches, Command, parser::ValueSource};

use super::{Layer, Origin, SECRETS, find};

/// Stands for a value that nobody may see.
pub(super) const HIDDEN: &str = "(hidden)";

/// Returns every setting of the command at `path`, a line each, and where it comes from.
pub(super) fn settings(
    root: &Command,
    path: &[String],
    matches: &ArgMatches,
    layers: &[Layer],
) -> String {
    let command = find(root, path);
    let of_command =
        path.iter().try_fold(matches, |matches, name| matches.subcommand_matches(name));
    let mut lines = Vec::new();
    for (command, matches) in [(root, Some(matches)), (command, of_command)] {
        let Some(matches) = matches else { continue };
        for arg in command.get_arguments() {
            let hidden = ["config", "print_config", "help", "version"];
            if let (Some(key), false) = (arg.get_long(), hidden.contains(&arg.get_id().as_str())) {
                lines.push((setting(key, arg, matches), origin(arg, matches, layers)));
            }
        }
    }
    let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0).min(44);
    // A command of a command has no table: its settings are those at the top of a file.
    let mut text = match path {
        [command] => format!("[{command}]\n"),
        _ => format!("# tercet {}\n", path.join(" ")),
    };
    for (line, origin) in lines {
        writeln!(text, "{line:width$}  # {origin}").expect("a string takes all that is written");
    }
    text
}

/// Returns `key = value`, or the key alone, commented out, if it has no value.
fn setting(key: &str, arg: &Arg, matches: &ArgMatches) -> String {
    let words = matches.get_raw(arg.get_id().as_str()).into_iter().flatten();
    let words: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    let is_list =
        matches!(arg.get_action(), ArgAction::Append) || arg.get_value_delimiter().is_some();
    match words.as_slice() {
        [] => format!("# {key}"),
        _ if SECRETS.contains(&arg.get_id().as_str()) => format!("# {key} = {HIDDEN}"),
        _ if is_list => format!("{key} = {}", list(&words)),
        [first, ..] => format!("{key} = {}", word(first)),
    }
}

fn origin(arg: &Arg, matches: &ArgMatches, layers: &[Layer]) -> String {
    let id = arg.get_id().as_str();
    match matches.value_source(id) {
        Some(ValueSource::CommandLine) => {
            format!("flag --{}", arg.get_long().unwrap_or_default())
        }
        Some(ValueSource::EnvVariable) => {
            let name = arg.get_env().unwrap_or_default();
            format!("environment {}", name.to_string_lossy())
        }
        _ => match layers.iter().find(|layer| layer.id == id).map(|layer| &layer.origin) {
            Some(Origin::File { path, line }) => format!("file {}:{line}", path.display()),
            Some(Origin::Profile(profile)) => format!("profile {profile}"),
            None => absent(arg),
        },
    }
}

/// Returns what happens without a value: the help says it.
fn absent(arg: &Arg) -> String {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    match help.split_once("[default: ") {
        Some((_, told)) => format!("default: {}", told.trim_end_matches(']')),
        None => "default".to_owned(),
    }
}

/// Writes a word as a value of a configuration file.
pub(super) fn word(word: &str) -> String {
    let is_number = word.parse::<i64>().is_ok_and(|number| number.to_string() == word)
        || word.parse::<f64>().is_ok_and(|number| {
            number.is_finite() && word.contains('.') && number.to_string() == word
        });
    if is_number || ["true", "false"].contains(&word) {
        return word.to_owned();
    }
    // JSON's escapes are TOML's, but for those of characters beyond the first plane, which JSON
    // leaves as they are.
    serde_json::Value::from(word).to_string()
}

/// Writes words as a list.
pub(super) fn list(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| self::word(word)).collect();
    format!("[{}]", words.join(", "))
}
