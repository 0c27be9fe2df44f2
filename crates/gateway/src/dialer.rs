//! How a gateway reaches a worker: one channel per worker, never tonic's own balancer, which takes
//! an endpoint that cannot be connected for a ready one.

use std::fmt::Debug;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use hyper_util::rt::TokioIo;
use tercet_cluster::{WorkerId, WorkerRecord};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};

/// Most connections waiting to be accepted by an in-process worker.
const LOCAL_BACKLOG: usize = 16;

/// Bytes in flight in each direction of an in-process connection.
const LOCAL_BUFFER: usize = 64 * 1024;

/// Makes channels to workers.
pub trait Dialer: Debug + Send + Sync {
    /// Returns a channel to the worker that connects when it is first used, and again after every
    /// loss. Called inside the gateway's runtime.
    fn dial(&self, worker: &WorkerRecord) -> Result<Channel, DialError>;
}

/// Why there is no channel to a worker.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Fault: the worker's record.
    #[error("worker {worker} has address {address:?}, expected one like 10.0.0.1:7171")]
    Address {
        /// The worker.
        worker: WorkerId,
        /// The address it registered.
        address: String,
        /// What is wrong with it.
        source: tonic::transport::Error,
    },
    /// Fault: the wiring of this process.
    #[error("worker {worker} is not in this process, which holds only {local}")]
    NotLocal {
        /// The worker.
        worker: WorkerId,
        /// The worker that is.
        local: WorkerId,
    },
}

/// Connects over TCP.
#[derive(Clone, Debug)]
pub struct TcpDialer {
    /// Longest time for a connection to be made.
    pub connect_timeout: Duration,
    /// Pings a worker this often: a peer that hangs or vanished without a reset is found by them.
    pub keepalive_interval: Duration,
    /// Takes a worker for gone when its ping is not answered within this time.
    pub keepalive_timeout: Duration,
}

impl Default for TcpDialer {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            // A worker's reports tell sooner that it hangs; this is for those that send none, and
            // to have a new connection soon after a partition, whatever TCP still waits for.
            keepalive_interval: Duration::from_secs(2),
            keepalive_timeout: Duration::from_secs(3),
        }
    }
}

impl Dialer for TcpDialer {
    fn dial(&self, worker: &WorkerRecord) -> Result<Channel, DialError> {
        let endpoint =
            Endpoint::from_shared(format!("http://{}", worker.address)).map_err(|source| {
                DialError::Address {
                    worker: worker.id.clone(),
                    address: worker.address.clone(),
                    source,
                }
            })?;
        Ok(endpoint
            .connect_timeout(self.connect_timeout)
            .http2_keep_alive_interval(self.keepalive_interval)
            .keep_alive_timeout(self.keepalive_timeout)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
            .connect_lazy())
    }
}

/// Connects to the worker in this process, through memory.
#[derive(Clone, Debug)]
pub struct LocalDialer {
    worker: WorkerId,
    connections: mpsc::Sender<DuplexStream>,
}

impl LocalDialer {
    /// Returns a dialer for `worker` and what its gRPC server has to accept connections from.
    pub fn new(worker: WorkerId) -> (Self, LocalIncoming) {
        let (connections, incoming) = mpsc::channel(LOCAL_BACKLOG);
        (Self { worker, connections }, LocalIncoming(incoming))
    }
}

impl Dialer for LocalDialer {
    fn dial(&self, worker: &WorkerRecord) -> Result<Channel, DialError> {
        if worker.id != self.worker {
            return Err(DialError::NotLocal {
                worker: worker.id.clone(),
                local: self.worker.clone(),
            });
        }
        let connections = self.connections.clone();
        let connector = tower::service_fn(move |_| {
            let connections = connections.clone();
            async move {
                let (near, far) = tokio::io::duplex(LOCAL_BUFFER);
                connections.send(far).await.map_err(|_| io::ErrorKind::ConnectionRefused)?;
                Ok::<_, io::Error>(TokioIo::new(near))
            }
        });
        // The authority is never resolved.
        Ok(Endpoint::from_static("http://local").connect_with_connector_lazy(connector))
    }
}

/// Connections of the gateway to the worker in its process, for
/// `Server::serve_with_incoming`.
#[derive(Debug)]
pub struct LocalIncoming(mpsc::Receiver<DuplexStream>);

impl Stream for LocalIncoming {
    type Item = io::Result<DuplexStream>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|connection| connection.map(Ok))
    }
}
