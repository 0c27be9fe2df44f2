//! Which crate may know which: the direction of dependencies.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};
use tercet_tests::workspace;

/// What each crate may use of the others, in the order of the layers.
const MAY_USE: &[(&str, &[&str])] = &[
    ("kernels", &[]),
    ("text", &[]),
    ("proto", &[]),
    ("telemetry", &[]),
    ("engine", &["kernels", "text"]),
    ("client", &["proto"]),
    ("cluster", &["proto"]),
    ("worker", &["cluster", "engine", "proto", "telemetry", "text"]),
    ("gateway", &["cluster", "proto", "telemetry", "text"]),
    (
        "cli",
        &[
            "client",
            "cluster",
            "engine",
            "gateway",
            "kernels",
            "proto",
            "telemetry",
            "text",
            "worker",
        ],
    ),
    (
        "tests",
        &[
            "client",
            "cluster",
            "engine",
            "gateway",
            "kernels",
            "proto",
            "telemetry",
            "text",
            "worker",
        ],
    ),
    ("fuzz", &["engine", "proto", "tests", "text"]),
];

/// What must not be in a crate's binary by any way, and why not.
const KEEPS_OUT: &[(&str, &[&str], &str)] = &[
    ("kernels", &["libc", "rayon", "tokio", "tracing"], "arithmetic needs no system"),
    ("text", &["hyper", "memmap2", "prost", "tokio", "tonic"], "it is pure"),
    ("engine", &["hyper", "prost", "tokio", "tonic"], "compute threads never await"),
    ("proto", &["clap", "tracing-subscriber"], "clients use it too"),
    (
        "gateway",
        &["memmap2", "safetensors", "tercet-engine", "tercet-kernels", "tercet-worker"],
        "it has no model",
    ),
    ("worker", &["clap", "tercet-gateway"], "the cli wires"),
];

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(workspace().join("Cargo.toml"))
        .other_options(["--locked".to_owned()])
        .exec()
        .expect("cargo describes the workspace")
}

#[test]
fn crates_depend_downwards_only() {
    let metadata = metadata();
    let allowed: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    for package in metadata.workspace_packages() {
        let directory = package.manifest_path.parent().and_then(|path| path.file_name());
        let name = directory.expect("a package has a directory");
        assert_eq!(package.name.as_str(), format!("tercet-{name}"), "package and directory");
        let may_use = allowed.get(name).unwrap_or_else(|| panic!("{name} has no row in MAY_USE"));
        seen.insert(name);
        for dependency in &package.dependencies {
            let Some(used) = dependency.name.strip_prefix("tercet-") else { continue };
            // A crate's own tests may turn on its features.
            if used != name && !may_use.contains(&used) {
                wrong.push(format!("{name} -> {used}"));
            }
        }
    }
    assert_eq!(wrong, [""; 0], "dependencies that MAY_USE does not have");
    let rows: BTreeSet<&str> = allowed.into_keys().collect();
    assert_eq!(rows, seen, "rows of MAY_USE and crates of the workspace");
}

#[test]
fn crates_stay_free_of_what_they_keep_out() {
    let metadata = metadata();
    for &(name, kept_out, reason) in KEEPS_OUT {
        let inside = closure(&metadata, &format!("tercet-{name}"));
        let wrong: Vec<_> = kept_out.iter().filter(|kept| inside.contains(**kept)).collect();
        assert!(wrong.is_empty(), "{name} contains {wrong:?}, but {reason}");
    }
    // A resolver that found nothing would find nothing wrong.
    assert!(closure(&metadata, "tercet-worker").contains("tonic"));
}

#[test]
fn kernels_need_nothing_from_outside() {
    assert_eq!(closure(&metadata(), "tercet-kernels"), BTreeSet::new());
}

/// Returns the names of all packages that are compiled into a package.
fn closure(metadata: &Metadata, root: &str) -> BTreeSet<String> {
    let graph = metadata.resolve.as_ref().expect("metadata has a resolved graph");
    let nodes: BTreeMap<&PackageId, _> = graph.nodes.iter().map(|node| (&node.id, node)).collect();
    let packages = metadata.workspace_packages();
    let start = packages.iter().find(|package| package.name == root);
    let mut open = vec![&start.unwrap_or_else(|| panic!("no package {root}")).id];
    let mut found = BTreeSet::new();
    while let Some(id) = open.pop() {
        for dependency in &nodes[id].deps {
            let compiled = |kind: &cargo_metadata::DepKindInfo| kind.kind == DependencyKind::Normal;
            let name = metadata[&dependency.pkg].name.to_string();
            if dependency.dep_kinds.iter().any(compiled) && found.insert(name) {
                open.push(&dependency.pkg);
            }
        }
    }
    found
}
