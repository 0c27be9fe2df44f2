//! How answers are drawn: the flags of the command line, changed as the conversation goes.

use std::collections::BTreeMap;

use clap::{ArgAction, Args as _, Command, FromArgMatches as _};

use tercet_proto::v1::generate_request::Input;

use crate::{args::SamplingArgs, failure, output::alike, settings};

/// The sampling flags in force.
#[derive(Debug)]
pub(super) struct Parameters {
    /// Of the command line, the environment and the configuration.
    given: BTreeMap<String, Vec<String>>,
    /// Set since.
    set: BTreeMap<String, Vec<String>>,
    current: SamplingArgs,
}

impl Parameters {
    /// Returns the flags as they were given: `given` has the words of those in `args`.
    pub(super) fn new(args: SamplingArgs, mut given: BTreeMap<String, Vec<String>>) -> Self {
        let (names, table) = (names(), table());
        // A switch that is off is as if it were not there.
        given.retain(|name, words| {
            names.contains(name) && !(is_switch(&table, name) && words[..] == ["false"])
        });
        Self { given, set: BTreeMap::new(), current: args }
    }

    /// Returns the flags in force.
    pub(super) fn current(&self) -> &SamplingArgs {
        &self.current
    }

    /// Sets a flag, or sets it back to what it was at the start.
    pub(super) fn set(&mut self, name: &str, value: Option<&str>) -> Result<(), String> {
        let names = names();
        if !names.iter().any(|known| known == name) {
            return Err(match alike(name, names.iter().map(String::as_str)) {
                Some(known) => format!("{name} cannot be set: did you mean {known}?"),
                None => format!("{name} cannot be set: expected {}", names.join(", ")),
            });
        }
        let mut set = self.set.clone();
        match value {
            Some(value) => set.insert(name.to_owned(), words(value)),
            None => set.remove(name),
        };
        let wrong = |what: String| format!("{name} {}: {what}", value.unwrap_or_default());
        let current = parse(&merged(&self.given, &set)).map_err(wrong)?;
        // What the flags exclude of each other comes out now and not with the next answer.
        let asked = Input::Prompt(String::new());
        current.request(asked).map_err(|error| wrong(failure::message(&error)))?;
        (self.current, self.set) = (current, set);
        Ok(())
    }

    /// Returns a line for each flag that is not left to the model.
    pub(super) fn shown(&self) -> Vec<String> {
        let all = merged(&self.given, &self.set);
        all.iter().map(|(name, words)| format!("{name} {}", words.join(" "))).collect()
    }
}

/// Returns the words of a value: a JSON list of strings has several.
fn words(value: &str) -> Vec<String> {
    serde_json::from_str(value).unwrap_or_else(|_| vec![value.to_owned()])
}

fn merged(
    given: &BTreeMap<String, Vec<String>>,
    set: &BTreeMap<String, Vec<String>>,
) -> BTreeMap<String, Vec<String>> {
    let mut all = given.clone();
    all.extend(set.clone());
    all
}

/// Returns the table of the flags, without the layers below them: those are in the words.
fn table() -> Command {
    let command = SamplingArgs::augment_args(Command::new("/set").no_binary_name(true));
    command.mut_args(|arg| arg.env(clap::builder::Resettable::Reset).required(false))
}

fn names() -> Vec<String> {
    table().get_arguments().filter_map(|arg| arg.get_long()).map(str::to_owned).collect()
}

fn is_switch(table: &Command, name: &str) -> bool {
    table
        .get_arguments()
        .any(|arg| arg.get_long() == Some(name) && matches!(arg.get_action(), ArgAction::SetTrue))
}

fn parse(all: &BTreeMap<String, Vec<String>>) -> Result<SamplingArgs, String> {
    let table = table();
    let mut words = Vec::new();
    for (name, values) in all {
        for value in values {
            match (is_switch(&table, name), value.as_str()) {
                (true, "true") => words.push(format!("--{name}")),
                (true, "false") => {}
                (true, _) => return Err("expected true or false".to_owned()),
                (false, value) => words.push(format!("--{name}={value}")),
            }
        }
    }
    let matches = table.try_get_matches_from(words);
    let parsed = matches.and_then(|matches| SamplingArgs::from_arg_matches(&matches));
    parsed.map_err(|error| settings::reason(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_set_and_set_back() {
        let given = BTreeMap::from([
            ("top-k".to_owned(), vec!["5".to_owned()]),
            ("stop".to_owned(), vec!["a".to_owned(), "b".to_owned()]),
            ("model".to_owned(), vec!["m".to_owned()]),
        ]);
        let args = parse(&BTreeMap::from([("top-k".to_owned(), vec!["5".to_owned()])])).unwrap();
        let mut parameters = Parameters::new(args, given);
        parameters.set("temperature", Some("0.7")).unwrap();
        parameters.set("ignore-eos", Some("true")).unwrap();
        assert_eq!(parameters.current().temperature, Some(0.7));
        assert_eq!(parameters.current().top_k, Some(5));
        assert_eq!(parameters.current().stop, ["a", "b"]);
        assert!(parameters.current().ignore_eos);
        assert_eq!(
            parameters.shown(),
            ["ignore-eos true", "stop a b", "temperature 0.7", "top-k 5"]
        );
        parameters.set("top-k", Some("9")).unwrap();
        assert_eq!(parameters.current().top_k, Some(9));
        parameters.set("top-k", None).unwrap();
        parameters.set("temperature", None).unwrap();
        assert_eq!(parameters.current().temperature, None);
        assert_eq!(parameters.current().top_k, Some(5));
    }

    #[test]
    fn forms_and_lists_are_set() {
        let mut parameters = Parameters::new(SamplingArgs::default(), BTreeMap::new());
        parameters.set("choice", Some(r#"["yes", "no, never"]"#)).unwrap();
        assert_eq!(parameters.current().choice, ["yes", "no, never"]);
        let said = parameters.set("regex", Some("a+")).unwrap_err();
        assert!(said.starts_with("regex a+: --regex and --choice are both given"), "{said}");
        assert_eq!(parameters.current().regex, None);
        parameters.set("choice", None).unwrap();
        parameters.set("regex", Some("[a-z]+")).unwrap();
        assert_eq!(parameters.current().regex.as_deref(), Some("[a-z]+"));
        parameters.set("logit-bias", Some("3=-1.5,4=2")).unwrap();
        assert_eq!(parameters.current().logit_bias, [(3, -1.5), (4, 2.0)]);
        parameters.set("frequency-penalty", Some("-0.5")).unwrap();
        assert_eq!(parameters.current().frequency_penalty, Some(-0.5));
    }

    #[test]
    fn mistakes_change_nothing() {
        let mut parameters = Parameters::new(SamplingArgs::default(), BTreeMap::new());
        parameters.set("seed", Some("3")).unwrap();
        let said = parameters.set("temperature", Some("hot")).unwrap_err();
        assert_eq!(said, "temperature hot: expected a finite number of at least 0");
        let said = parameters.set("temprature", Some("1")).unwrap_err();
        assert_eq!(said, "temprature cannot be set: did you mean temperature?");
        assert!(parameters.set("xyz", None).unwrap_err().contains("top-p"));
        assert!(parameters.set("ignore-eos", Some("1")).unwrap_err().contains("true or false"));
        assert_eq!((parameters.current().seed, parameters.current().temperature), (Some(3), None));
    }
}
