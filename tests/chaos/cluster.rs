//! The cluster under test: processes on hosts of their own.
//!
//! ```text
//! test, etcd (bridge) --- gateway
//!                     --- worker 0
//!                     --- relay + worker 1        resets and bad networks happen at relays
//!                     --- relay + worker 2
//!                     --- worker 3, the spare: started when one joins
//! ```

use std::{ops::Range, process::Command};

use anyhow::{Context as _, Result, ensure};
use tercet_tests::{
    Client, Etcd, Host, Network, Process, Tercet, helper,
    relay::{self, Conditions},
    synthetic::{Options, SyntheticWorker},
};

use super::{
    faults::{Fault, Kind},
    streams::Stream,
};

/// Tokens per second of a stream.
pub(super) const RATE: f64 = 200.0;
/// Microseconds that computing a token of the prompt, or of those sent before, takes.
pub(super) const PREFILL_MICROS: u64 = 50;
/// Workers that are there at the beginning of a trial.
pub(super) const MEMBERS: Range<usize> = 0..3;
/// The one that is not.
pub(super) const SPARE: usize = 3;
/// Those whose connections pass a relay.
pub(super) const RELAYED: Range<usize> = 1..3;
/// Streams of a drained worker get so long to finish.
const DRAIN_MILLIS: u64 = 300;

const CLUSTER: &str = "chaos";
const GATEWAY_PORT: u16 = 7171;
const WORKER_PORT: u16 = 7172;
const RELAY_PORT: u16 = 7173;

/// What the workers are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Program {
    /// The formula.
    Synthetic,
    /// `tercet worker` with the demo model.
    Engine,
}

// In the order in which they end: processes, their hosts, the network.
pub(super) struct Cluster {
    client: Client,
    members: Vec<Member>,
    gateway: Tercet,
    etcd: Etcd,
    _gateway_host: Host,
    _network: Network,
}

struct Member {
    program: Program,
    number: usize,
    etcd: String,
    worker: Option<Worker>,
    relay: Option<Process>,
    state: State,
    /// What its workers said since the last trial.
    lines: Vec<String>,
    /// Bytes that the present one has said and that are known.
    heard: usize,
    host: Host,
}

enum Worker {
    Synthetic(SyntheticWorker),
    Engine(Tercet),
}

/// What has to be undone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Well,
    Absent,
    Stopped,
    Cut,
    Unplugged,
    Slowed,
    BadNetwork,
    Draining,
    Joined,
    /// Started anew, perhaps not in the registry yet.
    Starting,
}

impl Cluster {
    pub(super) async fn start(program: Program) -> Result<Option<Self>> {
        let network = Network::new()?;
        let Some(etcd) = Etcd::start_at(network.address())? else { return Ok(None) };
        let url = etcd.url();
        let mut members = Vec::new();
        for number in MEMBERS.start..=SPARE {
            let host = network.host()?;
            let relay = RELAYED.contains(&number).then(|| start_relay(&host)).transpose()?;
            let mut member = Member {
                program,
                number,
                etcd: url.clone(),
                worker: None,
                relay,
                state: State::Absent,
                lines: Vec::new(),
                heard: 0,
                host,
            };
            if MEMBERS.contains(&number) {
                member.start()?;
            }
            members.push(member);
        }
        let host = network.host()?;
        let listen = format!("{}:{GATEWAY_PORT}", host.address());
        let args = ["gateway", "--listen", &listen, "--etcd", &url, "--cluster", CLUSTER];
        let args = args.into_iter().chain(["--progress-timeout", "1s"]);
        let gateway = Tercet::spawn(&mut host.command(&Tercet::command(args)))?;
        for member in &mut members {
            member.settle().await?;
        }
        gateway.serving().await?;
        let client = Client::connect(gateway.address()).await?;
        let (_gateway_host, _network) = (host, network);
        Ok(Some(Self { client, members, gateway, etcd, _gateway_host, _network }))
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Returns what the gateway and etcd said, for messages.
    pub(super) fn said(&mut self) -> String {
        let etcd = self.etcd.process().said();
        let last = etcd.lines().rev().take(5).collect::<Vec<_>>().join("\n");
        format!("{}\n{last}", self.gateway.process().said())
    }

    /// Makes a fault happen.
    pub(super) async fn begin(&mut self, fault: Fault) -> Result<()> {
        self.members[fault.member].begin(fault).await.with_context(|| format!("begin {fault:?}"))
    }

    /// Undoes it.
    pub(super) fn end(&mut self, fault: Fault) -> Result<()> {
        self.members[fault.member].end().with_context(|| format!("end {fault:?}"))
    }

    /// Undoes whatever has happened, and waits until all workers are in the registry.
    pub(super) async fn restore(&mut self) -> Result<()> {
        for member in &mut self.members {
            member.end().with_context(|| format!("member {}", member.number))?;
        }
        for member in &mut self.members {
            member.settle().await.with_context(|| format!("member {}", member.number))?;
        }
        Ok(())
    }

    /// Tells streams where they went on at another worker, by what the workers said since the last
    /// call.
    pub(super) fn attribute(&mut self, streams: &mut [Stream]) {
        for member in &mut self.members {
            member.keep_lines();
            for line in member.lines.drain(..) {
                let mut words = line.strip_prefix("begin ").unwrap_or_default().split(' ');
                let mut number = || words.next()?.parse::<u64>().ok();
                let (Some(seed), Some(index)) = (number(), number()) else { continue };
                let index = usize::try_from(index).expect("an index");
                if let Some(stream) = streams.iter_mut().find(|stream| stream.seed == seed) {
                    stream.resumed.push(index);
                }
            }
        }
        for stream in streams {
            stream.resumed.sort_unstable();
            // Where it began is no move; a second begin there is one.
            if stream.resumed.first() == Some(&0) {
                stream.resumed.remove(0);
            }
            // Refused or broken before anything came: one pause.
            stream.resumed.dedup();
        }
    }
}

fn start_relay(host: &Host) -> Result<Process> {
    let mut relay = Command::new(helper("relay"));
    let addresses = [RELAY_PORT, WORKER_PORT].map(|port| format!("{}:{port}", host.address()));
    let mut process = Process::start_listening("relay", &mut host.command(relay.args(addresses)))?;
    process.line("line `listening on`", |line| line.starts_with("listening on").then_some(()))?;
    Ok(process)
}

impl Member {
    fn start(&mut self) -> Result<()> {
        let address = self.host.address();
        let id = format!("worker-{}", self.number);
        let listen = format!("{address}:{WORKER_PORT}");
        let port = if self.relay.is_some() { RELAY_PORT } else { WORKER_PORT };
        let advertise = format!("{address}:{port}");
        self.worker = Some(match self.program {
            Program::Synthetic => {
                let options = Options {
                    etcd: vec![self.etcd.clone()],
                    cluster: CLUSTER.parse()?,
                    listen,
                    advertise: Some(advertise),
                    rate: RATE,
                    prefill_micros: PREFILL_MICROS,
                    drain_millis: DRAIN_MILLIS,
                    tell: true,
                    ..Options::new(id.parse()?)
                };
                let mut command = self.host.command(&SyntheticWorker::command(&options));
                Worker::Synthetic(SyntheticWorker::spawn(&mut command)?)
            }
            Program::Engine => {
                let drain = format!("{DRAIN_MILLIS}ms");
                let mut command = Tercet::command(["worker", "--threads", "1", "--id", &id]);
                command.args(["--etcd", &self.etcd, "--cluster", CLUSTER, "--listen", &listen]);
                command.args(["--advertise", &advertise, "--drain-timeout", &drain]);
                Worker::Engine(Tercet::spawn(&mut self.host.command(&command))?)
            }
        });
        self.heard = 0;
        self.state = State::Starting;
        Ok(())
    }

