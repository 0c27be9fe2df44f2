//! Bounds-checked reading of GGUF primitives and metadata values.

use crate::model_file::error::ModelError;

/// Arrays inside arrays are read to this depth; no known file nests at all.
const MAX_DEPTH: usize = 4;

/// Type numbers of metadata values.
pub(crate) mod kinds {
    pub(crate) const U8: u32 = 0;
    pub(crate) const I8: u32 = 1;
    pub(crate) const U16: u32 = 2;
    pub(crate) const I16: u32 = 3;
    pub(crate) const U32: u32 = 4;
    pub(crate) const I32: u32 = 5;
    pub(crate) const F32: u32 = 6;
    pub(crate) const BOOL: u32 = 7;
    pub(crate) const STRING: u32 = 8;
    pub(crate) const ARRAY: u32 = 9;
    pub(crate) const U64: u32 = 10;
    pub(crate) const I64: u32 = 11;
    pub(crate) const F64: u32 = 12;
}

/// A position in a file's bytes; every read is checked against the end.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
    label: &'a str,
}

impl<'a> Cursor<'a> {
    /// Starts at the first byte.
    pub(crate) fn new(bytes: &'a [u8], label: &'a str) -> Self {
        Self { bytes, position: 0, label }
    }

    /// Returns the file's name for messages.
    pub(crate) fn label(&self) -> &'a str {
        self.label
    }

    /// Returns the bytes read so far.
    pub(crate) fn position(&self) -> u64 {
        self.position as u64
    }

    /// Returns the next `length` bytes; `what` names them in the error.
    pub(crate) fn take(&mut self, length: u64, what: &str) -> Result<&'a [u8], ModelError> {
        let rest = &self.bytes[self.position..];
        match usize::try_from(length).ok().and_then(|length| rest.get(..length)) {
            Some(taken) => {
                self.position += taken.len();
                Ok(taken)
            }
            None => Err(ModelError::damaged(
                self.label,
                format!(
                    "{what} takes {length} bytes at {}, but the file ends at {}",
                    self.position,
                    self.bytes.len()
                ),
            )),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let bytes = self.take(N as u64, what)?;
        Ok(bytes.try_into().expect("take returned N bytes"))
    }

    /// Reads a u32.
    pub(crate) fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    /// Reads a u64.
    pub(crate) fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Reads a string.
    pub(crate) fn string(&mut self, what: &str) -> Result<&'a str, ModelError> {
        let length = self.u64(what)?;
        let start = self.position;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|error| {
            ModelError::damaged(self.label, format!("{what} at {start} is not UTF-8: {error}"))
        })
    }

    /// Refuses a count that could not fit in the rest of the file at `minimum` bytes each.
    pub(crate) fn check_count(
        &self,
        what: &str,
        count: u64,
        minimum: u64,
    ) -> Result<(), ModelError> {
        let rest = (self.bytes.len() - self.position) as u64;
        if count > rest / minimum {
            let problem = format!(
                "it claims {count} {what}, but the {rest} bytes left hold at most {}",
                rest / minimum
            );
            return Err(ModelError::damaged(self.label, problem));
        }
        Ok(())
    }
}

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Any floating-point number; f32 is widened exactly.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    String(String),
    /// Text entries.
    Strings(Vec<String>),
    /// Integer entries.
    Integers(Vec<i64>),
    /// Floating-point entries.
    Floats(Vec<f32>),
    /// An array of another kind, which nothing here reads: its element type and length.
    Other(u32, u64),
}

