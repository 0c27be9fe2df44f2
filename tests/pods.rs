//! Pods of the chart, run by a real podman, serve text.
//!
//! podman plays a Deployment as one pod, but it is no cluster. What a cluster would add is written
//! out by [`Pods::adapt`], and nothing else about the manifests is changed:
//!
//! - the pod's address, which the downward API tells (podman gives the pod the address it is told);
//! - the names of Services, as host aliases;
//! - ports of containers stay inside of the network (podman takes them for ports of the host).
//!
//! podman runs no gRPC probes, so the test asks for their answers itself.

use std::{
    cell::RefCell,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tercet_tests::{Process, Scratch, Tercet, http_get, run, serving, tool, workspace};

/// The names that the chart gives to its Services.
const SERVICES: [&str; 2] = ["tercet-etcd", "tercet-gateway"];

// The runtime closes connections while the test waits for podman.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn pods_of_the_chart_generate_text() -> Result<()> {
    let Some(helm) = tool("helm") else { return Ok(()) };
    let Some(podman) = tool("podman") else { return Ok(()) };
    let Some(etcd) = tool("etcd") else { return Ok(()) };
    let scratch = Scratch::new("pods")?;
    build_images(&podman, &etcd, scratch.path())?;

    let pods = Pods::new(podman, helm, scratch)?;
    let etcd = pods.play("etcd-deployment", 1)?;
    let mut logs = pods.logs("tercet-etcd-pod-0-etcd")?;
    logs.line("client address", |line| line.contains("serving client traffic").then_some(()))?;

    let worker = pods.play("worker-deployment", 2)?;
    listening(&pods, "tercet-worker-pod-0-worker")?;
    serving(&format!("{worker}:7172")).await.context("the worker's probe")?;
    let gateway = pods.play("gateway-deployment", 3)?;
    listening(&pods, "tercet-gateway-pod-0-gateway")?;
    let address = format!("{gateway}:7171");
    serving(&address).await.context("the gateway's probe")?;
    for pod in [worker, gateway] {
        let admin = format!("{pod}:9464");
        ensure!(http_get(&admin, "/livez")?.starts_with("HTTP/1.1 200 "), "{pod}: /livez");
        let metrics = http_get(&admin, "/metrics")?;
        ensure!(metrics.contains("\n# TYPE "), "{pod}: /metrics\n{metrics}");
    }

    // The chart's own test, as `helm test` would run it.
    pods.play("tests/generate", 4)?;
    let name = "tercet-test-generate-generate";
    let status = pods.podman(&["wait", name])?;
    let text = pods.podman(&["logs", name])?;
    ensure!(status.trim() == "0", "the chart's test ended with {status}\n{text}");
    // From outside, the same request: the same answer.
    let mut outside = Tercet::command(["generate", "--connect", &address]);
    outside.args(["--prompt", "The king", "--max-tokens", "16", "--seed", "1"]);
    let outside = run(&mut outside)?;
    ensure!(outside.split_whitespace().count() >= 3, "hardly any text: {outside:?}");
    assert_eq!(text.trim(), outside.trim());

    // The first process of a container gets no default action for signals: it must end by itself.
    for part in ["gateway", "worker"] {
        let name = format!("tercet-{part}-pod-0-{part}");
        pods.podman(&["stop", "--time", "30", &name])?;
        let status = pods.podman(&["inspect", "--format", "{{.State.ExitCode}}", &name])?;
        ensure!(status.trim() == "0", "{part} ended with {status}{}", pods.said(&name)?);
    }
    _ = etcd;
    Ok(())
}

/// Builds the images that [`Pods::play`] names.
fn build_images(podman: &Path, etcd: &Path, scratch: &Path) -> Result<()> {
    let image = workspace().join("k8s/image");
    let mut build = Command::new(image.join("build"));
    build.arg("localhost/tercet:test").env("ENGINE", podman).env("TERCET_BIN", Tercet::binary());
    run(&mut build)?;

    // No registry is needed for etcd either.
    run(Command::new(image.join("rootfs")).arg(etcd).arg(scratch.join("rootfs")))?;
    let recipe = scratch.join("Containerfile");
    fs::write(&recipe, "FROM scratch\nCOPY rootfs/ /\nENV PATH=/usr/local/bin\n")?;
    let mut build = Command::new(podman);
    build.args(["build", "--quiet", "--tag", "localhost/etcd:test", "--file"]);
    run(build.arg(recipe).arg(scratch))?;
    Ok(())
}

/// Waits until the listener for gRPC is bound, and nothing more was said on that stream.
fn listening(pods: &Pods, container: &str) -> Result<()> {
    let mut logs = pods.logs(container)?;
    logs.line("line `listening on`", |line| line.starts_with("listening on ").then_some(()))
}

