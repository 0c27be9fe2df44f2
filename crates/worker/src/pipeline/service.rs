//! The later stage's end of a link: the `Pipeline` service.

use std::{sync::Arc, time::Duration};

use tercet_proto::{
    InvalidRequest, Reason,
    v1::{
        self, ConnectRequest, ConnectResponse, connect_request, connect_response,
        pipeline_server::{Pipeline, PipelineServer},
    },
};
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    QUEUE,
    link::Link,
    message_limit,
    stage::{Answers, Command, Seated, Stage},
    wire,
};
use crate::core::{ActiveGuard, Core, Facts, Hosted, Loaded, Role, wire as number};

/// How long the stage before may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves the layers of a later stage to the stage before it.
#[derive(Clone, Debug)]
pub(crate) struct PipelineService {
    core: Arc<Core>,
}

impl PipelineService {
    /// Returns the service, which takes messages as large as steps can be.
    pub(crate) fn server(core: Arc<Core>) -> PipelineServer<Self> {
        // Those whose layers are not the first are here from the start.
        let widest = core.models().iter().map(|model| model.facts.config.hidden).max();
        let limit = message_limit(&core.config.engine, widest.unwrap_or_default());
        PipelineServer::new(Self { core }).max_decoding_message_size(limit)
    }
}

#[tonic::async_trait]
impl Pipeline for PipelineService {
    type ConnectStream = ReceiverStream<Result<ConnectResponse, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let mut incoming = request.into_inner();
        let greeting = time::timeout(HELLO_TIMEOUT, incoming.message()).await;
        let hello = match greeting {
            Ok(greeting) => match greeting?.and_then(|message| message.kind) {
                Some(connect_request::Kind::Hello(hello)) => hello,
                _ => return Err(InvalidRequest::new("kind", "must be hello at first").into()),
            },
            Err(_) => return Err(Status::deadline_exceeded("no hello came")),
        };
        let model = self.core.model(&hello.model).ok_or_else(|| {
            let v1::Hello { head, model, .. } = &hello;
            Reason::ModelMismatch.status(format!("head {head} has model {model:?}: it is not here"))
        })?;
        // Counted before the phase is looked at, or a drain could overlook it.
        let active = model.begin();
        let loaded = model.ready()?;
        stage(&model.facts, &loaded)?;
        check(&model.facts, &hello)?;
        let (answers, outgoing) = mpsc::channel(QUEUE);
        let server = LinkServer { model, loaded, hello, answers, incoming };
        // Says ready itself: the stage is taken for as long as the task runs.
        self.core.tasks.spawn(server.run(active));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// Returns the stage, if the model is one.
fn stage<'a>(facts: &Facts, loaded: &'a Loaded) -> Result<&'a Stage, Status> {
    match &loaded.role {
        Role::Stage(stage) => Ok(stage),
        Role::Engine(_) => {
            let layers = facts.layers_label();
            Err(Status::unimplemented(format!("layers {layers} follow no other stage")))
        }
    }
}

/// Checks that the stage before means this model, and these layers of it.
fn check(facts: &Facts, hello: &v1::Hello) -> Result<(), Status> {
    if hello.header_digest != facts.header_digest {
        return Err(Reason::ModelMismatch.status(format!(
            "head {} has another model {}: configuration, tokenizer, template or numerics differ \
             from those of {} here",
            hello.head, hello.model, facts.name
        )));
    }
    let last = facts.layers.end == facts.config.layers;
    if hello.first_layer != number(facts.layers.start) || last != hello.next_addresses.is_empty() {
        return Err(Reason::ModelMismatch.status(format!(
            "layers from {} with {} stages after them do not fit layers {} of {} here",
            hello.first_layer,
            hello.next_addresses.len(),
            facts.layers_label(),
            facts.config.layers
        )));
    }
    Ok(())
}

/// One link, for as long as it lives.
struct LinkServer {
    model: Arc<Hosted>,
    loaded: Arc<Loaded>,
    hello: v1::Hello,
    answers: Answers,
    incoming: Streaming<ConnectRequest>,
}

