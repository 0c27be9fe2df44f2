//! The `tojson` filter: Python's `json.dumps(value, ensure_ascii=False)`.

use std::io;

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind},
};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

use super::BYTES_PER_FUEL;

/// Writes a value as JSON, on one line or with `indent` spaces a level.
#[expect(clippy::needless_pass_by_value, reason = "the shape of a filter")]
pub(super) fn tojson(
    state: &State<'_, '_>,
    value: Value,
    options: Kwargs,
) -> Result<String, Error> {
    super::metered::pay(state, &value)?;
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        // Python ends the lines of indented items without a space.
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => {
            let message = "tojson takes two separators, of items and of keys";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    };
    let indent = indent.map(|width| " ".repeat(width.min(MAX_INDENT)));
    let formatter = Python { item, key, indent: indent.as_deref(), depth: 0, filled: false };
    let mut out = Metered { state, bytes: Vec::new(), unpaid: 0 };
    let written = if sort_keys == Some(true) {
        sorted(&value, 0).and_then(|value| {
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter)).map_err(failed)
        })
    } else {
        value.serialize(&mut Serializer::with_formatter(&mut out, formatter)).map_err(failed)
    };
    if let Err(error) = written {
        // Fuel once gone stays gone; this repeats the engine's own error.
        state.consume_fuel(1)?;
        return Err(error);
    }
    let text = String::from_utf8(out.bytes).map_err(failed)?;
    Ok(if ensure_ascii == Some(true) { ascii(&text) } else { text })
}

#[expect(clippy::needless_pass_by_value, reason = "the shape `map_err` wants")]
fn failed(error: impl ToString) -> Error {
    Error::new(ErrorKind::BadSerialization, error.to_string())
}

/// Escapes the characters outside ASCII, which occur in strings only.
fn ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

/// Bytes that cost fuel as they are written: a value may share its parts, and so be exponentially
/// longer written out than it was to build.
struct Metered<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    bytes: Vec<u8>,
    /// How many of the last `bytes` have not been paid for.
    unpaid: u64,
}

impl io::Write for Metered<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        self.unpaid += bytes.len() as u64;
        let due = self.unpaid / BYTES_PER_FUEL;
        if due > 0 {
            self.unpaid %= BYTES_PER_FUEL;
            self.state.consume_fuel(due).map_err(io::Error::other)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Python's way of writing, which refuses to go too deep, since serializing recurses on the stack.
struct Python<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<&'a str>,
    depth: usize,
    /// Whether the innermost container has something in it.
    filled: bool,
}

impl Python<'_> {
    fn open<W: ?Sized + io::Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(io::Error::other(too_deep()));
        }
        self.filled = false;
        w.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(w)?;
        }
        self.filled = true;
        w.write_all(bracket)
    }

    fn next<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if !first {
            w.write_all(self.item.as_bytes())?;
        }
        self.filled = true;
        self.line(w)
    }

    fn line<W: ?Sized + io::Write>(&self, w: &mut W) -> io::Result<()> {
        let Some(indent) = self.indent else { return Ok(()) };
        w.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| w.write_all(indent.as_bytes()))
    }
}

impl Formatter for Python<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.next(w, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.next(w, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(self.key.as_bytes())
    }
}

/// Returns the value with the keys of all objects in order.
fn sorted(value: &Value, depth: usize) -> Result<Value, Error> {
    if depth > MAX_DEPTH {
        return Err(failed(too_deep()));
    }
    match value.kind() {
        ValueKind::Map => {
            let mut entries = Vec::new();
            for key in value.try_iter()? {
                entries.push((key.to_string(), sorted(&value.get_item(&key)?, depth + 1)?));
            }
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            Ok(Value::from_pairs(entries))
        }
        ValueKind::Seq => value.try_iter()?.map(|item| sorted(&item, depth + 1)).collect(),
        _ => Ok(value.clone()),
    }
}

fn too_deep() -> String {
    format!("value is nested too deeply: expected at most {MAX_DEPTH} levels")
}

/// The widest indentation; wider ones are a mistake in the template or worse.
const MAX_INDENT: usize = 16;
/// The deepest nesting; as deep as `serde_json` reads.
const MAX_DEPTH: usize = 128;
