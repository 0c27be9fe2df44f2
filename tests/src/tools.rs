//! Where the checkout and the installed real parts are.

use std::{
    env,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

/// Returns the root of the checkout.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the workspace")
}

/// Returns the path of a real part that `tests/tools/install` installs.
///
/// Where it is missing, ends the test as [`did_not_run`] does, so a caller returns on `None`.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = workspace().join("target/tools/bin").join(name);
    if path.exists() {
        return Some(path);
    }
    did_not_run(&format!("{name} is not in target/tools/bin: run tests/tools/install"));
    None
}

/// Returns a command that runs a Python program of the checkout with the installed packages, of
/// which it imports `package`.
///
/// Where that is missing, ends the test as [`did_not_run`] does, so a caller returns on `None`.
pub fn python(program: &str, package: &str) -> Option<Command> {
    let packages = workspace().join("target/tools/python");
    if !packages.join(package).exists() {
        did_not_run(&format!("{package} is not in target/tools/python: run tests/tools/install"));
        return None;
    }
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", packages).arg(workspace().join(program));
    Some(command)
}

/// Tells that the calling test did not run, and why.
///
/// # Panics
///
/// Panics if `TERCET_REQUIRE_TOOLS` is 1, as under `tests/run`: there nothing may be missing.
pub fn did_not_run(reason: &str) {
    assert!(env::var_os("TERCET_REQUIRE_TOOLS").is_none_or(|value| value != "1"), "{reason}");
    tell("DID NOT RUN", reason);
}

/// Tells what the calling test measures, or what repeats it.
pub fn measured(what: &str) {
    tell("MEASURED", what);
}

fn tell(kind: &str, what: &str) {
    let thread = thread::current();
    let test = thread.name().unwrap_or("a test");
    // Not through `eprintln`: the test harness keeps that to itself when a test passes. Where even
    // standard error is gone, nobody is there to be told.
    _ = writeln!(io::stderr(), "{kind}: {test}: {what}");
}

/// Returns whether the long tests are asked for, as by `tests/run --full`.
pub fn full() -> bool {
    env::var_os("TERCET_FULL").is_some_and(|value| value == "1")
}