impl LinkServer {
    async fn run(mut self, _active: ActiveGuard) {
        let loaded = Arc::clone(&self.loaded);
        let ended = match stage(&self.model.facts, &loaded) {
            Ok(stage) => self.serve(stage).await,
            Err(status) => Err(status),
        };
        let (head, epoch) = (&self.hello.head, self.hello.epoch);
        match ended {
            Ok(()) => tracing::info!(%head, epoch, "the pipeline link is over"),
            Err(status) => {
                tracing::warn!(%head, epoch, %status, "the pipeline link is over");
                // Full or closed: then the link ends without a word.
                drop(self.answers.try_send(Err(status)));
            }
        }
    }

    /// Serves the link to its end.
    async fn serve(&mut self, stage: &Stage) -> Result<(), Status> {
        let seated = stage.take(&self.hello.head, self.hello.epoch)?;
        let mut next = self.open_next().await?;
        stage
            .tell(Command::Begin {
                link: seated.link,
                epoch: self.hello.epoch,
                answers: self.answers.clone(),
                next: next.as_ref().map(Link::downstream),
            })
            .await?;
        let mut parts = stage.parts.clone();
        let mut kv_pages = stage.kv_pages;
        if let Some(next) = &next {
            parts.extend(next.parts.iter().cloned());
            kv_pages = kv_pages.min(next.kv_pages);
        }
        let ready = connect_response::Kind::Ready(v1::Ready { parts, kv_pages: number(kv_pages) });
        self.answer(ready)?;
        tracing::info!(head = %self.hello.head, epoch = self.hello.epoch, "a pipeline link begins");
        let ended = self.relay(stage, &seated, next.as_mut()).await;
        stage.tell(Command::End { link: seated.link }).await?;
        ended
    }

    /// Connects to the stage after this one, if there is one.
    async fn open_next(&self) -> Result<Option<Link>, Status> {
        let Some((next, rest)) = self.hello.next_addresses.split_first() else { return Ok(None) };
        let hello = v1::Hello {
            first_layer: number(self.model.facts.layers.end),
            next_addresses: rest.to_vec(),
            ..self.hello.clone()
        };
        Link::open(next, hello).await.map(Some)
    }

    /// Moves steps to the compute thread and results of later stages back.
    async fn relay(
        &mut self,
        stage: &Stage,
        seated: &Seated<'_>,
        mut next: Option<&mut Link>,
    ) -> Result<(), Status> {
        let answers = self.answers.clone();
        loop {
            let message = tokio::select! {
                () = seated.replaced.cancelled() => {
                    return Err(Reason::StaleEpoch.status("a later link of this head began"));
                }
                () = self.model.evicted.cancelled() => return Err(self.model.draining()),
                () = answers.closed() => return Ok(()),
                result = result_of(next.as_deref_mut()) => {
                    self.answer(connect_response::Kind::Result(result?))?;
                    continue;
                }
                message = self.incoming.message() => message?,
            };
            match message.map(|message| message.kind) {
                None => return Ok(()),
                Some(Some(connect_request::Kind::Step(step))) => {
                    self.check_epoch(step.epoch)?;
                    let frame = wire::read_step(step)
                        .map_err(|error| InvalidRequest::new("step", error.to_string()))?;
                    stage.tell(Command::Step { link: seated.link, frame }).await?;
                }
                Some(_) => return Err(InvalidRequest::new("kind", "must be step now").into()),
            }
        }
    }

    fn check_epoch(&self, epoch: u64) -> Result<(), Status> {
        if epoch == self.hello.epoch {
            return Ok(());
        }
        let message = format!("a step of epoch {epoch} on a link of epoch {}", self.hello.epoch);
        Err(Reason::StaleEpoch.status(message))
    }

    fn answer(&self, kind: connect_response::Kind) -> Result<(), Status> {
        let answered = self.answers.try_send(Ok(ConnectResponse { kind: Some(kind) }));
        answered.map_err(|_| Reason::PipelineBroken.status("the answers are not taken"))
    }
}

/// Waits for a result of the later stages; for ever if there are none.
async fn result_of(next: Option<&mut Link>) -> Result<v1::StepResult, Status> {
    match next {
        Some(next) => next.result().await,
        None => std::future::pending().await,
    }
}
