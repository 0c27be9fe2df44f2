//! The earlier stage's end of a link.

use std::time::Duration;

use tercet_engine::{Downstream, LinkLost, StageFrame};
use tercet_proto::{
    Reason,
    v1::{
        self, ConnectRequest, ConnectResponse, connect_request, connect_response,
        pipeline_client::PipelineClient,
    },
};
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Endpoint};

use super::{QUEUE, wire};

/// How long a stage may take to answer that it and all after it are ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often an idle link is probed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long the answer to a probe may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest result taken: the scores of a long prompt.
const RESULT_LIMIT: usize = 64 << 20;

/// A link to the next stage.
#[derive(Debug)]
pub(crate) struct Link {
    epoch: u64,
    steps: mpsc::Sender<ConnectRequest>,
    results: Streaming<ConnectResponse>,
    /// Digests of the tensors of the next stage and all after it.
    pub(crate) parts: Vec<v1::PartDigest>,
    /// Smallest KV capacity of these stages, in pages.
    pub(crate) kv_pages: usize,
}

impl Link {
    /// Connects to the stage at `address` and waits until it and all after it are ready.
    pub(crate) async fn open(address: &str, hello: v1::Hello) -> Result<Self, Status> {
        let opening = time::timeout(READY_TIMEOUT, Self::connect(address, hello));
        opening.await.unwrap_or_else(|_| {
            Err(Reason::PipelineBroken
                .status(format!("the stage at {address} is not ready in time")))
        })
    }

    async fn connect(address: &str, hello: v1::Hello) -> Result<Self, Status> {
        let epoch = hello.epoch;
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| {
                Reason::PipelineBroken.status(format!("{address:?} is no address: {error}"))
            })?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
            .connect_lazy();
        let (steps, outgoing) = mpsc::channel(QUEUE);
        let greeting = ConnectRequest { kind: Some(connect_request::Kind::Hello(hello)) };
        steps.try_send(greeting).expect("a new channel has room");
        let mut results = PipelineClient::new(channel)
            .max_decoding_message_size(RESULT_LIMIT)
            .connect(ReceiverStream::new(outgoing))
            .await?
            .into_inner();
        match results.message().await?.and_then(|answer| answer.kind) {
            Some(connect_response::Kind::Ready(v1::Ready { parts, kv_pages })) => {
                let kv_pages = usize::try_from(kv_pages).unwrap_or(usize::MAX);
                Ok(Self { epoch, steps, results, parts, kv_pages })
            }
            other => Err(broken(format!("expected ready, got {other:?}"))),
        }
    }

    /// Returns where frames for the next stage go.
    pub(crate) fn downstream(&self) -> WireDownstream {
        WireDownstream { epoch: self.epoch, steps: self.steps.clone() }
    }

    /// Waits for the next result; an error is the end of the link. Cancel-safe.
    pub(crate) async fn result(&mut self) -> Result<v1::StepResult, Status> {
        match self.results.message().await?.and_then(|answer| answer.kind) {
            Some(connect_response::Kind::Result(result)) if result.epoch == self.epoch => {
                Ok(result)
            }
            Some(connect_response::Kind::Result(result)) => Err(broken(format!(
                "a result of epoch {} on a link of epoch {}",
                result.epoch, self.epoch
            ))),
            Some(connect_response::Kind::Ready(_)) => Err(broken("ready came twice".to_owned())),
            None => Err(broken("the next stage ended the link".to_owned())),
        }
    }
}

fn broken(message: String) -> Status {
    Reason::PipelineBroken.status(message)
}

/// Sends frames to the next stage.
#[derive(Clone, Debug)]
pub(crate) struct WireDownstream {
    epoch: u64,
    steps: mpsc::Sender<ConnectRequest>,
}

impl Downstream for WireDownstream {
    fn send(&mut self, frame: StageFrame) -> Result<(), LinkLost> {
        let step = connect_request::Kind::Step(wire::step(self.epoch, frame));
        self.steps.try_send(ConnectRequest { kind: Some(step) }).map_err(|error| {
            LinkLost(match error {
                mpsc::error::TrySendError::Full(_) => format!("{QUEUE} steps wait to be sent"),
                mpsc::error::TrySendError::Closed(_) => "the connection is closed".to_owned(),
            })
        })
    }
}
