//! A gateway and synthetic workers on this machine, for measuring.

use anyhow::Result;

use crate::{
    Client, Etcd, Tercet,
    synthetic::{Options, SyntheticWorker},
};

/// A running cluster; gone when dropped.
#[derive(Debug)]
pub struct Lab {
    client: Client,
    gateway: Tercet,
    metrics: String,
    workers: Vec<SyntheticWorker>,
    _etcd: Etcd,
}

impl Lab {
    /// Starts so many workers with these options, their names apart, and a gateway with further
    /// flags, and waits until all of them are in the registry. `None` where etcd is missing.
    ///
    /// # Errors
    ///
    /// Returns an error if one of them ends before, with what it said.
    pub async fn start(workers: usize, options: &Options, flags: &[&str]) -> Result<Option<Self>> {
        let Some(etcd) = Etcd::start()? else { return Ok(None) };
        let cluster = options.cluster.to_string();
        let workers: Result<Vec<_>> = (0..workers)
            .map(|number| {
                SyntheticWorker::start(&Options {
                    id: format!("{}-{number}", options.id).parse()?,
                    etcd: vec![etcd.url()],
                    ..options.clone()
                })
            })
            .collect();
        let mut workers = workers?;
        for worker in &mut workers {
            worker.registered()?;
        }
        let args = ["gateway", "--etcd", &etcd.url(), "--cluster", &cluster];
        let args = args.into_iter().chain(["--listen", "127.0.0.1:0"]);
        let args = args.chain(["--metrics-listen", "127.0.0.1:0"]).chain(flags.iter().copied());
        let mut gateway = Tercet::start(args)?;
        gateway.serving().await?;
        let client = Client::connect(gateway.address()).await?;
        let metrics = gateway.listener("metrics")?;
        Ok(Some(Self { client, gateway, metrics, workers, _etcd: etcd }))
    }

    /// Returns a client of the gateway.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the gateway.
    pub fn gateway(&mut self) -> &mut Tercet {
        &mut self.gateway
    }

    /// Returns where the gateway's metrics are.
    pub fn metrics(&self) -> &str {
        &self.metrics
    }

    /// Returns the workers.
    pub fn workers(&mut self) -> &mut [SyntheticWorker] {
        &mut self.workers
    }
}
