//! The caller's deadline, `grpc-timeout` in the metadata of a request.

use std::time::Duration;

use tonic::metadata::MetadataMap;

/// Returns how long the caller of a request waits; `None` if it set no bound or an unreadable one.
///
/// tonic itself enforces the bound only until the response headers: whoever streams must watch it.
pub fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    // The grammar: 1 to 8 ASCII digits and one unit letter.
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Duration> {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", text.parse().unwrap());
        timeout(&metadata)
    }

    #[test]
    fn reads_every_unit() {
        assert_eq!(read("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(read("3M"), Some(Duration::from_secs(180)));
        assert_eq!(read("4S"), Some(Duration::from_secs(4)));
        assert_eq!(read("5m"), Some(Duration::from_millis(5)));
        assert_eq!(read("6u"), Some(Duration::from_micros(6)));
        assert_eq!(read("99999999n"), Some(Duration::from_nanos(99_999_999)));
    }

    #[test]
    fn reads_what_tonic_writes() {
        let mut request = tonic::Request::new(());
        request.set_timeout(Duration::from_secs(90));
        assert_eq!(timeout(request.metadata()), Some(Duration::from_secs(90)));
    }

    #[test]
    fn ignores_what_is_no_timeout() {
        for text in ["", "S", "1", "123456789S", "1s", "-1S", "+1S", "1 S", "1µ"] {
            let mut metadata = MetadataMap::new();
            let Ok(value) = text.parse() else { continue };
            metadata.insert("grpc-timeout", value);
            assert_eq!(timeout(&metadata), None, "{text:?}");
        }
        assert_eq!(timeout(&MetadataMap::new()), None);
    }
}
