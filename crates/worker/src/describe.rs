//! The `Worker` service.

use std::sync::Arc;

use tercet_proto::v1::{self, worker_server::Worker};
use tonic::{Request, Response, Status};

use crate::core::{Core, Hosted, Phase, wire};

/// Tells what the worker holds.
#[derive(Clone, Debug)]
pub(crate) struct DescribeService {
    core: Arc<Core>,
}

impl DescribeService {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }
}

#[tonic::async_trait]
impl Worker for DescribeService {
    async fn describe(
        &self,
        _request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        let core = &self.core;
        let held = core.models().into_iter().filter_map(|model| held(&model));
        Ok(Response::new(v1::DescribeResponse {
            worker_id: core.config.id.to_string(),
            epoch: core.config.epoch,
            models: held.collect(),
        }))
    }
}

/// Returns what is held of a model, if it is in memory.
fn held(model: &Hosted) -> Option<v1::HeldModel> {
    let loaded = model.loaded()?;
    let identity = match model.phase() {
        Phase::Ready(identity) => identity,
        Phase::Loading(_) | Phase::Draining => Arc::from(""),
    };
    let facts = &model.facts;
    Some(v1::HeldModel {
        model: Some(facts.info(&identity)),
        layers: Some(v1::LayerRange {
            start: wire(facts.layers.start),
            end: wire(facts.layers.end),
        }),
        layer_count: wire(facts.config.layers),
        header_digest: facts.header_digest.to_vec(),
        parts: parts(&loaded.parts),
    })
}

/// Returns digests as they are written on the wire.
pub(crate) fn parts(parts: &[(String, [u8; 32])]) -> Vec<v1::PartDigest> {
    let digests = parts
        .iter()
        .map(|(part, digest)| v1::PartDigest { part: part.clone(), digest: digest.to_vec() });
    digests.collect()
}
