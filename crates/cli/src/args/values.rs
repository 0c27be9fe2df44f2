//! Values people write: layer ranges, sizes, times.

use std::{ops::Range, path::PathBuf, time::Duration};

/// A half-open range of layers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Layers(pub(crate) Range<usize>);

/// A number of bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct ByteSize(pub(crate) usize);

/// A model to serve, as in `[NAME=]PATH[,kv=SIZE]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct ServedModel {
    pub(crate) path: PathBuf,
    /// Its name in requests.
    pub(crate) name: Option<String>,
    /// Its part of the KV memory.
    pub(crate) kv_memory: Option<ByteSize>,
}

/// Reads `[NAME=]PATH[,kv=SIZE]`. What stands before the first `=` is a name unless it holds a `/`.
pub(super) fn served_model(text: &str) -> Result<ServedModel, String> {
    let expected = "expected [NAME=]PATH[,kv=SIZE], such as chat=models/chat.gguf,kv=2GiB";
    let (text, kv_memory) = match text.rsplit_once(",kv=") {
        Some((text, size)) => (text, Some(byte_size(size)?)),
        None => (text, None),
    };
    let (name, path) = match text.split_once('=') {
        Some((name, path)) if !name.contains('/') => (Some(name), path),
        _ => (None, text),
    };
    if path.is_empty() || name.is_some_and(str::is_empty) {
        return Err(expected.to_owned());
    }
    Ok(ServedModel { path: path.into(), name: name.map(str::to_owned), kv_memory })
}

/// Reads `A..B`.
pub(super) fn layers(text: &str) -> Result<Layers, String> {
    let expected = "expected A..B with A below B, such as 0..15 for the layers 0 to 14";
    let (start, end) = text.split_once("..").ok_or(expected)?;
    let number = |text: &str| text.parse::<usize>().map_err(|_| expected);
    let range = number(start)?..number(end)?;
    if range.is_empty() { Err(expected.to_owned()) } else { Ok(Layers(range)) }
}

/// Reads a number of bytes with an optional unit.
pub(super) fn byte_size(text: &str) -> Result<ByteSize, String> {
    let expected = "expected a whole number of bytes, such as 512MiB, 4GiB or 1000000";
    let (number, unit) = split_unit(text);
    let factor: usize = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return Err(expected.to_owned()),
    };
    let number: usize = number.parse().map_err(|_| expected)?;
    number.checked_mul(factor).map(ByteSize).ok_or_else(|| expected.to_owned())
}

/// Reads a time with a unit.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let expected = "expected a whole number with a unit, such as 500ms, 30s or 5m";
    let (number, unit) = split_unit(text);
    let number: u64 = number.parse().map_err(|_| expected)?;
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs).ok_or_else(|| expected.to_owned()),
        _ => Err(expected.to_owned()),
    }
}

/// Reads a temperature.
pub(super) fn temperature(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number: &f32| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a finite number of at least 0".to_owned())
}

/// Reads a probability above zero.
pub(super) fn fraction(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number: &f32| *number > 0.0 && *number <= 1.0);
    number.ok_or_else(|| "expected a number above 0 and at most 1".to_owned())
}

/// Reads a probability.
pub(super) fn share(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number: &f32| (0.0..=1.0).contains(number));
    number.ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

/// Reads how many times as long something may take.
pub(super) fn stretch(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 1.0);
    number.ok_or_else(|| "expected a finite number above 1".to_owned())
}

/// Reads a repetition penalty.
pub(super) fn factor(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number: &f32| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "expected a finite number above 0".to_owned())
}

/// Reads a frequency or presence penalty.
pub(super) fn penalty(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number: &f32| (-2.0..=2.0).contains(number));
    number.ok_or_else(|| "expected a number from -2 to 2".to_owned())
}

/// Reads `ID=BIAS`.
pub(super) fn bias(text: &str) -> Result<(u32, f32), String> {
    let expected = "expected a token and a number from -100 to 100, such as 42=-100";
    let (id, bias) = text.split_once('=').ok_or(expected)?;
    let bias: f32 = bias.parse().map_err(|_| expected)?;
    if !(-100.0..=100.0).contains(&bias) {
        return Err(expected.to_owned());
    }
    Ok((id.parse().map_err(|_| expected)?, bias))
}

/// Splits a number from what follows it.
fn split_unit(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_ranges() {
        assert_eq!(layers("0..15"), Ok(Layers(0..15)));
        assert_eq!(layers("7..8"), Ok(Layers(7..8)));
        for wrong in
            ["", "3", "..", "0..", "..4", "4..4", "5..2", "0..=3", "-1..3", "a..b", "0...3"]
        {
            assert!(layers(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn served_models() {
        let model = |path: &str, name: Option<&str>, kv: Option<usize>| {
            let (name, kv_memory) = (name.map(str::to_owned), kv.map(ByteSize));
            Ok(ServedModel { path: path.into(), name, kv_memory })
        };
        assert_eq!(served_model("a.gguf"), model("a.gguf", None, None));
        assert_eq!(served_model("a=b.gguf"), model("b.gguf", Some("a"), None));
        assert_eq!(served_model("./a=b.gguf"), model("./a=b.gguf", None, None));
        assert_eq!(served_model("x=./a=b.gguf"), model("./a=b.gguf", Some("x"), None));
        let expected = model("/m/b,c.gguf", Some("a"), Some(2 << 30));
        assert_eq!(served_model("a=/m/b,c.gguf,kv=2GiB"), expected);
        for wrong in ["", "=a.gguf", "a=", "a.gguf,kv=", "a.gguf,kv=much"] {
            assert!(served_model(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(byte_size("1000000"), Ok(ByteSize(1_000_000)));
        assert_eq!(byte_size("512MiB"), Ok(ByteSize(512 << 20)));
        assert_eq!(byte_size("4 GiB"), Ok(ByteSize(4 << 30)));
        assert_eq!(byte_size("2GB"), Ok(ByteSize(2_000_000_000)));
        for wrong in ["", "MiB", "1.5GiB", "-1", "1TiB!", "99999999999999999999", "99999999999GiB"]
        {
            assert!(byte_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "30", "s", "1.5s", "-1s", "1h", "99999999999999999999m"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sampling_values() {
        assert_eq!(temperature("0.7"), Ok(0.7));
        assert!(temperature("-0.1").is_err() && temperature("NaN").is_err());
        assert_eq!(fraction("1"), Ok(1.0));
        assert!(fraction("0").is_err() && fraction("1.1").is_err() && fraction("NaN").is_err());
        assert_eq!((share("0"), share("1")), (Ok(0.0), Ok(1.0)));
        assert!(share("-0.1").is_err() && share("1.1").is_err() && share("NaN").is_err());
        assert_eq!(stretch("1.6"), Ok(1.6));
        assert!(stretch("1").is_err() && stretch("inf").is_err() && stretch("NaN").is_err());
        assert_eq!(factor("1.1"), Ok(1.1));
        assert!(factor("0").is_err() && factor("inf").is_err() && factor("NaN").is_err());
        assert_eq!(penalty("-2"), Ok(-2.0));
        assert!(penalty("2.1").is_err() && penalty("NaN").is_err());
        assert_eq!(bias("42=-100"), Ok((42, -100.0)));
        for wrong in ["", "42", "42=", "=1", "-1=1", "42=101", "42=NaN"] {
            assert!(bias(wrong).is_err(), "{wrong}");
        }
    }
}
