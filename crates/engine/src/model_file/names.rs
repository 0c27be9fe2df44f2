//! Values known by a name.

use std::fmt;

/// A name that stands for nothing here.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("unknown {kind} `{found}`, expected one of {expected}")]
pub struct UnknownName {
    /// What was being named.
    pub kind: &'static str,
    /// The name given.
    pub found: String,
    /// All names, comma-separated.
    pub expected: String,
}

/// Finds a value by the name it displays as.
pub(crate) fn parse<T: Copy + fmt::Display>(
    kind: &'static str,
    all: &[T],
    found: &str,
) -> Result<T, UnknownName> {
    let value = all.iter().find(|value| value.to_string() == found);
    value.copied().ok_or_else(|| UnknownName {
        kind,
        found: found.to_owned(),
        expected: all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    })
}
