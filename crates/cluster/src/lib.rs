//! Membership: workers under a lease, watched by gateways; etcd and in-memory.
//!
//! ```text
//! worker  -- register, update, leave -->  Registry  -- View: who is there -->  gateway, head stage
//!                                         MemoryRegistry | EtcdRegistry
//! ```
//!
//! A registry is slow truth: it says who should be there. Whether a worker answers is for its
//! callers to find out. Readers keep the last good [`View`] through any outage of the control
//! plane, and the view says whether it is current.

mod error;
mod etcd;
mod memory;
mod record;
mod registration;
#[cfg(test)]
mod suite;
mod view;

pub use self::{
    error::ClusterError,
    etcd::{EtcdCredentials, EtcdOptions, EtcdPassword, EtcdRegistry, EtcdTls},
    memory::MemoryRegistry,
    record::{
        ClusterName, InvalidName, InvalidRate, LayerRange, ModelRecord, ModelState, Rate,
        RecordError, WorkerId, WorkerRecord, WorkerState,
    },
    registration::Registration,
    view::View,
};

use std::{fmt::Debug, sync::Arc};

use futures::future::BoxFuture;
use tokio::sync::watch;

/// Where workers register and readers watch them.
pub trait Registry: Debug + Send + Sync {
    /// Stores a worker's record until its [`Registration`] leaves, is dropped, or its process dies.
    ///
    /// Returns once readers can see the record, however long the control plane stays away: put a
    /// deadline around it if waiting is wrong. Dropping the future withdraws the record.
    ///
    /// # Errors
    /// [`ClusterError::Superseded`] when a later incarnation of the worker is registered,
    /// [`ClusterError::Refused`] when the control plane never let this process in.
    fn register(&self, record: WorkerRecord) -> BoxFuture<'_, Result<Registration, ClusterError>>;

    /// Returns the view of all workers, which changes as they do.
    fn watch(&self) -> watch::Receiver<Arc<View>>;
}
