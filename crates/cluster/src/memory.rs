use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt as _, ready};
use tokio::sync::watch;

use crate::{
    ClusterError, Registration, Registry, View, WorkerId, WorkerRecord, registration::Keeper,
};

/// A registry in the memory of one process: for a gateway and workers that share it.
#[derive(Clone, Debug)]
pub struct MemoryRegistry {
    view: watch::Sender<Arc<View>>,
}

impl MemoryRegistry {
    /// Returns an empty registry; its clones are the same registry.
    pub fn new() -> Self {
        Self { view: watch::Sender::new(Arc::new(View { current: true, ..View::default() })) }
    }

    /// Stores `record` unless a later incarnation is stored.
    fn put(&self, record: &WorkerRecord) -> Result<(), ClusterError> {
        let mut refused = None;
        self.view.send_if_modified(|view| {
            match view.workers.get(&record.id) {
                Some(stored) if stored.epoch > record.epoch => {
                    refused = Some(stored.epoch);
                    return false;
                }
                Some(stored) if **stored == *record => return false,
                _ => {}
            }
            let view = Arc::make_mut(view);
            view.workers.insert(record.id.clone(), Arc::new(record.clone()));
            view.revision += 1;
            true
        });
        match refused {
            None => Ok(()),
            Some(theirs) => {
                Err(ClusterError::Superseded { id: record.id.clone(), ours: record.epoch, theirs })
            }
        }
    }

    /// Removes the record of that incarnation.
    fn remove(&self, id: &WorkerId, epoch: u64) {
        self.view.send_if_modified(|view| {
            if view.workers.get(id).is_none_or(|stored| stored.epoch != epoch) {
                return false;
            }
            let view = Arc::make_mut(view);
            view.workers.remove(id);
            view.revision += 1;
            true
        });
    }
}

impl Default for MemoryRegistry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry for MemoryRegistry {
    fn register(&self, record: WorkerRecord) -> BoxFuture<'_, Result<Registration, ClusterError>> {
        let stored = self.put(&record).map(|()| {
            let keeper =
                MemoryKeeper { registry: self.clone(), id: record.id.clone(), epoch: record.epoch };
            Registration::new(record, Box::new(keeper))
        });
        ready(stored).boxed()
    }

    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }
}

struct MemoryKeeper {
    registry: MemoryRegistry,
    id: WorkerId,
    epoch: u64,
}

impl Keeper for MemoryKeeper {
    fn put(&mut self, record: &WorkerRecord) -> BoxFuture<'_, Result<(), ClusterError>> {
        ready(self.registry.put(record)).boxed()
    }

    fn leave(self: Box<Self>) -> BoxFuture<'static, ()> {
        drop(self);
        ready(()).boxed()
    }
}

impl Drop for MemoryKeeper {
    fn drop(&mut self) {
        self.registry.remove(&self.id, self.epoch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! on_memory {
        ($($behaviour:ident)*) => {$(
            #[tokio::test]
            async fn $behaviour() {
                crate::suite::$behaviour(&MemoryRegistry::new()).await;
            }
        )*};
    }
    crate::suite::every_behaviour!(on_memory);
}
