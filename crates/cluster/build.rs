//! Compiles the etcd v3 stubs in `proto/etcd` with protox, so that building needs no `protoc`.

use std::error::Error;

/// Root that imports in the proto files are relative to.
const INCLUDE: &str = "../../proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={INCLUDE}/etcd");
    println!("cargo::rerun-if-changed=build.rs");
    let descriptors =
        protox::compile(["etcd/auth.proto", "etcd/kv.proto", "etcd/rpc.proto"], [INCLUDE])?;
    tonic_prost_build::configure()
        // What tests put in etcd's place.
        .server_mod_attribute(".", "#[cfg(test)]")
        // Connections are made in one place, with timeouts and keepalive.
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
