//! From the layers of the configuration to the arguments of a command.
//!
//! ```text
//! flag > environment variable > configuration file > profile > default
//! ```
//!
//! The command line's own table is the only one: the file and the profile become defaults of its
//! arguments, so that a value is checked by the same parser wherever it comes from.

mod file;
mod show;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::anyhow;
use clap::{
    Arg, ArgAction, ArgMatches, Command, CommandFactory as _, FromArgMatches as _,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};

use self::file::{Entry, Value};
use crate::{
    args::{Cli, ServedModel},
    failure::misconfigured,
    output::alike,
    profile::{Machine, Profile},
};

/// Identifiers of arguments whose values nobody may see: not other users, in the list of processes,
/// nor who reads the settings.
const SECRETS: [&str; 1] = ["etcd_password"];

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Asked {
    /// To run a command. With the words of its flags, wherever they come from.
    Run(Box<Cli>, BTreeMap<String, Vec<String>>),
    /// To show its settings.
    Show(String),
}

/// Why there is nothing to run.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The command line is wrong, or asks for help.
    Usage(clap::Error),
    /// The configuration file or the environment is wrong.
    Settings(anyhow::Error),
}

/// Where the value of a setting comes from that was not given as a flag or in the environment.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Origin {
    File { path: PathBuf, line: usize },
    Profile(Profile),
}

/// A value for an argument that is given nowhere else.
#[derive(Clone, Debug)]
struct Layer {
    /// Identifier of the argument.
    id: String,
    words: Vec<String>,
    origin: Origin,
}

/// Reads the command line and what it builds on. `variable` looks a path up in the environment.
pub(crate) fn read(
    words: &[OsString],
    variable: impl Fn(&str) -> Option<PathBuf>,
) -> Result<Asked, Refusal> {
    let strict = Cli::command();
    let lenient = lenient(strict.clone());
    let matches = match lenient.clone().try_get_matches_from(words) {
        Ok(matches) => matches,
        // Its text tells which arguments are required; only the table as it is knows.
        Err(error) => {
            if let Some(error) = from_environment(&lenient, words, &error) {
                return Err(Refusal::Settings(error));
            }
            return Err(Refusal::Usage(strict.try_get_matches_from(words).err().unwrap_or(error)));
        }
    };
    let (path, given) = leaf(&matches);
    if let Some(error) = bared(find(&lenient, &path), given) {
        return Err(Refusal::Settings(error));
    }
    let named = matches.get_one::<PathBuf>("config").cloned();
    let mut layers = Vec::new();
    if let Some(file) = named.or_else(|| file::default_path(variable)) {
        let entries = file::read(&file).map_err(Refusal::Settings)?;
        layers = from_file(&lenient, &path, given, &file, &entries).map_err(Refusal::Settings)?;
    }

    let filled = layered(lenient, &path, &layers);
    let matches = filled.clone().try_get_matches_from(words).map_err(Refusal::Usage)?;
    let (_, of_command) = leaf(&matches);
    if let Some(profile) = of_command.try_get_one::<Profile>("profile").ok().flatten() {
        let command = find(&filled, &path);
        layers.extend(from_profile(*profile, command, of_command, &layers));
    }

    if matches.get_flag("print_config") {
        let shown = layered(filled, &path, &layers);
        let matches = shown.try_get_matches_from(words).map_err(Refusal::Usage)?;
        return Ok(Asked::Show(show::settings(&strict, &path, &matches, &layers)));
    }
    let mut command = layered(strict, &path, &layers);
    let matches = command.try_get_matches_from_mut(words).map_err(Refusal::Usage)?;
    let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command));
    Ok(Asked::Run(Box::new(cli.map_err(Refusal::Usage)?), flags(find(&command, &path), &matches)))
}

