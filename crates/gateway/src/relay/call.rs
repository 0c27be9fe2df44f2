//! The call that asks a worker to generate, with answers as they come.

use bytes::Bytes;
use tercet_proto::raw::ClientCodec;
use tercet_proto::v1;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use crate::front::GENERATE;

/// Opens a stream of encoded messages.
pub(super) async fn generate(
    channel: Channel,
    request: Request<v1::GenerateRequest>,
) -> Result<Streaming<Bytes>, Status> {
    let mut client = Grpc::new(channel);
    // What generated code answers too.
    client.ready().await.map_err(|error| Status::unknown(format!("worker not ready: {error}")))?;
    let path = PathAndQuery::from_static(GENERATE);
    let response = client.server_streaming(request, path, ClientCodec).await?;
    Ok(response.into_inner())
}
