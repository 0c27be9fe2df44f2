//! The kernels on aarch64: their battery is built for it and runs on an emulated CPU.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tercet_tests::{tool, workspace};

const TARGET: &str = "aarch64-unknown-linux-gnu";

/// A CPU by its name in the emulator, and the instruction sets of ours that it has.
const CPUS: &[(&str, &[&str])] = &[
    ("max", &["neon", "dotprod", "i8mm"]),
    ("neoverse-n1", &["neon", "dotprod"]),
    ("cortex-a53", &["neon"]),
];

/// Builds the battery; returns its program.
fn build(rustc: &Path, linker: &Path) -> PathBuf {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command
        .current_dir(workspace())
        .args(["test", "--locked", "--quiet", "--package=tercet-kernels", "--test=battery"])
        .args(["--no-run", "--message-format=json", "--target", TARGET])
        // Another compiler's work must not replace what the other tests are made of.
        .arg("--target-dir")
        .arg(workspace().join("target/aarch64"))
        .env("RUSTC", rustc)
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", linker)
        // A program that needs no library of the other architecture.
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    let output = command.output().expect("cargo runs");
    let messages = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "building failed:\n{messages}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let program = messages.lines().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        message["executable"].as_str().map(PathBuf::from)
    });
    program.unwrap_or_else(|| panic!("cargo names no program:\n{messages}"))
}

/// Runs tests of the battery on an emulated CPU; returns what it prints.
fn run(qemu: &Path, cpu: &str, battery: &Path, tests: &[&str]) -> String {
    let output = Command::new(qemu)
        .args(["-cpu", cpu])
        .arg(battery)
        .args(tests)
        .env("TERCET_EMULATED_CPU", "1")
        .env("PROPTEST_CASES", "8")
        .output()
        .expect("the emulator runs");
    let mut printed = String::from_utf8_lossy(&output.stdout).into_owned();
    printed.push_str(&String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "the battery failed on {cpu}:\n{printed}");
    printed
}

#[test]
fn the_kernel_battery_passes_on_aarch64() {
    let (Some(rustc), Some(linker), Some(qemu)) =
        (tool("aarch64-rustc"), tool("aarch64-gcc"), tool("qemu-aarch64"))
    else {
        return;
    };
    let battery = build(&rustc, &linker);
    for (cpu, has) in CPUS {
        // Every test where there is every variant. On the others, that each is found and runs.
        let tests: &[&str] =
            if has.len() == 3 { &[] } else { &["report::", "nan_and_infinity", "worst_sums"] };
        let printed = run(&qemu, cpu, &battery, tests);
        let passed = printed.lines().filter(|line| line.ends_with("... ok")).count();
        assert!(
            passed >= if tests.is_empty() { 25 } else { 3 },
            "{passed} tests on {cpu}:\n{printed}"
        );
        for isa in ["neon", "dotprod", "i8mm"] {
            let expected = if has.contains(&isa) {
                format!("RAN: {isa}, on this CPU")
            } else {
                format!("NOT RUN: {isa}")
            };
            assert!(
                printed.lines().any(|line| line == expected),
                "no {expected:?} on {cpu}:\n{printed}"
            );
        }
    }
}