/// Refuses a secret given as a flag.
fn bared(command: &Command, matches: &ArgMatches) -> Option<anyhow::Error> {
    let is_bared = |arg: &&Arg| {
        let id = arg.get_id().as_str();
        SECRETS.contains(&id) && matches.value_source(id) == Some(ValueSource::CommandLine)
    };
    let arg = command.get_arguments().find(is_bared)?;
    let variable = arg.get_env().unwrap_or_default().to_string_lossy().into_owned();
    let flag = arg.get_long().unwrap_or_default();
    Some(misconfigured(anyhow!(
        "--{flag} shows a secret to everybody on this machine: set {variable}, or {flag} in the \
         configuration file"
    )))
}

/// Returns the words of the flags of a command that have any.
fn flags(command: &Command, matches: &ArgMatches) -> BTreeMap<String, Vec<String>> {
    let (_, matches) = leaf(matches);
    let words = |arg: &Arg| {
        let words = matches.get_raw(arg.get_id().as_str())?;
        let words = words.map(|word| word.to_string_lossy().into_owned()).collect();
        Some((arg.get_long()?.to_owned(), words))
    };
    command
        .get_arguments()
        .filter(|arg| matches.try_contains_id(arg.get_id().as_str()).is_ok())
        .filter_map(words)
        .collect()
}

/// Names the environment variable that a wrong value comes from, if it comes from one: clap speaks
/// of the flag.
fn from_environment(
    root: &Command,
    words: &[OsString],
    error: &clap::Error,
) -> Option<anyhow::Error> {
    let (Some(ContextValue::String(flag)), Some(ContextValue::String(value))) =
        (error.get(ContextKind::InvalidArg), error.get(ContextKind::InvalidValue))
    else {
        return None;
    };
    let flag = flag.split([' ', '[', '=']).next()?;
    let mut all = Vec::new();
    collect(root, &mut Vec::new(), &mut all);
    let (_, arg) = all.into_iter().find(|(_, arg)| arg.get_long() == flag.strip_prefix("--"))?;
    let is_given = |word: &OsString| {
        let word = word.to_string_lossy();
        word.split_once('=').map_or(&*word, |(name, _)| name) == flag
    };
    let variable = arg.get_env()?.to_string_lossy().into_owned();
    if words.iter().any(is_given) || std::env::var_os(&variable).is_none() {
        return None;
    }
    Some(misconfigured(anyhow!("{variable} = {}: {}", show::word(value), reason(error))))
}

/// Returns the command with nothing required: the file may have it.
fn lenient(command: Command) -> Command {
    command.mut_args(|arg| arg.required(false)).mut_subcommands(lenient)
}

/// Returns the names of the command asked for and what was given to it.
fn leaf(matches: &ArgMatches) -> (Vec<String>, &ArgMatches) {
    let (mut path, mut matches) = (Vec::new(), matches);
    while let Some((name, inner)) = matches.subcommand() {
        path.push(name.to_owned());
        matches = inner;
    }
    (path, matches)
}

fn find<'a>(command: &'a Command, path: &[String]) -> &'a Command {
    path.iter().fold(command, |command, name| command.find_subcommand(name).unwrap_or(command))
}

/// Makes the values of `layers` defaults of the command at `path`.
fn layered(command: Command, path: &[String], layers: &[Layer]) -> Command {
    let default = |command: Command, layer: &Layer| {
        let words = layer.words.clone();
        command.mut_arg(&layer.id, |arg| arg.default_values(words).required(false))
    };
    let has = |command: &Command, layer: &Layer| {
        command.get_arguments().any(|arg| arg.get_id() == layer.id.as_str())
    };
    let (here, below): (Vec<_>, Vec<_>) = layers.iter().partition(|layer| has(&command, layer));
    let command = here.into_iter().fold(command, default);
    let below: Vec<_> = below.into_iter().cloned().collect();
    match path {
        [] => command,
        [name, rest @ ..] => command.mut_subcommand(name, |inner| layered(inner, rest, &below)),
    }
}

