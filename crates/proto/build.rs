//! Compiles `proto/tercet/v1` with protox, so that building needs no `protoc`.

use std::path::{Path, PathBuf};
use std::{env, error::Error, fs};

/// Root that imports in the proto files are relative to.
const INCLUDE: &str = "../../proto";
/// The package compiled here, below [`INCLUDE`].
const PACKAGE: &str = "tercet/v1";

fn main() -> Result<(), Box<dyn Error>> {
    let package = Path::new(INCLUDE).join(PACKAGE);
    // The directory covers files that appear later; cargo looks at everything below it.
    println!("cargo::rerun-if-changed={}", package.display());
    println!("cargo::rerun-if-changed=build.rs");

    let mut files = fs::read_dir(&package)
        .map_err(|error| format!("list {}: {error}", package.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<PathBuf>, _>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "proto"));
    // Directory order differs between machines; generated code must not.
    files.sort();

    let mut compiler = protox::Compiler::new([INCLUDE])?;
    compiler.include_imports(true).include_source_info(true).open_files(&files)?;

    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("tercet.bin");
    fs::write(&descriptors, compiler.encode_file_descriptor_set())?;

    tonic_prost_build::configure()
        // No `Client::connect(address)`: it would collide with the rpc `Pipeline.Connect`, and
        // callers configure their channels (keepalive, timeouts) anyway.
        .build_transport(false)
        // Activations pass through megabytes at a time: sliced from the receive buffer, not copied.
        .bytes(".tercet.v1.Step.activations")
        // One order, so that equal requests are equal bytes.
        .btree_map(".tercet.v1")
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