impl Value {
    /// Reads the value of `key`.
    pub(crate) fn read(cursor: &mut Cursor<'_>, kind: u32, key: &str) -> Result<Self, ModelError> {
        let what = format!("the value of `{key}`");
        Ok(match kind {
            kinds::U8 => Self::Unsigned(u8::from_le_bytes(cursor.array(&what)?).into()),
            kinds::I8 => Self::Signed(i8::from_le_bytes(cursor.array(&what)?).into()),
            kinds::U16 => Self::Unsigned(u16::from_le_bytes(cursor.array(&what)?).into()),
            kinds::I16 => Self::Signed(i16::from_le_bytes(cursor.array(&what)?).into()),
            kinds::U32 => Self::Unsigned(cursor.u32(&what)?.into()),
            kinds::I32 => Self::Signed(i32::from_le_bytes(cursor.array(&what)?).into()),
            kinds::U64 => Self::Unsigned(cursor.u64(&what)?),
            kinds::I64 => Self::Signed(i64::from_le_bytes(cursor.array(&what)?)),
            kinds::F32 => Self::Float(f32::from_le_bytes(cursor.array(&what)?).into()),
            kinds::F64 => Self::Float(f64::from_le_bytes(cursor.array(&what)?)),
            kinds::BOOL => match cursor.array::<1>(&what)? {
                [0] => Self::Bool(false),
                [1] => Self::Bool(true),
                [other] => {
                    let problem = format!("{what} is the truth value {other}, expected 0 or 1");
                    return Err(ModelError::damaged(cursor.label(), problem));
                }
            },
            kinds::STRING => Self::String(cursor.string(&what)?.to_owned()),
            kinds::ARRAY => Self::read_array(cursor, &what, 0)?,
            other => return Err(unknown_kind(cursor, &what, other)),
        })
    }

    fn read_array(cursor: &mut Cursor<'_>, what: &str, depth: usize) -> Result<Self, ModelError> {
        let kind = cursor.u32(what)?;
        let count = cursor.u64(what)?;
        let width = match kind {
            kinds::U8 | kinds::I8 | kinds::BOOL => 1,
            kinds::U16 | kinds::I16 => 2,
            kinds::U32 | kinds::I32 | kinds::F32 => 4,
            kinds::U64 | kinds::I64 | kinds::F64 | kinds::STRING => 8,
            kinds::ARRAY => 12,
            other => return Err(unknown_kind(cursor, what, other)),
        };
        cursor.check_count(&format!("entries in {what}"), count, width)?;
        if kind == kinds::STRING {
            let strings = (0..count).map(|_| cursor.string(what).map(str::to_owned));
            return Ok(Self::Strings(strings.collect::<Result<_, _>>()?));
        }
        if kind == kinds::ARRAY {
            if depth == MAX_DEPTH {
                let problem = format!("{what} nests arrays deeper than {MAX_DEPTH}");
                return Err(ModelError::damaged(cursor.label(), problem));
            }
            for _ in 0..count {
                Self::read_array(cursor, what, depth + 1)?;
            }
            return Ok(Self::Other(kind, count));
        }
        let bytes = cursor.take(count * width, what)?;
        let wide = |c: &[u8]| -> [u8; 4] { c.try_into().expect("chunks of four") };
        Ok(match kind {
            kinds::I32 => Self::Integers(
                bytes.chunks_exact(4).map(|c| i32::from_le_bytes(wide(c)).into()).collect(),
            ),
            kinds::U32 => Self::Integers(
                bytes.chunks_exact(4).map(|c| u32::from_le_bytes(wide(c)).into()).collect(),
            ),
            kinds::F32 => {
                Self::Floats(bytes.chunks_exact(4).map(|c| f32::from_le_bytes(wide(c))).collect())
            }
            other => Self::Other(other, count),
        })
    }

    /// Returns an integer that is not negative.
    pub(crate) fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Returns a number.
    pub(crate) fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns text.
    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(value) => Some(value),
            _ => None,
        }
    }

    /// Returns a truth value.
    pub(crate) fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unsigned(value) => write!(f, "{value}"),
            Self::Signed(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::String(value) => write!(f, "\"{}\"", value.escape_debug()),
            Self::Strings(values) => write!(f, "an array of {} strings", values.len()),
            Self::Integers(values) => write!(f, "an array of {} integers", values.len()),
            Self::Floats(values) => write!(f, "an array of {} numbers", values.len()),
            Self::Other(kind, count) => write!(f, "an array of {count} values of type {kind}"),
        }
    }
}

fn unknown_kind(cursor: &Cursor<'_>, what: &str, kind: u32) -> ModelError {
    ModelError::damaged(cursor.label(), format!("{what} has type {kind}, expected 0 to 12"))
}
