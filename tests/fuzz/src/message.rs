//! What an error has to be for someone to read it.

use std::fmt::Display;

/// Most bytes of a message: it has to fit a log line, and the trailers of a response.
const MOST: usize = 2048;

/// Checks that an error is one readable line, whatever text of strangers it quotes.
///
/// # Panics
/// If it is not.
pub(crate) fn check(error: &dyn Display) {
    let message = error.to_string();
    assert!(!message.trim().is_empty(), "an error without a message");
    assert!(message.len() <= MOST, "a message of {} bytes: {message:.300}", message.len());
    let control = message.chars().find(|character| character.is_control());
    assert_eq!(control, None, "a control character in a message: {message:?}");
}

/// Returns what there is, or checks the error.
pub(crate) fn good<T, E: Display>(result: Result<T, E>) -> Option<T> {
    result.inspect_err(|error| check(error)).ok()
}
