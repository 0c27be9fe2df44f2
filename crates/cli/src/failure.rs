//! From an error to a line on stderr and an exit code.

use std::{
    fmt,
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::anyhow;
use tercet_engine::ModelError;
use tercet_worker::BuildError;

/// An error in what the user asked for, as opposed to one met while doing it.
#[derive(Debug)]
struct Misconfigured(anyhow::Error);

impl fmt::Display for Misconfigured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&message(&self.0))
    }
}

impl std::error::Error for Misconfigured {}

/// Marks an error as one of usage or configuration.
pub(crate) fn misconfigured(error: impl Into<anyhow::Error>) -> anyhow::Error {
    Misconfigured(error.into()).into()
}

/// Marks an error met while opening a model as one of configuration, and says what was looked for.
pub(crate) fn no_model(error: ModelError) -> anyhow::Error {
    let is_missing = matches!(
        &error,
        ModelError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound
    );
    let error = anyhow::Error::from(error);
    misconfigured(if is_missing {
        anyhow!("{}; expected a GGUF file or a Hugging Face folder", message(&error))
    } else {
        error
    })
}

/// Marks what keeps a worker from being built as an error of configuration.
pub(crate) fn unbuilt(error: BuildError) -> anyhow::Error {
    match error {
        BuildError::Model(error) => no_model(error),
        other => misconfigured(other),
    }
}

/// Prints why a command failed and returns its exit code.
///
/// A reader that went away has what it wanted: that is no failure.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if is_broken_pipe(error) {
        return ExitCode::SUCCESS;
    }
    // Nothing is left to tell it to if stderr is gone as well.
    drop(writeln!(io::stderr(), "error: {}", message(error)));
    if error.chain().any(|cause| cause.is::<Misconfigured>()) {
        ExitCode::from(2)
    } else {
        ExitCode::FAILURE
    }
}

/// Returns an error and its causes as one line, leaving out causes that the text before tells.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
    }
    line.replace('\n', " ")
}

pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    fn code(error: &anyhow::Error) -> String {
        format!("{:?}", report(error))
    }

    #[test]
    fn exit_codes_tell_whose_fault_it_is() {
        let usage = misconfigured(anyhow!("no such file")).context("serve");
        assert_eq!(code(&usage), format!("{:?}", ExitCode::from(2)));
        assert_eq!(code(&anyhow!("lost")), format!("{:?}", ExitCode::FAILURE));
        let closed = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(code(&closed.context("write")), format!("{:?}", ExitCode::SUCCESS));
    }

    #[test]
    fn causes_are_told_once() {
        let error = Err::<(), _>(anyhow!("refused")).context("connect: refused").context("serve");
        assert_eq!(message(&error.unwrap_err()), "serve: connect: refused");
        let inner = anyhow!("b").context("a");
        assert_eq!(message(&misconfigured(inner).context("c")), "c: a: b");
    }
}
