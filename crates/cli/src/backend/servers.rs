//! Servers that can answer a request, one of them in use.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use tercet_proto::{is_unreachable, v1::inference_client::InferenceClient};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use super::refused;
use crate::failure::misconfigured;

/// How long a server may take to answer a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Servers of the same models, at least one. Connections are made anew as needed.
#[derive(Debug)]
pub(super) struct Servers {
    /// With the address, but for the worker of this process.
    servers: Vec<(Option<String>, InferenceClient<Channel>)>,
    current: usize,
}

impl Servers {
    /// Returns the worker of this process.
    pub(super) fn local(channel: Channel) -> Self {
        Self { servers: vec![(None, InferenceClient::new(channel))], current: 0 }
    }

    /// Connects to the first of these addresses where a server answers.
    pub(super) async fn connect(addresses: &[String]) -> Result<Self> {
        let endpoints =
            addresses.iter().map(|address| endpoint(address)).collect::<Result<Vec<_>>>()?;
        let mut servers = Vec::with_capacity(addresses.len());
        let mut current = Err(anyhow!("--connect names no server"));
        for (address, endpoint) in addresses.iter().zip(endpoints) {
            let channel = match current {
                Ok(_) => endpoint.connect_lazy(),
                Err(_) => match endpoint.connect().await {
                    Ok(channel) => {
                        current = Ok(servers.len());
                        channel
                    }
                    Err(error) => {
                        let error = anyhow::Error::from(error);
                        current = Err(error.context(unanswered(&addresses[..=servers.len()])));
                        endpoint.connect_lazy()
                    }
                },
            };
            servers.push((Some(address.clone()), InferenceClient::new(channel)));
        }
        Ok(Self { servers, current: current? })
    }

    pub(super) fn client(&mut self) -> &mut InferenceClient<Channel> {
        &mut self.servers[self.current].1
    }

    /// Returns the address of the server in use; none for the worker of this process.
    pub(super) fn address(&self) -> Option<&str> {
        self.servers[self.current].0.as_deref()
    }

    /// Goes over to the next server.
    pub(super) fn advance(&mut self) {
        self.current = (self.current + 1) % self.servers.len();
    }

    /// Turns what became of a request into an error for people.
    pub(super) fn failure(&self, status: &Status) -> anyhow::Error {
        if !is_unreachable(status) {
            return refused(status);
        }
        let addresses: Vec<_> = self.servers.iter().filter_map(|(name, _)| name.clone()).collect();
        anyhow!(unanswered(&addresses))
    }

    pub(super) fn len(&self) -> usize {
        self.servers.len()
    }
}

/// Connects to one server.
pub(crate) async fn connect(address: &str) -> Result<Channel> {
    let connected = endpoint(address)?.connect().await;
    connected.with_context(|| {
        format!("no server answers at {address}: start one with `tercet serve` or `tercet worker`")
    })
}

/// Says that there is no server, and what to do.
fn unanswered(addresses: &[String]) -> String {
    format!(
        "no server answers at {}: start one with `tercet serve`, or leave --connect out to compute \
         in this process",
        addresses.join(" or ")
    )
}

fn endpoint(address: &str) -> Result<Endpoint> {
    let expected = || {
        misconfigured(anyhow!(
            "--connect {address} is no address: expected HOST:PORT such as 127.0.0.1:7171"
        ))
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| expected())?;
    if endpoint.uri().port().is_none() || endpoint.uri().path() != "/" {
        return Err(expected());
    }
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true))
}
