//! What is wrong with a request, field by field.

use std::fmt;

use tonic::Status;
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::Reason;

/// Most violations that are told of: the answer has to fit the headers of a response, of which
/// clients and proxies take 8 KB.
const MOST: usize = 16;

/// A request that cannot be served as it stands; the caller must change it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub struct InvalidRequest {
    violations: Vec<Violation>,
}

/// One field that is wrong.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Violation {
    /// Path of the field in the request, such as `sampling.top_p`.
    pub field: String,
    /// The bound, and the value that broke it.
    pub description: String,
}

impl InvalidRequest {
    /// Returns a request error about one field.
    pub fn new(field: impl Into<String>, description: impl Into<String>) -> Self {
        let violation = Violation { field: field.into(), description: description.into() };
        Self { violations: vec![violation] }
    }

    /// Returns what is wrong, in the order of the fields; never empty. Of very many only the first.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    /// Returns what a status says about fields; `None` if it carries no violations.
    pub fn of(status: &Status) -> Option<Self> {
        let violations: Vec<_> = status
            .get_details_bad_request()?
            .field_violations
            .into_iter()
            .map(|violation| Violation {
                field: violation.field,
                description: violation.description,
            })
            .collect();
        (!violations.is_empty()).then_some(Self { violations })
    }
}

impl fmt::Display for InvalidRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, violation) in self.violations.iter().enumerate() {
            let separator = if nth == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", violation.field, violation.description)?;
        }
        Ok(())
    }
}

impl From<InvalidRequest> for Status {
    fn from(invalid: InvalidRequest) -> Self {
        let message = invalid.to_string();
        let violations: Vec<_> = invalid
            .violations
            .into_iter()
            .map(|violation| FieldViolation::new(violation.field, violation.description))
            .collect();
        let mut details = ErrorDetails::with_bad_request(violations);
        Reason::InvalidRequest.describe(&mut details);
        Self::with_error_details(Reason::InvalidRequest.code(), message, details)
    }
}

/// Collects violations while a request is read.
#[derive(Debug, Default)]
pub(crate) struct Violations(Vec<Violation>);

impl Violations {
    /// Records a violation unless the bound holds, or there are enough already.
    pub(crate) fn require(
        &mut self,
        holds: bool,
        field: &str,
        description: impl FnOnce() -> String,
    ) {
        if !holds && self.0.len() < MOST {
            self.0.push(Violation { field: field.to_owned(), description: description() });
        }
    }

    /// Fails if anything was recorded.
    pub(crate) fn finish(self) -> Result<(), InvalidRequest> {
        if self.0.is_empty() { Ok(()) } else { Err(InvalidRequest { violations: self.0 }) }
    }
}