/// Returns what the file has for the command at `path`, after a look at all the rest of it.
fn from_file(
    root: &Command,
    path: &[String],
    given: &ArgMatches,
    file: &Path,
    entries: &[Entry],
) -> Result<Vec<Layer>, anyhow::Error> {
    let mut layers: Vec<Layer> = Vec::new();
    // A command's table goes before the top.
    let (top, tables): (Vec<_>, Vec<_>) = entries.iter().partition(|entry| entry.table.is_none());
    for entry in tables.into_iter().chain(top) {
        let wrong =
            |what: String| misconfigured(anyhow!("{}:{}: {what}", file.display(), entry.line));
        let mut refused = None;
        let mut is_taken = false;
        for (home, arg) in homes(root, entry).map_err(wrong)? {
            let id = arg.get_id().as_str();
            // What is given otherwise may be what this command takes, and the file's another's.
            let is_given = matches!(given.try_contains_id(id), Ok(true))
                && given.value_source(id) != Some(ValueSource::DefaultValue);
            let is_meant = !is_given && (home.is_empty() || home == path);
            match check(root, &home, arg, &entry.value) {
                Ok(()) => is_taken = true,
                Err(what) => {
                    let value = match SECRETS.contains(&id) {
                        true => show::HIDDEN.to_owned(),
                        false => written(&entry.value),
                    };
                    let what = format!("{} = {value}: {what}", entry.key);
                    if is_meant {
                        return Err(wrong(what));
                    }
                    refused = Some(what);
                    continue;
                }
            }
            if is_meant && layers.iter().all(|layer| layer.id != id) {
                let origin = Origin::File { path: file.to_owned(), line: entry.line };
                layers.push(Layer { id: id.to_owned(), words: entry.value.words(), origin });
            }
        }
        // What one command takes, such as a list, may be for it alone.
        if let Some(what) = refused.filter(|_| !is_taken) {
            return Err(wrong(what));
        }
    }
    Ok(layers)
}

/// Returns the arguments that an entry is for, each with the path of its command.
///
/// At the top of a file that is every argument of this name with an environment variable: the
/// others are for one call. A command's table may hold all that the command takes.
fn homes<'a>(root: &'a Command, entry: &Entry) -> Result<Vec<(Vec<String>, &'a Arg)>, String> {
    let mut settings = Vec::new();
    let at_root = |settings: &mut Vec<_>| {
        settings.extend(root.get_arguments().map(|arg| (Vec::new(), arg)));
    };
    match &entry.table {
        None => {
            collect(root, &mut Vec::new(), &mut settings);
            settings.retain(|(_, arg)| arg.get_env().is_some());
        }
        Some(table) => {
            let commands = || root.get_subcommands().filter(|command| !command.has_subcommands());
            let command =
                commands().find(|command| command.get_name() == table).ok_or_else(|| {
                    let names = commands().map(Command::get_name);
                    format!("unknown table [{table}]: {}", advice(table, names, "a command"))
                })?;
            at_root(&mut settings);
            settings.extend(command.get_arguments().map(|arg| (vec![table.clone()], arg)));
        }
    }
    settings.retain(|(_, arg)| {
        arg.get_long().is_some() && !["config", "print_config"].contains(&arg.get_id().as_str())
    });
    let names: Vec<&str> = settings.iter().filter_map(|(_, arg)| arg.get_long()).collect();
    if !names.contains(&entry.key.as_str()) {
        if let Some(tables) = entry.table.is_none().then(|| tables_with(root, &entry.key)).flatten()
        {
            return Err(format!("{} is for one command: set it under {tables}", entry.key));
        }
        let of = entry.table.as_deref().map_or_else(String::new, |table| format!(" in [{table}]"));
        let advice = advice(&entry.key, names.iter().copied(), "a long flag without dashes");
        return Err(format!("unknown key {}{of}: {advice}", entry.key));
    }
    settings.retain(|(_, arg)| arg.get_long() == Some(&entry.key));
    Ok(settings)
}

