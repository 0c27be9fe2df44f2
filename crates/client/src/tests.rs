//! Generations over servers that do what a test tells them.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt as _, stream, stream::BoxStream};
use tercet_proto::{
    Reason,
    v1::{
        self, Delta, Finished, GenerateRequest, GenerateResponse, Resume, Started,
        generate_response::Event,
        inference_server::{Inference, InferenceServer},
    },
};
use tokio::{net::TcpListener, task::JoinSet, time::Instant};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status, transport::Server};

use crate::{Client, GenerateError, Options};

type Script = Result<Vec<Result<Event, Status>>, Status>;

/// Answers each request by the next script and notes it; hangs when there are no more.
#[derive(Clone, Debug, Default)]
struct Fake {
    scripts: Arc<Mutex<VecDeque<Script>>>,
    asked: Arc<Mutex<Vec<GenerateRequest>>>,
}

impl Fake {
    /// Starts a server and returns its address.
    async fn start(&self, servers: &mut JoinSet<()>, scripts: Vec<Script>) -> String {
        self.scripts.lock().unwrap().extend(scripts);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::builder().add_service(InferenceServer::new(self.clone()));
        servers.spawn(async move {
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        address
    }

    fn resumes(&self) -> Vec<Option<Resume>> {
        self.asked.lock().unwrap().iter().map(|request| request.resume.clone()).collect()
    }
}

#[tonic::async_trait]
impl Inference for Fake {
    type GenerateStream = BoxStream<'static, Result<GenerateResponse, Status>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        self.asked.lock().unwrap().push(request.into_inner());
        let script = self.scripts.lock().unwrap().pop_front();
        let Some(script) = script else { return std::future::pending().await };
        let events = script?
            .into_iter()
            .map(|event| event.map(|event| GenerateResponse { event: Some(event) }));
        Ok(Response::new(stream::iter(events).boxed()))
    }

    async fn tokenize(
        &self,
        _: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        Err(Status::unimplemented("no part of these tests"))
    }

    async fn detokenize(
        &self,
        _: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        Err(Status::unimplemented("no part of these tests"))
    }

    async fn score(
        &self,
        _: Request<v1::ScoreRequest>,
    ) -> Result<Response<v1::ScoreResponse>, Status> {
        Err(Status::unimplemented("no part of these tests"))
    }

    async fn list_models(
        &self,
        _: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Err(Status::unimplemented("no part of these tests"))
    }

    async fn get_model(
        &self,
        _: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        Err(Status::unimplemented("no part of these tests"))
    }
}

fn started() -> Result<Event, Status> {
    Ok(Event::Started(Started { seed: 9, prompt_tokens: 3, ..Started::default() }))
}

fn delta(index: u32, token_ids: &[u32]) -> Result<Event, Status> {
    let (token_ids, text) = (token_ids.to_vec(), format!(" {index}"));
    Ok(Event::Delta(Delta { index, token_ids, text, ..Delta::default() }))
}

fn finished() -> Result<Event, Status> {
    Ok(Event::Finished(Finished::default()))
}

fn draining() -> Status {
    Reason::Draining.status("about to stop")
}

fn options() -> Options {
    Options { first_pause: Duration::from_millis(1), ..Options::default() }
}

async fn events(client: &Client) -> Result<Vec<Event>, GenerateError> {
    let mut generation = client.generate(GenerateRequest::default()).await?;
    let mut events = Vec::new();
    while let Some(event) = generation.next().await? {
        events.push(event);
    }
    Ok(events)
}

fn whole() -> Vec<Event> {
    [started(), delta(0, &[1, 2]), delta(2, &[3]), finished()].map(Result::unwrap).into()
}

#[tokio::test]
async fn a_stream_goes_on_at_the_next_server_as_if_nothing_had_been() {
    let (mut servers, first, second) = (JoinSet::new(), Fake::default(), Fake::default());
    let broken = Ok(vec![started(), delta(0, &[1, 2]), Err(draining())]);
    let again = Ok(vec![started(), delta(0, &[1, 2]), delta(2, &[3]), finished()]);
    let addresses = [
        first.start(&mut servers, vec![broken]).await,
        second.start(&mut servers, vec![again]).await,
    ];
    let client = Client::connect(addresses, options()).await.unwrap();
    assert_eq!(events(&client).await.unwrap(), whole());
    assert_eq!(first.resumes(), [None]);
    assert_eq!(second.resumes(), [Some(Resume { seed: 9, token_ids: vec![1, 2] })]);
    assert_eq!(client.current(), 1, "the next request goes where this one went");
}

#[tokio::test]
async fn streams_that_end_early_or_skip_tokens_are_resumed() {
    let (mut servers, fake) = (JoinSet::new(), Fake::default());
    let scripts = vec![
        Err(Reason::NoWorker.status("none is ready")),
        Ok(vec![started(), delta(0, &[1, 2])]),
        Ok(vec![started(), delta(3, &[4])]),
        Ok(vec![started(), delta(2, &[3]), finished()]),
    ];
    let address = fake.start(&mut servers, scripts).await;
    let client = Client::new([address], options()).unwrap();
    assert_eq!(events(&client).await.unwrap(), whole());
    let resume = Some(Resume { seed: 9, token_ids: vec![1, 2] });
    assert_eq!(fake.resumes(), [None, None, resume.clone(), resume]);
}

#[tokio::test]
async fn servers_are_not_asked_before_they_say() {
    let (mut servers, fake) = (JoinSet::new(), Fake::default());
    let wait = Duration::from_millis(300);
    let busy = Reason::Overloaded.status_retry_after("full", wait);
    let scripts = vec![Err(busy), Ok(whole().into_iter().map(Ok).collect())];
    let address = fake.start(&mut servers, scripts).await;
    let client = Client::new([address], options()).unwrap();
    let begun = Instant::now();
    assert_eq!(events(&client).await.unwrap(), whole());
    assert!(begun.elapsed() >= wait, "{:?}", begun.elapsed());

    fake.scripts.lock().unwrap().push_back(Err(
        Reason::Overloaded.status_retry_after("for a day", Duration::from_secs(86_400))
    ));
    let error = events(&client).await.unwrap_err();
    assert!(matches!(error, GenerateError::Lost { .. }), "beyond all patience: {error}");
}

#[tokio::test]
async fn attempts_are_bounded_and_begin_anew_with_each_token() {
    let (mut servers, fake) = (JoinSet::new(), Fake::default());
    let broken = |index: u32| Ok(vec![started(), delta(index, &[7]), Err(draining())]);
    let mut scripts: Vec<Script> = (0..5).map(broken).collect();
    scripts.extend((0..3).map(|_| Err(draining())));
    let address = fake.start(&mut servers, scripts).await;
    let client = Client::new([address], Options { attempts: 3, ..options() }).unwrap();
    let error = events(&client).await.unwrap_err();
    assert!(matches!(&error, GenerateError::Lost { tokens: 5, attempts: 3, .. }), "{error:?}");
    assert_eq!(Reason::of(error.status()), Some(Reason::Draining));
}

#[tokio::test]
async fn refusals_are_final() {
    let (mut servers, fake) = (JoinSet::new(), Fake::default());
    let scripts = vec![
        Err(Reason::InvalidRequest.status("no")),
        Ok(vec![started(), Err(Reason::NonFinite.status("not a number"))]),
    ];
    let address = fake.start(&mut servers, scripts).await;
    let client = Client::new([address], options()).unwrap();
    for (code, message) in [(Code::InvalidArgument, "no"), (Code::Internal, "not a number")] {
        let error = events(&client).await.unwrap_err();
        assert!(matches!(error, GenerateError::Refused(_)), "{error}");
        assert_eq!((error.status().code(), error.to_string()), (code, message.to_owned()));
    }
    assert_eq!(fake.resumes().len(), 2);
}

#[tokio::test]
async fn a_deadline_bounds_all_attempts_together() {
    let (mut servers, fake) = (JoinSet::new(), Fake::default());
    // After these it hangs.
    let scripts = vec![Err(draining()), Ok(vec![started(), Err(draining())])];
    let address = fake.start(&mut servers, scripts).await;
    let client = Client::new([address], options()).unwrap();
    let mut request = Request::new(GenerateRequest::default());
    request.set_timeout(Duration::from_millis(400));
    let begun = Instant::now();
    let mut generation = client.generate(request).await.unwrap();
    assert!(matches!(generation.next().await, Ok(Some(Event::Started(_)))));
    assert!(generation.next().await.is_err());
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert!(matches!(generation.next().await, Ok(None)), "nothing comes after an error");
}

#[tokio::test]
async fn addresses_are_checked() {
    assert!(Client::new([""; 0], options()).is_err());
    for wrong in ["nowhere", "http://127.0.0.1:1", "127.0.0.1:1/path", ""] {
        let error = Client::new([wrong], options()).unwrap_err().to_string();
        assert!(error.contains("HOST:PORT") && error.contains(wrong), "{error}");
    }
    let error = Client::connect(["127.0.0.1:1"], options()).await.unwrap_err().to_string();
    assert_eq!(error, "no server answers at 127.0.0.1:1");
}
