//! The chart `helm/tercet` and its golden render in `k8s/`, by the real helm and real schemas.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tercet_tests::{Scratch, run, tool, workspace};

/// The oldest Kubernetes that Chart.yaml allows, and the newest that the schemas know.
const KUBERNETES: [&str; 2] = ["1.30", "1.35"];

fn chart() -> PathBuf {
    workspace().join("helm/tercet")
}

/// Returns the files of values that stand for the ways in which the chart is used.
fn values_files() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(chart().join("ci"))? {
        files.push(entry?.path());
    }
    files.sort();
    ensure!(files.len() >= 3, "ci/ has lost its files: {files:?}");
    Ok(files)
}

/// Renders the chart as release `tercet`.
fn render(helm: &Path, args: &[&str]) -> Result<String> {
    run(Command::new(helm).args(["template", "tercet"]).arg(chart()).args(args))
}

/// Renders the chart with one value set, which it must refuse, and returns its message.
fn refusal(helm: &Path, value: &str) -> Result<String> {
    match render(helm, &["--set", value]) {
        Ok(_) => anyhow::bail!("{value} was accepted"),
        Err(error) => Ok(error.to_string()),
    }
}

#[test]
fn every_use_lints() -> Result<()> {
    let Some(helm) = tool("helm") else { return Ok(()) };
    for file in values_files()? {
        run(Command::new(&helm).args(["lint", "--strict"]).arg(chart()).arg("--values").arg(file))?;
    }
    Ok(())
}

#[test]
fn misspelt_values_are_refused_by_name() -> Result<()> {
    let Some(helm) = tool("helm") else { return Ok(()) };
    let misspelt = [
        ("wrker.replicas=3", "", "wrker"),
        ("image.tagg=1", "/image", "tagg"),
        ("otlp.endpont=http://a:1", "/otlp", "endpont"),
        ("gateway.replica=3", "/gateway", "replica"),
        ("gateway.service.prt=1", "/gateway/service", "prt"),
        ("worker.thread=2", "/worker", "thread"),
        ("worker.model.pth=a", "/worker/model", "pth"),
        ("worker.resources.limit.cpu=1", "/worker/resources", "limit"),
        ("worker.resources.limits.cpus=1", "/worker/resources/limits", "cpus"),
        ("worker.tolerations[0].efect=NoSchedule", "/worker/tolerations/0", "efect"),
        ("etcd.bundeld=false", "/etcd", "bundeld"),
        ("etcd.image.repo=a", "/etcd/image", "repo"),
        ("serviceAccount.crate=true", "/serviceAccount", "crate"),
    ];
    for (value, place, name) in misspelt {
        let message = refusal(&helm, value)?;
        let told = format!("at '{place}': additional properties '{name}' not allowed");
        ensure!(message.contains(&told), "{value}: the message lacks {told:?}\n{message}");
    }
    Ok(())
}

#[test]
fn senseless_values_are_refused() -> Result<()> {
    let Some(helm) = tool("helm") else { return Ok(()) };
    let senseless = [
        ("worker.threads=0", "at '/worker/threads'"),
        ("worker.resources.limits.memory=4GB", "at '/worker/resources/limits/memory'"),
        ("worker.kvMemory=1G", "at '/worker/kvMemory'"),
        ("image.pullPolicy=always", "at '/image/pullPolicy'"),
        ("otlp.endpoint=collector:4317", "at '/otlp/endpoint'"),
        ("gateway.terminationGracePeriodSeconds=14", "at '/gateway/terminationGracePeriodSeconds'"),
        ("etcd.bundled=false", "list the URLs of your etcd in etcd.endpoints"),
        ("etcd.endpoints={http://a:2379}", "set etcd.bundled to false"),
        ("etcd.auth.secret=user", "the bundled etcd has neither TLS nor users"),
        ("etcd.tls.clientCertificate=true", "etcd.tls.secret is empty"),
        ("worker.model.path=a.gguf", "worker.model.claim is empty"),
        ("worker.model.claim=models", "worker.model.path is empty"),
    ];
    for (value, told) in senseless {
        let message = refusal(&helm, value)?;
        ensure!(message.contains(told), "{value}: the message lacks {told:?}\n{message}");
    }
    Ok(())
}

