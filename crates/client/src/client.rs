use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tercet_proto::v1::{GenerateRequest, inference_client::InferenceClient};
use tonic::{
    IntoRequest,
    transport::{Channel, Endpoint},
};

use crate::{GenerateError, Generation, Options};

/// Servers of the same models, one of them in use. Clones share which one.
///
/// Connections are made when they are first used, and again after every loss.
#[derive(Clone, Debug)]
pub struct Client {
    servers: Arc<[Server]>,
    /// The server that the next request goes to.
    current: Arc<AtomicUsize>,
    options: Arc<Options>,
}

#[derive(Debug)]
struct Server {
    /// `None` if the connection cannot be made anew.
    address: Option<String>,
    channel: Channel,
}

/// An address that is none.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AddressError {
    /// Fault: the caller.
    #[error("{0} is no address: expected HOST:PORT such as 127.0.0.1:7171")]
    Malformed(String),
    /// Fault: the caller.
    #[error("no address is given: expected at least one HOST:PORT such as 127.0.0.1:7171")]
    Missing,
}

/// Why a client has no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Fault: the caller.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Fault: the servers or the network.
    #[error("no server answers at {}", addresses.join(" or "))]
    Unanswered {
        /// Every address.
        addresses: Vec<String>,
        /// What became of the last one.
        source: tonic::transport::Error,
    },
}

/// Returns how a server at `HOST:PORT` is reached.
///
/// # Errors
///
/// Returns an error if the address is none.
pub fn endpoint(address: &str) -> Result<Endpoint, AddressError> {
    let malformed = || AddressError::Malformed(address.to_owned());
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| malformed())?;
    if endpoint.uri().port().is_none() || endpoint.uri().path() != "/" {
        return Err(malformed());
    }
    Ok(endpoint.tcp_nodelay(true).connect_timeout(Duration::from_secs(5)))
}

impl Client {
    /// Returns a client of the servers at these addresses, each `HOST:PORT`. Connects to none yet.
    /// Called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no address, or one is none.
    pub fn new<A: Into<String>>(
        addresses: impl IntoIterator<Item = A>,
        options: Options,
    ) -> Result<Self, AddressError> {
        let server = |address: A| {
            let address = address.into();
            let channel = dial(&address, &options)?.connect_lazy();
            Ok(Server { address: Some(address), channel })
        };
        let servers = addresses.into_iter().map(server).collect::<Result<Arc<[_]>, _>>()?;
        if servers.is_empty() {
            return Err(AddressError::Missing);
        }
        Ok(Self { servers, current: Arc::default(), options: Arc::new(options) })
    }

    /// Returns a client that uses the first of these addresses where a server answers.
    ///
    /// # Errors
    ///
    /// Returns an error if none does, or an address is none.
    pub async fn connect<A: Into<String>>(
        addresses: impl IntoIterator<Item = A>,
        options: Options,
    ) -> Result<Self, ConnectError> {
        let client = Self::new(addresses, options)?;
        let addresses: Vec<_> = client.addresses().map(str::to_owned).collect();
        let mut last = None;
        for (index, address) in addresses.iter().enumerate() {
            match dial(address, &client.options)?.connect().await {
                Ok(_) => {
                    client.current.store(index, Ordering::Relaxed);
                    return Ok(client);
                }
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(source) => Err(ConnectError::Unanswered { addresses, source }),
            None => Err(AddressError::Missing.into()),
        }
    }

    /// Returns a client of one connection that is not made anew: a stream that it loses is lost.
    pub fn over(channel: Channel) -> Self {
        Self {
            servers: Arc::new([Server { address: None, channel }]),
            current: Arc::default(),
            options: Arc::default(),
        }
    }

    /// Starts a generation. Its metadata go with every attempt, its deadline bounds all of them
    /// together.
    ///
    /// # Errors
    ///
    /// Returns an error if the request is refused, or no server takes it in the attempts that the
    /// options allow.
    pub async fn generate(
        &self,
        request: impl IntoRequest<GenerateRequest>,
    ) -> Result<Generation, GenerateError> {
        Generation::open(self.clone(), request.into_request()).await
    }

    /// Returns a client of the server in use, for what is no stream.
    pub fn inference(&self) -> InferenceClient<Channel> {
        self.inference_at(self.current())
    }

    /// Returns the addresses, in the order given.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        self.servers.iter().filter_map(|server| server.address.as_deref())
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    pub(crate) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    pub(crate) fn inference_at(&self, index: usize) -> InferenceClient<Channel> {
        InferenceClient::new(self.servers[index].channel.clone())
    }

    /// Returns the address of a server; `None` if its connection is not made anew.
    pub(crate) fn address(&self, index: usize) -> Option<&str> {
        self.servers[index].address.as_deref()
    }

    pub(crate) fn len(&self) -> usize {
        self.servers.len()
    }

    /// Returns the server after one that failed, which new requests go to as well unless another
    /// stream has found a better one already.
    pub(crate) fn after(&self, failed: usize) -> usize {
        let next = (failed + 1) % self.len();
        let (success, failure) = (Ordering::Relaxed, Ordering::Relaxed);
        let moved = self.current.compare_exchange(failed, next, success, failure);
        tracing::trace!(failed, next, first = moved.is_ok(), "on to the next server");
        next
    }
}

fn dial(address: &str, options: &Options) -> Result<Endpoint, AddressError> {
    Ok(endpoint(address)?
        .connect_timeout(options.connect_timeout)
        .http2_keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout))
}