/// Returns the tables that may hold a key, if there are any.
fn tables_with(root: &Command, key: &str) -> Option<String> {
    let holds = |command: &&Command| {
        !command.has_subcommands() && command.get_arguments().any(|arg| arg.get_long() == Some(key))
    };
    let names = root.get_subcommands().filter(holds);
    let names: Vec<String> = names.map(|command| format!("[{}]", command.get_name())).collect();
    (!names.is_empty()).then(|| names.join(" or "))
}

fn collect<'a>(
    command: &'a Command,
    path: &mut Vec<String>,
    settings: &mut Vec<(Vec<String>, &'a Arg)>,
) {
    settings.extend(command.get_arguments().map(|arg| (path.clone(), arg)));
    for inner in command.get_subcommands() {
        path.push(inner.get_name().to_owned());
        collect(inner, path, settings);
        path.pop();
    }
}

/// Says what was probably meant, or what is expected.
fn advice<'a>(name: &str, known: impl Iterator<Item = &'a str>, expected: &str) -> String {
    match alike(name, known) {
        Some(known) => format!("did you mean {known}?"),
        None => format!("expected {expected}"),
    }
}

/// Checks a value with the parser of its argument.
fn check(root: &Command, path: &[String], arg: &Arg, value: &Value) -> Result<(), String> {
    let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
    let is_list =
        matches!(arg.get_action(), ArgAction::Append) || arg.get_value_delimiter().is_some();
    let flag = |word: &String| format!("--{}={word}", arg.get_long().unwrap_or_default());
    let words: Vec<String> = match value {
        Value::Switch(_) if is_switch => return Ok(()),
        Value::Switch(_) => return Err("expected a string or a number".to_owned()),
        _ if is_switch => return Err("expected true or false".to_owned()),
        Value::Many(_) if !is_list => return Err("expected one value, not a list".to_owned()),
        Value::One(_) | Value::Many(_) => value.words().iter().map(flag).collect(),
    };
    // An argument of the whole program is taken behind any command.
    let any = ["serve".to_owned()];
    let path = if path.is_empty() { any.as_slice() } else { path };
    let line = std::iter::once("tercet").chain(path.iter().map(String::as_str));
    let line = line.chain(words.iter().map(String::as_str));
    match root.clone().try_get_matches_from(line) {
        Ok(_) => Ok(()),
        Err(error) => Err(reason(&error)),
    }
}

/// Returns why a value was refused, without the rest of a message for command lines.
pub(crate) fn reason(error: &clap::Error) -> String {
    if let (ErrorKind::InvalidValue, Some(ContextValue::Strings(valid))) =
        (error.kind(), error.get(ContextKind::ValidValue))
    {
        return format!("expected {}", valid.join(" or "));
    }
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.kind().to_string(),
    }
}

/// Writes a value as in a file.
fn written(value: &Value) -> String {
    match value {
        Value::Switch(on) => on.to_string(),
        Value::One(word) => show::word(word),
        Value::Many(words) => show::list(words),
    }
}

/// Returns where the models of a command are.
fn models(matches: &ArgMatches) -> Vec<PathBuf> {
    if let Ok(models) = matches.try_get_many::<ServedModel>("model") {
        return models.into_iter().flatten().map(|model| model.path.clone()).collect();
    }
    let words = matches.try_get_raw("model").ok().flatten();
    words.into_iter().flatten().map(PathBuf::from).collect()
}

/// Returns what a profile has for a command, but for what is in the file.
fn from_profile(
    profile: Profile,
    command: &Command,
    matches: &ArgMatches,
    layers: &[Layer],
) -> Vec<Layer> {
    let machine = Machine::here(&models(matches));
    let is_free = |id: &str| {
        command.get_arguments().any(|arg| arg.get_id() == id)
            && layers.iter().all(|layer| layer.id != id)
    };
    let values = profile.tune(&machine).values().into_iter().filter(|(id, _)| is_free(id));
    let origin = Origin::Profile(profile);
    values
        .map(|(id, word)| Layer { id: id.to_owned(), words: vec![word], origin: origin.clone() })
        .collect()
}
