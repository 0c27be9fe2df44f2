//! The flags of a synthetic worker.

use std::{str::FromStr, time::Duration};

use anyhow::{Context as _, Result, bail};
use tercet_cluster::{ClusterName, WorkerId};

/// How a synthetic worker behaves. [`Options::parse`] reads it, [`Options::args`] writes it.
#[derive(Clone, Debug)]
pub struct Options {
    /// `--id`: its name in the cluster.
    pub id: WorkerId,
    /// `--etcd`: members of the cluster's etcd, separated by commas. Without any it is in no
    /// registry.
    pub etcd: Vec<String>,
    /// `--cluster`: the cluster to be part of.
    pub cluster: ClusterName,
    /// `--listen`: where to serve gRPC.
    pub listen: String,
    /// `--advertise`: where others reach it, if that is not the bound address.
    pub advertise: Option<String>,
    /// `--model`: name of its model. Equal names are equal models.
    pub model: String,
    /// `--context`: most tokens of a sequence.
    pub context: u32,
    /// `--rate`: tokens per second of each stream.
    pub rate: f64,
    /// `--slots`: streams that get tokens at once.
    pub slots: u32,
    /// `--queue`: streams that wait for a slot; more are refused.
    pub queue: u32,
    /// `--prefill-micros`: microseconds that each token of a prompt, or resumed, takes.
    pub prefill_micros: u64,
    /// `--load-millis`: how long it takes to load its model.
    pub load_millis: u64,
    /// `--slow`: how many times longer everything takes between SIGUSR1 and SIGUSR2.
    pub slow: u32,
    /// `--drain-millis`: how long streams get to finish after SIGTERM.
    pub drain_millis: u64,
    /// `--tell`: says on standard output which stream begins, by its seed, and at which index.
    pub tell: bool,
    /// `--stamp`: the text of a token is when it was made, in microseconds of the system's clock.
    pub stamp: bool,
    /// `--without`, any number of times: what it does not have, as an older release.
    pub without: Vec<Omission>,
}

/// What an older worker does not have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Omission {
    /// `timings`: `Finished` has no timings.
    Timings,
    /// `watch-load`: there is no `WatchLoad`.
    WatchLoad,
    /// `drain`: it can only be told by SIGTERM to stop.
    Drain,
    /// `model-state`: its record in the registry tells neither state nor generation of models.
    ModelState,
}

impl Omission {
    /// Every one, with its name.
    pub const ALL: [(&'static str, Self); 4] = [
        ("timings", Self::Timings),
        ("watch-load", Self::WatchLoad),
        ("drain", Self::Drain),
        ("model-state", Self::ModelState),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, omission)| *omission == self).map_or("", |(name, _)| name)
    }
}

impl FromStr for Omission {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text).map(|(_, omission)| *omission);
        found.with_context(|| {
            let names = Self::ALL.map(|(name, _)| name).join(", ");
            format!("nothing is called {text:?}, expected one of: {names}")
        })
    }
}

impl Options {
    /// Returns the defaults of a worker of that name.
    pub fn new(id: WorkerId) -> Self {
        Self {
            id,
            etcd: Vec::new(),
            cluster: "default".parse().expect("a usable name"),
            listen: "127.0.0.1:0".to_owned(),
            advertise: None,
            model: "synthetic".to_owned(),
            context: 1 << 16,
            rate: 100.0,
            slots: 32,
            queue: 256,
            prefill_micros: 0,
            load_millis: 0,
            slow: 10,
            drain_millis: 30_000,
            tell: false,
            stamp: false,
            without: Vec::new(),
        }
    }

