//! The `tojson` filter: Python's `json.dumps(value, ensure_ascii=False)`.

use std::io;

use minijinja::{Error, ErrorKind, State, Value, value::Kwargs};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::BYTES_PER_FUEL;

/// Writes a value as JSON, on one line or with `indent` spaces a level.
#[expect(clippy::needless_pass_by_value, reason = "the shape of a filter")]
pub(super) fn tojson(
    state: &State<'_, '_>,
    value: Value,
    options: Kwargs,
) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Python's default is to escape non-ASCII characters, the one of transformers is not to; no
    // template asks for anything else.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Metered { state, bytes: Vec::new(), unpaid: 0 };
    let written = match indent {
        None => {
            let formatter = Nested { inner: Spaced, depth: 0 };
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter))
        }
        Some(width) => {
            let indent = " ".repeat(width.min(MAX_INDENT));
            let inner = PrettyFormatter::with_indent(indent.as_bytes());
            let formatter = Nested { inner, depth: 0 };
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter))
        }
    };
    if let Err(error) = written {
        // Fuel once gone stays gone; this repeats the engine's own error.
        state.consume_fuel(1)?;
        return Err(Error::new(ErrorKind::BadSerialization, error.to_string()));
    }
    String::from_utf8(out.bytes)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
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

/// Python's separators: `, ` and `: `.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

/// A formatter that refuses to go too deep, since serializing recurses on the stack.
struct Nested<F> {
    inner: F,
    depth: usize,
}

impl<F> Nested<F> {
    fn enter(&mut self) -> io::Result<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            let message =
                format!("value is nested too deeply: expected at most {MAX_DEPTH} levels");
            return Err(io::Error::other(message));
        }
        Ok(())
    }
}

impl<F: Formatter> Formatter for Nested<F> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.enter()?;
        self.inner.begin_array(w)
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.depth -= 1;
        self.inner.end_array(w)
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.inner.begin_array_value(w, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.inner.end_array_value(w)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.enter()?;
        self.inner.begin_object(w)
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.depth -= 1;
        self.inner.end_object(w)
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.inner.begin_object_key(w, first)
    }

    fn end_object_key<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.inner.end_object_key(w)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.inner.begin_object_value(w)
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.inner.end_object_value(w)
    }
}

/// The widest indentation; wider ones are a mistake in the template or worse.
const MAX_INDENT: usize = 16;
/// The deepest nesting; as deep as `serde_json` reads.
const MAX_DEPTH: usize = 128;
