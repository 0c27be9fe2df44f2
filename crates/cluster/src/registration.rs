use std::fmt;

use futures::future::BoxFuture;

use crate::{ClusterError, WorkerId, WorkerRecord};

/// What a backend does for one registered worker. Dropping it withdraws the record, best effort.
pub(crate) trait Keeper: Send + Sync {
    /// Stores the record anew; returns once readers can see it. When the future is dropped, the
    /// record is stored all the same.
    fn put(&mut self, record: &WorkerRecord) -> BoxFuture<'_, Result<(), ClusterError>>;

    /// Withdraws the record; returns once that is done or given up.
    fn leave(self: Box<Self>) -> BoxFuture<'static, ()>;
}

/// A worker's place in the registry. Dropping it leaves, best effort.
pub struct Registration {
    record: WorkerRecord,
    keeper: Box<dyn Keeper>,
}

impl Registration {
    pub(crate) fn new(record: WorkerRecord, keeper: Box<dyn Keeper>) -> Self {
        Self { record, keeper }
    }

    /// Returns the record as last told to the registry.
    pub fn record(&self) -> &WorkerRecord {
        &self.record
    }

    /// Changes the record. The name and the epoch stay, whatever `change` does to them.
    ///
    /// Returns once readers can see the change, however long the control plane stays away. When the
    /// future is dropped before, the change is stored all the same as soon as that is possible.
    ///
    /// # Errors
    /// [`ClusterError::Superseded`] when a later incarnation of the worker has registered.
    pub async fn update(
        &mut self,
        change: impl FnOnce(&mut WorkerRecord),
    ) -> Result<(), ClusterError> {
        let (id, epoch): (WorkerId, u64) = (self.record.id.clone(), self.record.epoch);
        change(&mut self.record);
        self.record.id = id;
        self.record.epoch = epoch;
        self.keeper.put(&self.record).await
    }

    /// Withdraws the record. Returns once readers no longer see it, or, when the control plane does
    /// not answer, after a few seconds; the record then lapses with its lease.
    pub async fn leave(self) {
        self.keeper.leave().await;
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("record", &self.record).finish_non_exhaustive()
    }
}
