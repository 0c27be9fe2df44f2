//! Names that lead to models: one each, or several by weight.

use std::collections::BTreeMap;
use std::str::FromStr;

use tercet_proto::v1;

use crate::policy::hash::{hash, join};

/// A name for a model, or for several that share its requests.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Alias {
    /// The name in requests.
    pub name: String,
    /// Models, or aliases of models, each with its weight among them.
    pub targets: Vec<(String, u32)>,
}

/// All aliases of a gateway: none leads back to itself, and each leads somewhere.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Aliases(BTreeMap<String, Vec<(String, u32)>>);

/// Why aliases cannot be used. Fault: the configuration.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AliasError {
    /// The text is no alias.
    #[error(
        "{0:?} is no alias, expected NAME=MODEL, or NAME=MODEL=WEIGHT,MODEL=WEIGHT with whole \
         numbers, such as chat=demo=90,demo-v2=10"
    )]
    Malformed(String),
    /// No request would go anywhere.
    #[error("the weights of alias {0:?} are all 0, give at least one model a weight")]
    Weightless(String),
    /// The name means two things.
    #[error("alias {0:?} is given twice, name all of its models in one")]
    Twice(String),
    /// The name of a model is there twice.
    #[error("alias {alias:?} names {target:?} twice, add the weights up")]
    Repeated {
        /// The alias.
        alias: String,
        /// What it leads to.
        target: String,
    },
    /// It would never come to a model.
    #[error("alias {0:?} leads back to itself, by {path}", path = .1.join(" -> "))]
    Cycle(String, Vec<String>),
}

impl FromStr for Alias {
    type Err = AliasError;

    /// Reads `NAME=MODEL[=WEIGHT][,MODEL[=WEIGHT]...]`; the weight of a model without one is 1.
    fn from_str(text: &str) -> Result<Self, AliasError> {
        let malformed = || AliasError::Malformed(text.to_owned());
        let (name, targets) = text.split_once('=').ok_or_else(malformed)?;
        let target = |text: &str| {
            let (target, weight) = match text.split_once('=') {
                Some((target, weight)) => (target, weight.parse().ok()?),
                None => (text, 1),
            };
            (!target.is_empty()).then(|| (target.to_owned(), weight))
        };
        let targets: Option<Vec<_>> = targets.split(',').map(target).collect();
        let targets = targets.filter(|_| !name.is_empty()).ok_or_else(malformed)?;
        Ok(Self { name: name.to_owned(), targets })
    }
}

impl Aliases {
    /// Returns the aliases, if they make sense together. Whether their models exist shows only
    /// when workers come.
    pub fn new(aliases: impl IntoIterator<Item = Alias>) -> Result<Self, AliasError> {
        let mut all = BTreeMap::new();
        for Alias { name, targets } in aliases {
            if targets.iter().all(|(_, weight)| *weight == 0) {
                return Err(AliasError::Weightless(name));
            }
            for (nth, (target, _)) in targets.iter().enumerate() {
                if targets[..nth].iter().any(|(other, _)| other == target) {
                    return Err(AliasError::Repeated { alias: name, target: target.clone() });
                }
            }
            if all.contains_key(&name) {
                return Err(AliasError::Twice(name));
            }
            all.insert(name, targets);
        }
        let aliases = Self(all);
        for name in aliases.0.keys() {
            if let Some(path) = aliases.way_back(name) {
                return Err(AliasError::Cycle(name.clone(), path));
            }
        }
        Ok(aliases)
    }

    /// Returns how an alias leads back to itself, if it does.
    fn way_back(&self, name: &str) -> Option<Vec<String>> {
        // Each alias is entered once: what it leads to does not depend on the way there.
        let mut seen = vec![name];
        let mut open = vec![vec![name]];
        while let Some(path) = open.pop() {
            let targets = path.last().and_then(|last| self.0.get(*last)).into_iter().flatten();
            for (target, _) in targets {
                let mut longer = path.clone();
                longer.push(target);
                if target == name {
                    return Some(longer.into_iter().map(str::to_owned).collect());
                }
                if !seen.contains(&target.as_str()) {
                    seen.push(target);
                    open.push(longer);
                }
            }
        }
        None
    }

    /// Returns the model that a name leads to, or the name if it is no alias. Equal keys lead to
    /// the same model, at every gateway with the same aliases.
    pub(crate) fn resolve<'a>(&'a self, name: &'a str, key: u64) -> &'a str {
        let mut name = name;
        // No alias leads back to itself: this ends.
        while let Some(targets) = self.0.get(name) {
            let total: u64 = targets.iter().map(|(_, weight)| u64::from(*weight)).sum();
            // The name keeps the draws of aliases that lead to each other apart.
            let mut draw = join(key, hash(name.as_bytes())) % total.max(1);
            let chosen = targets.iter().find(|(_, weight)| {
                let weight = u64::from(*weight);
                let is_chosen = draw < weight;
                draw = draw.saturating_sub(weight);
                is_chosen
            });
            let Some((target, _)) = chosen else { return name };
            name = target;
        }
        name
    }

