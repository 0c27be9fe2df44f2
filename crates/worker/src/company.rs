//! Which requests are computed beside each other: all, except beside one that workers crashed with
//! and that is tried alone.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock},
    time::{self, Instant},
};
use tonic::Status;

use crate::{core::Hosted, failure, inference::passed};

/// Longest that new requests are held up by one that waits for the others to end, so as to be
/// alone: it is refused then.
const PATIENCE: Duration = Duration::from_secs(5);

/// The rule for all models of a worker: a crash ends them together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Floor(Arc<RwLock<()>>);

/// A request's place among the others. Given up when dropped.
#[derive(Debug)]
pub(crate) struct Company(Option<Place>);

#[derive(Debug)]
enum Place {
    Shared { _guard: OwnedRwLockReadGuard<()> },
    Alone { guard: OwnedRwLockWriteGuard<()>, tokens: usize },
}

impl Company {
    /// Waits until a request may be computed: alone for that many tokens, or with others if that
    /// is 0.
    pub(crate) async fn enter(
        model: &Hosted,
        alone_tokens: u32,
        deadline: Option<Instant>,
    ) -> Result<Self, Status> {
        let floor = Arc::clone(&model.floor.0);
        let entered = async {
            if alone_tokens == 0 {
                return Ok(Place::Shared { _guard: floor.read_owned().await });
            }
            let alone = time::timeout(PATIENCE, floor.write_owned()).await;
            let guard = alone.map_err(|_| {
                model.overloaded("others are computed here, and this request must not be".into())
            })?;
            let tokens = usize::try_from(alone_tokens).unwrap_or(usize::MAX);
            Ok(Place::Alone { guard, tokens })
        };
        let place = tokio::select! {
            biased;
            () = model.evicted.cancelled() => Err(model.draining()),
            () = passed(deadline) => Err(failure::deadline()),
            place = entered => place,
        };
        Ok(Self(Some(place?)))
    }

    /// Counts tokens; lets others in after as many as the request is to be alone for.
    pub(crate) fn pay(&mut self, paid: usize) {
        self.0 = match self.0.take() {
            Some(Place::Alone { guard, tokens }) if tokens <= paid => {
                Some(Place::Shared { _guard: guard.downgrade() })
            }
            Some(Place::Alone { guard, tokens }) => {
                Some(Place::Alone { guard, tokens: tokens - paid })
            }
            shared => shared,
        };
    }
}
