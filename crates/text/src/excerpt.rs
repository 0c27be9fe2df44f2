//! Text of strangers in messages.

use std::fmt::{self, Display, Write as _};

/// Most bytes shown.
const MOST: usize = 480;

/// Displays what a message quotes from a file or a library on one line of bounded length: control
/// characters are escaped, and what is too long is cut.
///
/// Names and templates in a model file may hold anything, a megabyte or a terminal's commands;
/// messages about them go to logs, terminals and the headers of responses.
#[derive(Clone, Copy, Debug)]
pub struct Excerpt<T>(pub T);

impl<T: Display> Display for Excerpt<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = Line { out: f, left: MOST, cut: false };
        match write!(line, "{}", self.0) {
            Err(_) if line.cut => f.write_str(" ..."),
            written => written,
        }
    }
}

/// Passes text on until there has been enough.
struct Line<'a, 'b> {
    out: &'a mut fmt::Formatter<'b>,
    left: usize,
    cut: bool,
}

impl fmt::Write for Line<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            // Line and paragraph separators break lines too.
            let control = character.is_control() || matches!(character, '\u{2028}' | '\u{2029}');
            let escaped = character.escape_default();
            let length = if control { escaped.len() } else { character.len_utf8() };
            if length > self.left {
                self.cut = true;
                return Err(fmt::Error);
            }
            self.left -= length;
            if control {
                write!(self.out, "{escaped}")?;
            } else {
                self.out.write_char(character)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Excerpt, MOST};

    #[test]
    fn ordinary_text_is_shown_as_it_is() {
        assert_eq!(Excerpt("`naïve` 你好 \"x\" \\").to_string(), "`naïve` 你好 \"x\" \\");
        assert_eq!(Excerpt("a".repeat(MOST)).to_string(), "a".repeat(MOST));
    }

    #[test]
    fn a_message_stays_on_its_line() {
        assert_eq!(Excerpt("a\nb\u{1b}[2J\u{2028}").to_string(), r"a\nb\u{1b}[2J\u{2028}");
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        let shown = Excerpt("é".repeat(MOST)).to_string();
        assert_eq!(shown, format!("{} ...", "é".repeat(MOST / 2)));
        assert!(Excerpt("\0".repeat(MOST)).to_string().len() <= MOST + 4);
    }
}