/// A network of its own with pods on it; all of it is removed when dropped.
struct Pods {
    podman: PathBuf,
    helm: PathBuf,
    scratch: Scratch,
    network: String,
    /// Addresses of the network; pod `n` has the n-th after the gateway of the network.
    gateway: Ipv4Addr,
    played: RefCell<Vec<PathBuf>>,
}

impl Pods {
    fn new(podman: PathBuf, helm: PathBuf, scratch: Scratch) -> Result<Self> {
        // What a killed run left behind; all pods in the store of this checkout are the test's own.
        run(Command::new(&podman).args(["pod", "rm", "--all", "--force"]))?;
        run(Command::new(&podman).args(["network", "prune", "--force"]))?;
        run(Command::new(&podman).args(["image", "prune", "--force"]))?;
        let network = format!("tercet-{}", std::process::id());
        run(Command::new(&podman).args(["network", "create", &network]))?;
        let unspecified = Ipv4Addr::UNSPECIFIED;
        let played = RefCell::default();
        let mut pods = Self { podman, helm, scratch, network, gateway: unspecified, played };
        let network: Value =
            serde_json::from_str(&pods.podman(&["network", "inspect", &pods.network])?)?;
        let gateway = network[0]["subnets"][0]["gateway"].as_str().context("a gateway")?;
        pods.gateway = gateway.parse()?;
        Ok(pods)
    }

    /// Runs the pod of a template as the n-th of the network and returns its address.
    fn play(&self, template: &str, number: u8) -> Result<Ipv4Addr> {
        let address = self.address(number);
        let mut render = Command::new(&self.helm);
        render.args(["template", "tercet"]).arg(workspace().join("helm/tercet"));
        render.args(["--set", "image.pullPolicy=Never,gateway.replicas=1,worker.replicas=1"]);
        render.args(["--set", "image.repository=localhost/tercet,image.tag=test"]);
        render.args(["--set", "etcd.image.repository=localhost/etcd,etcd.image.tag=test"]);
        render.args(["--set", "worker.threads=1"]);
        render.args(["--show-only", &format!("templates/{template}.yaml")]);
        let manifest = self.adapt(&run(&mut render)?, address)?;

        let file = self.scratch.path().join(format!("{}.yaml", template.replace('/', "-")));
        fs::write(&file, &manifest)?;
        self.played.borrow_mut().push(file.clone());
        let mut play = Command::new(&self.podman);
        play.args(["kube", "play", "--network", &self.network, "--ip", &address.to_string()]);
        run(play.arg(&file)).with_context(|| manifest)?;
        Ok(address)
    }

    /// Writes out what a cluster would add to a manifest.
    fn adapt(&self, manifest: &str, address: Ipv4Addr) -> Result<String> {
        const FIELD: &str = "valueFrom:\n                fieldRef:\n                  \
                             fieldPath: status.podIP\n";
        let mut manifest = manifest
            .replace(FIELD, &format!("value: {address}\n"))
            .replace("$(POD_IP)", &address.to_string());
        ensure!(!manifest.contains("fieldRef"), "a reference that podman cannot resolve");

        let line = manifest.lines().find(|line| line.trim() == "enableServiceLinks: false");
        let line = line.context("every pod has enableServiceLinks")?.to_owned();
        let indent = line.len() - line.trim_start().len();
        let mut aliases = String::new();
        for (service, number) in SERVICES.iter().zip([1, 3]) {
            let ip = self.address(number);
            aliases.push_str(&format!("\n{:indent$}- ip: {ip}", ""));
            aliases.push_str(&format!("\n{:indent$}  hostnames: [{service}]", ""));
        }
        manifest = manifest.replace(&line, &format!("{line}\n{:indent$}hostAliases:{aliases}", ""));

        let mut ports = None;
        let keep = |line: &&str| {
            let indent = line.len() - line.trim_start().len();
            if line.trim() == "ports:" {
                ports = Some(indent);
            } else if ports.is_some_and(|ports| indent <= ports) {
                ports = None;
            }
            ports.is_none()
        };
        Ok(manifest.lines().filter(keep).map(|line| format!("{line}\n")).collect())
    }

    fn address(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.gateway.to_bits() + 10 + u32::from(number))
    }

    fn podman(&self, args: &[&str]) -> Result<String> {
        run(Command::new(&self.podman).args(args))
    }

    /// Follows what a container says on standard output.
    fn logs(&self, container: &str) -> Result<Process> {
        let mut command = Command::new(&self.podman);
        Process::start(container, command.args(["logs", "--follow", container]))
    }

    /// Returns all that a container said so far.
    fn said(&self, container: &str) -> Result<String> {
        self.podman(&["logs", container])
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        for file in self.played.borrow().iter().rev() {
            let mut down = Command::new(&self.podman);
            // The next run clears what stays.
            _ = run(down.args(["kube", "down"]).arg(file));
        }
        _ = self.podman(&["network", "rm", "--force", &self.network]);
    }
}
