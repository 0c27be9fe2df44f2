//! The public service as it is served: `Generate` passes messages on as they came, all else is
//! generated code.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use tercet_proto::raw::ServerCodec;
use tercet_proto::v1;
use tercet_proto::v1::inference_server::InferenceServer;
use tonic::body::Body;
use tonic::codegen::{Service as TowerService, http};
use tonic::server::{Grpc, NamedService, ServerStreamingService};
use tonic::{Request, Response, Status};

use crate::relay::Messages;
use crate::service::Service;

/// Path of the call that streams.
pub(crate) const GENERATE: &str = "/tercet.v1.Inference/Generate";

type Answer = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

/// The gateway's `tercet.v1.Inference` for a server.
#[derive(Clone, Debug)]
pub(crate) struct Front {
    service: Service,
    rest: InferenceServer<Service>,
}

/// `Generate`, for tonic.
struct Generate(Service);

impl Front {
    pub(crate) fn new(service: Service) -> Self {
        Self { rest: InferenceServer::new(service.clone()), service }
    }
}

impl NamedService for Front {
    const NAME: &'static str = InferenceServer::<Service>::NAME;
}

impl TowerService<http::Request<Body>> for Front {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Answer {
        if request.uri().path() != GENERATE {
            return self.rest.call(request);
        }
        let generate = Generate(self.service.clone());
        Box::pin(
            async move { Ok(Grpc::new(ServerCodec).server_streaming(generate, request).await) },
        )
    }
}

impl ServerStreamingService<v1::GenerateRequest> for Generate {
    type Response = Bytes;
    type ResponseStream = Messages;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Messages>, Status>> + Send>>;

    fn call(&mut self, request: Request<v1::GenerateRequest>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move { service.relay(request).await })
    }
}