    /// Reads flags, each `--name value` except `--tell` and `--stamp`.
    ///
    /// # Errors
    ///
    /// Returns an error that names the flag at fault.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Self> {
        let mut options = Self::new("synthetic".parse()?);
        let mut args = args.into_iter();
        while let Some(flag) = args.next() {
            match flag.as_str() {
                "--tell" => {
                    options.tell = true;
                    continue;
                }
                "--stamp" => {
                    options.stamp = true;
                    continue;
                }
                _ => {}
            }
            let value = args.next().with_context(|| format!("{flag} needs a value"))?;
            options.set(&flag, &value).with_context(|| format!("{flag} {value}"))?;
        }
        Ok(options)
    }

    fn set(&mut self, flag: &str, value: &str) -> Result<()> {
        match flag {
            "--id" => self.id = value.parse()?,
            "--etcd" => self.etcd = value.split(',').map(str::to_owned).collect(),
            "--cluster" => self.cluster = value.parse()?,
            "--listen" => value.clone_into(&mut self.listen),
            "--advertise" => self.advertise = Some(value.to_owned()),
            "--model" => value.clone_into(&mut self.model),
            "--context" => self.context = value.parse()?,
            "--rate" => self.rate = value.parse()?,
            "--slots" => self.slots = value.parse()?,
            "--queue" => self.queue = value.parse()?,
            "--prefill-micros" => self.prefill_micros = value.parse()?,
            "--load-millis" => self.load_millis = value.parse()?,
            "--slow" => self.slow = value.parse()?,
            "--drain-millis" => self.drain_millis = value.parse()?,
            "--without" => self.without.push(value.parse()?),
            _ => bail!("no such flag"),
        }
        Ok(())
    }

    /// Returns the flags that [`Options::parse`] reads as these options.
    pub fn args(&self) -> Vec<String> {
        let mut args = Vec::new();
        let mut push = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
        push("--id", self.id.to_string());
        if !self.etcd.is_empty() {
            push("--etcd", self.etcd.join(","));
        }
        push("--cluster", self.cluster.to_string());
        push("--listen", self.listen.clone());
        if let Some(advertise) = &self.advertise {
            push("--advertise", advertise.clone());
        }
        push("--model", self.model.clone());
        push("--context", self.context.to_string());
        push("--rate", self.rate.to_string());
        push("--slots", self.slots.to_string());
        push("--queue", self.queue.to_string());
        push("--prefill-micros", self.prefill_micros.to_string());
        push("--load-millis", self.load_millis.to_string());
        push("--slow", self.slow.to_string());
        push("--drain-millis", self.drain_millis.to_string());
        for omission in &self.without {
            push("--without", omission.name().to_owned());
        }
        if self.tell {
            args.push("--tell".to_owned());
        }
        if self.stamp {
            args.push("--stamp".to_owned());
        }
        args
    }

    /// Returns the time between two tokens of a stream.
    pub fn pace(&self) -> Duration {
        Duration::from_secs_f64(1.0 / self.rate)
    }

    /// Returns the time that the computing of so many tokens takes before the first new one.
    pub fn prefill(&self, tokens: u32) -> Duration {
        Duration::from_micros(self.prefill_micros * u64::from(tokens))
    }

    pub(super) fn has(&self, omission: Omission) -> bool {
        !self.without.contains(&omission)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_as_they_are_written() {
        let mut options = Options::new("w-7".parse().unwrap());
        options.etcd = vec!["http://a:1".to_owned(), "http://b:2".to_owned()];
        options.advertise = Some("h:3".to_owned());
        options.rate = 12.5;
        options.without = vec![Omission::Timings, Omission::ModelState];
        options.tell = true;
        options.stamp = true;
        let read = Options::parse(options.args()).unwrap();
        assert_eq!(format!("{read:?}"), format!("{options:?}"));
    }

    #[test]
    fn wrong_flags_are_named() {
        for (flags, named) in [
            (&["--rat", "1"][..], "--rat"),
            (&["--slots", "x"], "--slots x"),
            (&["--id"], "--id"),
            (&["--without", "sense"], "--without sense"),
        ] {
            let refused = Options::parse(flags.iter().map(|&flag| flag.to_owned()));
            let message = format!("{:#}", refused.unwrap_err());
            assert!(message.starts_with(named), "{message}");
        }
    }
}
