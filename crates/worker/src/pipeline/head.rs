//! The head of a pipeline: finds the later stages, connects them, and does so again when they break.
//!
//! ```text
//! searching --chain answers, digests complete--> warming --> ready
//!     ^                                            |           |
//!     +---- link lost, or retired when idle -------+-----------+
//!                                             (a stage drains: nothing new, then retired)
//! ```

use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};

use tercet_cluster::{ModelRecord, View, WorkerRecord, WorkerState};
use tercet_engine::{Attachment, Engine, model_file};
use tercet_proto::{Reason, v1};
use tokio::{sync::watch, time};
use tonic::Status;

use super::{link::Link, wire};
use crate::{
    config::epoch_now,
    core::{Hosted, Loaded, Phase, wire as number},
    hosting::warm_up,
};

/// First pause after no chain could be connected; doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Most chains tried before the next pause.
const MOST_CHAINS: usize = 16;

/// What a head waits for.
const SEARCHING: &str = "the later stages of the pipeline are not connected";
/// What a head waits for.
const RETIRING: &str = "a later stage of the pipeline is about to stop";

/// Leads a pipeline for ever.
pub(crate) async fn lead(
    model: Arc<Hosted>,
    engine: Arc<Engine>,
    loaded: &Loaded,
    mut views: watch::Receiver<Arc<View>>,
) -> Infallible {
    let mut epoch = model.config.epoch;
    let mut pause = FIRST_PAUSE;
    loop {
        model.enter(Phase::Loading(SEARCHING));
        let view = Arc::clone(&views.borrow_and_update());
        let chains = chains(&view, &model);
        let mut served = false;
        for chain in &chains {
            // Greater than all before, also those of this worker's earlier lives.
            epoch = epoch_now().max(epoch + 1);
            match Led::connect(&model, loaded, chain, epoch).await {
                Ok(led) => {
                    let ended = led.serve(&model, &engine, &mut views).await;
                    tracing::warn!(epoch, stages = ?names(chain), ended, "the pipeline is apart");
                    served = true;
                    break;
                }
                Err(status) => {
                    tracing::warn!(epoch, stages = ?names(chain), %status, "no pipeline");
                }
            }
        }
        if served {
            pause = FIRST_PAUSE;
            continue;
        }
        // Without a chain only a new view can help.
        let patience = if chains.is_empty() { None } else { Some(pause) };
        pause = (pause * 2).min(LONGEST_PAUSE);
        tokio::select! {
            changed = views.changed() => if changed.is_err() {
                time::sleep(LONGEST_PAUSE).await;
            },
            () = time::sleep(patience.unwrap_or_default()), if patience.is_some() => {}
        }
    }
}

fn names(chain: &[&WorkerRecord]) -> Vec<String> {
    chain.iter().map(|worker| worker.id.to_string()).collect()
}

/// Returns the chains of workers that continue the layers held here to the end of the same model,
/// those of lower names first.
fn chains<'a>(view: &'a View, model: &Hosted) -> Vec<Vec<&'a WorkerRecord>> {
    let own = model.record(&Phase::Loading(""));
    let mut found = Vec::new();
    extend_chain(view, &own, own.layers.end, &mut Vec::new(), &mut found);
    found
}

fn extend_chain<'a>(
    view: &'a View,
    model: &ModelRecord,
    from: u32,
    chain: &mut Vec<&'a WorkerRecord>,
    found: &mut Vec<Vec<&'a WorkerRecord>>,
) {
    if from == model.layer_count {
        found.push(chain.clone());
        return;
    }
    for worker in view.workers.values() {
        if found.len() == MOST_CHAINS {
            return;
        }
        let held = worker.models.iter().find(|held| {
            held.name == model.name
                && held.header_digest == model.header_digest
                && held.layer_count == model.layer_count
                && held.layers.start == from
                && (from + 1..=model.layer_count).contains(&held.layers.end)
        });
        if let Some(held) = held
            && worker.state == WorkerState::Ready
        {
            chain.push(worker);
            extend_chain(view, model, held.layers.end, chain, found);
            chain.pop();
        }
    }
}

/// A connected pipeline.
struct Led {
    epoch: u64,
    link: Link,
    /// Names and epochs of the later stages.
    stages: Vec<(tercet_cluster::WorkerId, u64)>,
    identity: Arc<str>,
}