    /// Returns what can be asked for where `models` are served: each alias, by the models that its
    /// requests go to, hides a model of its name.
    pub(crate) fn listed(&self, mut models: Vec<v1::ModelInfo>) -> Vec<v1::ModelInfo> {
        let mut aliases = Vec::new();
        for (name, targets) in self.models() {
            let infos = models.iter().filter(|model| targets.contains(&model.name.as_str()));
            let merged = infos.cloned().reduce(|one, other| v1::ModelInfo {
                // Answers are equal only within one model.
                identity: String::new(),
                context_length: one.context_length.min(other.context_length),
                vocab_size: one.vocab_size.min(other.vocab_size),
                ..one
            });
            aliases.extend(merged.map(|info| v1::ModelInfo { name: name.to_owned(), ..info }));
        }
        models.retain(|model| !self.0.contains_key(&model.name));
        models.extend(aliases);
        models.sort_by(|one, other| one.name.cmp(&other.name));
        models
    }

    /// Returns every alias with the models that its requests go to.
    fn models(&self) -> impl Iterator<Item = (&str, Vec<&str>)> {
        self.0.keys().map(|name| {
            let (mut models, mut open) = (Vec::new(), vec![name.as_str()]);
            while let Some(name) = open.pop() {
                match self.0.get(name) {
                    Some(targets) => {
                        let used = targets.iter().filter(|(_, weight)| *weight > 0);
                        open.extend(used.map(|(target, _)| target.as_str()));
                    }
                    None if models.contains(&name) => {}
                    None => models.push(name),
                }
            }
            (name.as_str(), models)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aliases(texts: &[&str]) -> Result<Aliases, AliasError> {
        Aliases::new(texts.iter().map(|text| text.parse().unwrap()))
    }

    #[test]
    fn a_name_leads_to_a_model() {
        let aliases = aliases(&["chat=demo", "best=chat"]).unwrap();
        for (name, model) in [("chat", "demo"), ("best", "demo"), ("demo", "demo"), ("x", "x")] {
            assert_eq!(aliases.resolve(name, 7), model);
        }
        assert_eq!(
            aliases.models().collect::<Vec<_>>(),
            [("best", vec!["demo"]), ("chat", vec!["demo"])]
        );
    }

    #[test]
    fn a_split_follows_the_weights_and_the_key() {
        let aliases = aliases(&["chat=old=90,new=10,off=0", "all=chat,other"]).unwrap();
        let count =
            |name, model| (0..10_000).filter(|key| aliases.resolve(name, *key) == model).count();
        let (old, new) = (count("chat", "old"), count("chat", "new"));
        assert_eq!(old + new, 10_000);
        assert!((900..1100).contains(&new), "{new}");
        // One draw does not decide the other.
        let (other, new) = (count("all", "other"), count("all", "new"));
        assert!((4800..5200).contains(&other), "{other}");
        assert!((400..600).contains(&new), "{new}");
        for key in 0..100 {
            assert_eq!(aliases.resolve("chat", key), aliases.resolve("chat", key));
        }
        let (_, mut models) = aliases.models().find(|(name, _)| *name == "all").unwrap();
        models.sort_unstable();
        assert_eq!(models, ["new", "old", "other"]);
    }

    #[test]
    fn aliases_without_sense_are_refused() {
        for (texts, expected) in [
            (vec!["a=b", "b=c", "c=b"], "alias \"b\" leads back to itself, by b -> c -> b"),
            (vec!["a=a"], "alias \"a\" leads back to itself, by a -> a"),
            (vec!["a=x=1,b=0", "b=a"], "alias \"a\" leads back to itself, by a -> b -> a"),
            (vec!["a=b=0,c=0"], "the weights of alias \"a\" are all 0"),
            (vec!["a=b", "a=c"], "alias \"a\" is given twice"),
            (vec!["a=b=1,b=2"], "alias \"a\" names \"b\" twice"),
        ] {
            let error = aliases(&texts).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{texts:?}: {error}");
        }
        for text in ["", "a", "a=", "=b", "a=b,", "a=b=x", "a=b=-1", "a=b=1=2", "a==1"] {
            let error = text.parse::<Alias>().unwrap_err();
            assert_eq!(error, AliasError::Malformed(text.to_owned()), "{text}");
        }
    }
}