    fn process(&mut self) -> Result<&mut Process> {
        Ok(match self.worker.as_mut().context("no worker")? {
            Worker::Synthetic(worker) => worker.process(),
            Worker::Engine(worker) => worker.process(),
        })
    }

    async fn begin(&mut self, fault: Fault) -> Result<()> {
        let Fault { kind, other_way, .. } = fault;
        self.settle().await?;
        self.state = match kind {
            Kind::Kill => {
                self.process()?.kill()?;
                State::Absent
            }
            Kind::Stop => {
                self.process()?.signal("STOP")?;
                State::Stopped
            }
            Kind::Partition if other_way => {
                self.host.unplug()?;
                State::Unplugged
            }
            Kind::Partition => {
                self.host.cut()?;
                State::Cut
            }
            Kind::Reset => {
                self.relay(relay::Command::Reset)?;
                State::Well
            }
            Kind::Slow if other_way && self.relay.is_some() => {
                let delay = fault.lasts / 20;
                let (bytes_per_second, lost_of_1000) = (20_000, 50);
                let bad = Conditions { delay, bytes_per_second, lost_of_1000, stalled: false };
                self.relay(relay::Command::Conditions(bad))?;
                State::BadNetwork
            }
            Kind::Slow => {
                self.process()?.signal("USR1")?;
                State::Slowed
            }
            Kind::Hang => {
                self.process()?.signal("HUP")?;
                State::Slowed
            }
            Kind::Drain => {
                self.process()?.signal("TERM")?;
                State::Draining
            }
            Kind::Join => {
                self.start()?;
                State::Joined
            }
        };
        Ok(())
    }

    /// Undoes what has happened, if anything.
    fn end(&mut self) -> Result<()> {
        match self.state {
            State::Well | State::Starting => return Ok(()),
            State::Absent if self.number == SPARE => return Ok(()),
            State::Absent => {
                self.keep_lines();
                return self.start();
            }
            State::Stopped => self.process()?.signal("CONT")?,
            State::Cut => self.host.heal()?,
            State::Unplugged => self.host.plug()?,
            State::Slowed => self.process()?.signal("USR2")?,
            State::BadNetwork => {
                self.relay(relay::Command::Conditions(Conditions::default()))?;
            }
            State::Draining => {
                self.ended_well()?;
                return self.start();
            }
            State::Joined => {
                self.process()?.signal("TERM")?;
                self.ended_well()?;
                self.worker = None;
                self.state = State::Absent;
                return Ok(());
            }
        }
        self.state = State::Well;
        Ok(())
    }

    /// A drained worker has nothing left to do.
    fn ended_well(&mut self) -> Result<()> {
        let status = self.process()?.wait()?;
        self.keep_lines();
        ensure!(status.success(), "{status} after SIGTERM");
        Ok(())
    }

    /// Waits until a worker that was started is in the registry.
    async fn settle(&mut self) -> Result<()> {
        if self.state == State::Starting {
            match self.worker.as_mut().context("no worker")? {
                Worker::Synthetic(worker) => worker.registered()?,
                Worker::Engine(worker) => worker.serving().await?,
            }
            self.state = State::Well;
        }
        Ok(())
    }

    fn relay(&mut self, command: relay::Command) -> Result<()> {
        self.relay.as_mut().context("no relay")?.say(&command.to_string())
    }

    /// Keeps what its worker said.
    fn keep_lines(&mut self) {
        let Some(Worker::Synthetic(worker)) = &mut self.worker else { return };
        let said = worker.process().said();
        self.lines.extend(said[self.heard..].lines().map(str::to_owned));
        self.heard = said.len();
    }
}