impl Led {
    /// Connects a chain and checks that it makes a whole model.
    async fn connect(
        model: &Hosted,
        loaded: &Loaded,
        chain: &[&WorkerRecord],
        epoch: u64,
    ) -> Result<Self, Status> {
        let mut addresses = chain.iter().map(|worker| worker.address.clone());
        let Some(next) = addresses.next() else {
            return Err(Reason::PipelineBroken.status("the chain is empty"));
        };
        let hello = v1::Hello {
            model: model.facts.name.clone(),
            header_digest: model.facts.header_digest.to_vec(),
            epoch,
            first_layer: number(model.facts.layers.end),
            next_addresses: addresses.collect(),
            head: model.config.id.to_string(),
        };
        let link = Link::open(&next, hello).await?;
        let identity =
            identity(&model.facts.header_digest, model.facts.config.layers, loaded, &link.parts)?;
        let stages = chain.iter().map(|worker| (worker.id.clone(), worker.epoch)).collect();
        Ok(Self { epoch, link, stages, identity: identity.into() })
    }

    /// Computes with the pipeline until it breaks or a stage wants to go; returns what happened.
    async fn serve(
        mut self,
        model: &Arc<Hosted>,
        engine: &Arc<Engine>,
        views: &mut watch::Receiver<Arc<View>>,
    ) -> String {
        engine.attach(Attachment {
            downstream: Box::new(self.link.downstream()),
            epoch: self.epoch,
            stages: self.stages.len() + 1,
            kv_pages: self.link.kv_pages,
        });
        let ended = self.run(model, engine, views).await;
        model.enter(Phase::Loading(SEARCHING));
        engine.detach(self.epoch, &ended);
        ended
    }

    async fn run(
        &mut self,
        model: &Arc<Hosted>,
        engine: &Arc<Engine>,
        views: &mut watch::Receiver<Arc<View>>,
    ) -> String {
        // Runs beside the loop that brings its results.
        let mut warming = pin!(warm_up(engine));
        let (mut warm, mut watching, mut retiring) = (false, true, false);
        loop {
            tokio::select! {
                result = self.link.result() => {
                    let read = match result {
                        Ok(result) => wire::read_result(result).map_err(|error| error.to_string()),
                        Err(status) => Err(status.message().to_owned()),
                    };
                    match read {
                        Ok(result) => engine.deliver(self.epoch, result),
                        Err(ended) => return ended,
                    }
                }
                warmed = &mut warming, if !warm => match warmed {
                    Ok(()) => {
                        warm = true;
                        let stages = self.stages.len() + 1;
                        tracing::info!(epoch = self.epoch, stages, "the pipeline is ready");
                        if !retiring {
                            model.enter(Phase::Ready(Arc::clone(&self.identity)));
                        }
                    }
                    Err(failed) => return format!("the warm-up failed: {failed}"),
                },
                // That a stage is missing from the registry means nothing: the link tells.
                changed = views.changed(), if watching => {
                    watching = changed.is_ok();
                    if !retiring && self.drains(&views.borrow_and_update()) {
                        retiring = true;
                        model.enter(Phase::Loading(RETIRING));
                    }
                }
                () = model.active.idle(), if retiring => return RETIRING.to_owned(),
            }
        }
    }

    /// Returns whether a stage is about to stop.
    fn drains(&self, view: &View) -> bool {
        self.stages.iter().any(|(id, epoch)| {
            let stage = view.workers.get(id);
            stage.is_some_and(|stage| stage.epoch == *epoch && stage.state == WorkerState::Draining)
        })
    }
}

/// Returns the identity of the model that the parts held here and by the later stages make, which
/// must be all of it.
fn identity(
    header_digest: &[u8; 32],
    layers: usize,
    loaded: &Loaded,
    later: &[v1::PartDigest],
) -> Result<String, Status> {
    let mismatch = |what: String| Reason::ModelMismatch.status(what);
    let mut parts = loaded.parts.clone();
    for part in later {
        let digest = <[u8; 32]>::try_from(part.digest.as_slice()).map_err(|_| {
            mismatch(format!("the digest of {} has {} bytes", part.part, part.digest.len()))
        })?;
        parts.push((part.part.clone(), digest));
    }
    let due = ["embed".to_owned()]
        .into_iter()
        .chain((0..layers).map(|layer| format!("layer.{layer}")))
        .chain(["head".to_owned()]);
    if !due.eq(parts.iter().map(|(part, _)| part.clone())) {
        let names: Vec<&str> = parts.iter().map(|(part, _)| part.as_str()).collect();
        return Err(mismatch(format!("the stages do not make one model: {}", names.join(" "))));
    }
    Ok(model_file::identity(header_digest, &parts))
}

#[cfg(test)]
mod tests;
