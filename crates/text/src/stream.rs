//! From the ids of an answer, one at a time, to the text that may be shown.

use std::sync::Arc;

use crate::Tokenizer;

/// The text one token released.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Piece {
    /// Text that follows what was released before; often empty, sometimes several tokens' worth.
    pub text: String,
    /// The place in the list of the stop string that ended the text, if one has.
    pub stopped: Option<usize>,
}

/// Releases the text of a stream of ids: never half a character, never (part of) a stop string.
///
/// The text of ids is the lossy UTF-8 reading of their bytes put together: each maximal invalid
/// sequence is one U+FFFD, as in [`String::from_utf8_lossy`]. It ends before the stop string that is
/// complete first; where two end at the same character, the longer one counts. What has been
/// released after `n` ids depends on these ids alone: everything except the longest tail that could
/// still become a stop string or the rest of a character.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    stops: Vec<Stop>,
    /// The start of a character whose rest has not come yet; at most three bytes.
    partial: Vec<u8>,
    /// Text not released yet: the longest tail that is the start of a stop string.
    withheld: String,
    stopped: Option<usize>,
}

impl StreamDecoder {
    /// Returns a decoder at the start of an answer. Empty stop strings never match.
    pub fn new(tokenizer: Arc<Tokenizer>, stops: Vec<String>) -> Self {
        let stops = stops.into_iter().map(|stop| Stop::new(stop.into_bytes())).collect();
        Self { tokenizer, stops, partial: Vec::new(), withheld: String::new(), stopped: None }
    }

    /// Takes the next id and returns the text it releases. Once a stop string is complete, further
    /// ids release nothing.
    pub fn push(&mut self, id: u32) -> Piece {
        let mut text = String::new();
        if self.stopped.is_none() {
            let tokenizer = Arc::clone(&self.tokenizer);
            let mut bytes = std::mem::take(&mut self.partial);
            bytes.extend_from_slice(tokenizer.token_bytes(id));
            self.read(&bytes, &mut text);
        }
        Piece { text, stopped: self.stopped }
    }

    /// Ends the answer and returns the text that was withheld, an unfinished character as U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        if self.stopped.is_none() && !std::mem::take(&mut self.partial).is_empty() {
            self.advance("\u{fffd}", &mut text);
        }
        text.push_str(&std::mem::take(&mut self.withheld));
        // A further push would be a new text; the stops must not remember the old one.
        for stop in &mut self.stops {
            stop.matched = 0;
        }
        text
    }

    /// Reads whole characters and keeps the unfinished one at the end.
    fn read(&mut self, mut bytes: &[u8], out: &mut String) {
        while self.stopped.is_none() && !bytes.is_empty() {
            let error = match std::str::from_utf8(bytes) {
                Ok(text) => return self.advance(text, out),
                Err(error) => error,
            };
            let (valid, rest) = bytes.split_at(error.valid_up_to());
            self.advance(std::str::from_utf8(valid).unwrap_or_default(), out);
            let Some(invalid) = error.error_len() else {
                self.partial = rest.to_vec();
                return;
            };
            self.advance("\u{fffd}", out);
            bytes = &rest[invalid..];
        }
    }

    /// Adds text, releasing what no stop string can reach any more.
    fn advance(&mut self, text: &str, out: &mut String) {
        if self.stopped.is_some() {
            return;
        }
        if self.stops.is_empty() {
            out.push_str(text);
            return;
        }
        for c in text.chars() {
            self.withheld.push(c);
            let mut utf8 = [0; 4];
            let utf8 = c.encode_utf8(&mut utf8).as_bytes();
            let mut complete: Option<usize> = None;
            let mut longest = 0;
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.advance(utf8) && stop.bytes.len() > longest {
                    longest = stop.bytes.len();
                    complete = Some(index);
                }
            }
            if complete.is_some() {
                self.withheld.truncate(self.withheld.len() - longest);
                out.push_str(&std::mem::take(&mut self.withheld));
                self.stopped = complete;
                return;
            }
            let tail = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
            out.extend(self.withheld.drain(..self.withheld.len() - tail));
        }
    }
}

/// A stop string and how much of it the text ends with (Knuth, Morris and Pratt).
#[derive(Clone, Debug)]
struct Stop {
    bytes: Vec<u8>,
    /// For each length of a matched start: the next shorter start that the text ends with as well.
    shorter: Vec<usize>,
    /// The length of the longest start of this string that the text ends with.
    matched: usize,
}

impl Stop {
    fn new(bytes: Vec<u8>) -> Self {
        let mut shorter = vec![0; bytes.len() + 1];
        let mut length = 0;
        for (i, byte) in bytes.iter().enumerate().skip(1) {
            while length > 0 && bytes[length] != *byte {
                length = shorter[length];
            }
            length += usize::from(bytes[length] == *byte);
            shorter[i + 1] = length;
        }
        Self { bytes, shorter, matched: 0 }
    }

    /// Takes one character and returns whether the text now ends with the whole string.
    ///
    /// Bytes will do: a match in UTF-8 starts and ends at characters.
    fn advance(&mut self, utf8: &[u8]) -> bool {
        if self.bytes.is_empty() {
            return false;
        }
        for byte in utf8 {
            while self.matched > 0 && self.bytes[self.matched] != *byte {
                self.matched = self.shorter[self.matched];
            }
            self.matched += usize::from(self.bytes[self.matched] == *byte);
        }
        self.matched == self.bytes.len()
    }
}

#[cfg(test)]
mod tests;