#[test]
fn manifests_satisfy_the_schemas_of_kubernetes() -> Result<()> {
    let Some(helm) = tool("helm") else { return Ok(()) };
    let Some(validate) = tool("kubernetes-validate") else { return Ok(()) };
    let scratch = Scratch::new("manifests")?;
    let mut rendered = Vec::new();
    for file in values_files()? {
        let name = file.file_name().context("a values file has a name")?;
        let manifests = scratch.path().join(name);
        fs::write(&manifests, render(&helm, &["--values", &file.to_string_lossy()])?)?;
        rendered.push(manifests);
    }
    for version in KUBERNETES {
        let mut command = Command::new(&validate);
        run(command.args(["--strict", "--kubernetes-version", version]).args(&rendered))?;
    }
    // A validator that accepts everything would have passed as well.
    let broken = scratch.path().join("broken.yaml");
    fs::write(&broken, render(&helm, &[])?.replace("readOnlyRootFilesystem", "readOnlyRoot"))?;
    let verdict = run(Command::new(&validate).arg("--strict").arg(&broken));
    let message = verdict.map_or_else(|error| error.to_string(), |_| String::new());
    ensure!(message.contains("readOnlyRoot"), "a misspelt field of a manifest passed: {message}");
    Ok(())
}

#[test]
fn golden_render_is_current() -> Result<()> {
    let Some(helm) = tool("helm") else { return Ok(()) };
    let golden = fs::read_to_string(workspace().join("k8s/tercet.yaml"))?;
    ensure!(
        golden == render(&helm, &["--skip-tests"])?,
        "k8s/tercet.yaml is not what the chart renders; look at the difference that this makes:\n\
         target/tools/bin/helm template tercet helm/tercet --skip-tests >k8s/tercet.yaml"
    );
    Ok(())
}

#[test]
fn plain_manifests_build() -> Result<()> {
    let Some(kubectl) = tool("kubectl") else { return Ok(()) };
    let built = run(Command::new(kubectl).arg("kustomize").arg(workspace().join("k8s")))?;
    let count = |line: &str| built.lines().filter(|found| *found == line).count();
    // Everything but the namespace itself is in the namespace.
    let namespaced = built.lines().filter(|line| line.starts_with("kind: ")).count() - 1;
    assert_eq!(count("kind: Deployment"), 3);
    assert_eq!(count("  namespace: tercet"), namespaced);
    Ok(())
}

#[test]
fn chart_has_the_version_of_the_workspace() -> Result<()> {
    let chart = fs::read_to_string(chart().join("Chart.yaml"))?;
    for key in ["version", "appVersion"] {
        let line = format!("{key}: {}", env!("CARGO_PKG_VERSION"));
        ensure!(chart.lines().any(|found| found == line), "Chart.yaml lacks {line:?}");
    }
    Ok(())
}

#[test]
fn every_value_is_documented() -> Result<()> {
    let schema = fs::read_to_string(chart().join("values.schema.json"))?;
    let readme = fs::read_to_string(chart().join("README.md"))?;
    let mut paths = Vec::new();
    leaves(&serde_json::from_str(&schema)?, "", &mut paths);
    ensure!(paths.len() > 30, "only {paths:?} found in the schema");
    let missing: Vec<_> =
        paths.iter().filter(|path| !readme.contains(&format!("| `{path}` |"))).collect();
    ensure!(missing.is_empty(), "helm/tercet/README.md has no row for {missing:?}");
    Ok(())
}

/// Collects the dotted paths of values that have no named values below them.
fn leaves(schema: &Value, path: &str, found: &mut Vec<String>) {
    match schema.get("properties").and_then(Value::as_object) {
        Some(properties) => {
            for (name, below) in properties {
                let dot = if path.is_empty() { "" } else { "." };
                leaves(below, &format!("{path}{dot}{name}"), found);
            }
        }
        // Helm's own, not a setting.
        None if path == "global" => (),
        None => found.push(path.to_owned()),
    }
}
