//! Memory of this process, as the system counts it.

use std::fs;

/// Returns the bytes in memory now, files that are mapped included.
pub(super) fn resident_bytes() -> Option<u64> {
    counted("VmRSS")
}

/// Returns the most bytes there have been in memory.
pub(super) fn peak_bytes() -> Option<u64> {
    counted("VmHWM")
}

fn counted(name: &str) -> Option<u64> {
    parse(&fs::read_to_string("/proc/self/status").ok()?, name)
}

fn parse(status: &str, name: &str) -> Option<u64> {
    let value = |line: &'_ str| {
        let kib = line.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix("kB")?;
        kib.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    status.lines().find_map(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_in_the_status() {
        let status = "Name:\ttercet\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(parse(status, "VmRSS"), Some(1 << 20));
        assert_eq!(parse(status, "VmHWM"), Some(2 << 20));
        assert_eq!(parse(status, "Vm"), None);
        assert_eq!(parse("VmRSS: many kB", "VmRSS"), None);
    }
}
