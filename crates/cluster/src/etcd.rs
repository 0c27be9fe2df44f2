//! The registry in etcd v3: `/tercet/{cluster}/workers/{id}`, each under the worker's lease.

mod endpoints;
mod follow;
mod lease;
mod stubs;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc, thread, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use tokio::{
    runtime,
    sync::{mpsc, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{endpoints::Endpoints, follow::Follower, lease::Tenant};
use crate::{ClusterError, ClusterName, Registration, Registry, View, WorkerId, WorkerRecord};

/// Registrations under way at once before callers wait; a process has one worker.
const QUEUE: usize = 4;

/// Where etcd is and how it is used.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// Members of the etcd cluster, `http://HOST:PORT` or `HOST:PORT`; tried in turn.
    pub endpoints: Vec<String>,
    /// The cluster to register in and to watch.
    pub cluster: ClusterName,
    /// How long a worker that vanished stays registered; etcd takes whole seconds, at least 2.
    pub lease_ttl: Duration,
}

impl EtcdOptions {
    /// Returns options with a lease of 10 seconds.
    ///
    /// Whether a worker lives is seen on its connections, far sooner; the lease only has to
    /// outlast the hiccups of a busy machine.
    pub fn new(endpoints: Vec<String>, cluster: ClusterName) -> Self {
        Self { endpoints, cluster, lease_ttl: Duration::from_secs(10) }
    }
}

/// A registry in etcd.
///
/// Everything that talks to etcd runs on a thread of its own, so that neither computation nor a
/// crowded runtime delays a lease renewal. The thread ends when the registry and all registrations
/// are gone; receivers of the view then hold its last state.
pub struct EtcdRegistry {
    options: EtcdOptions,
    tenants: mpsc::Sender<Tenant>,
    view: watch::Receiver<Arc<View>>,
}

impl EtcdRegistry {
    /// Starts to follow the cluster. Does not wait for etcd, which may be away.
    ///
    /// # Errors
    /// When an endpoint is malformed or the thread cannot be started.
    pub fn connect(options: EtcdOptions) -> Result<Self, ClusterError> {
        let endpoints = Endpoints::parse(&options.endpoints)?;
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ClusterError::Thread)?;
        let (tenants, inbox) = mpsc::channel(QUEUE);
        let (view_in, view) = watch::channel(Arc::default());
        let (prefix, ttl) = (prefix(&options.cluster), options.lease_ttl);
        thread::Builder::new()
            .name("tercet-cluster".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    let endpoints = Arc::new(Endpoints::new(&endpoints));
                    // A worker notices within half a lease that a new store does not know it.
                    let grace = ttl * 2;
                    let follower = Follower::new(Arc::clone(&endpoints), prefix, grace, view_in);
                    serve(endpoints, follower, inbox, ttl).await;
                });
            })
            .map_err(ClusterError::Thread)?;
        Ok(Self { options, tenants, view })
    }

    fn key(&self, id: &WorkerId) -> String {
        format!("{}{id}", prefix(&self.options.cluster))
    }
}

/// Returns what the keys of a cluster's workers begin with.
fn prefix(cluster: &ClusterName) -> String {
    format!("/tercet/{cluster}/workers/")
}

/// Runs the membership thread.
async fn serve(
    endpoints: Arc<Endpoints>,
    follower: Follower,
    mut inbox: mpsc::Receiver<Tenant>,
    ttl: Duration,
) {
    let tasks = TaskTracker::new();
    let closed = CancellationToken::new();
    tasks.spawn({
        let closed = closed.clone();
        async move { closed.run_until_cancelled(follower.run()).await }
    });
    while let Some(tenant) = inbox.recv().await {
        tasks.spawn(tenant.keep(Arc::clone(&endpoints), ttl));
    }
    closed.cancel();
    tasks.close();
    // Registrations outlive the registry.
    tasks.wait().await;
}

impl Registry for EtcdRegistry {
    fn register(&self, record: WorkerRecord) -> BoxFuture<'_, Result<Registration, ClusterError>> {
        async move {
            let (mut keeper, tenant) = lease::registration(self.key(&record.id), &record);
            self.tenants.send(tenant).await.map_err(|_| ClusterError::Closed)?;
            keeper.stored().await?;
            Ok(Registration::new(record, Box::new(keeper)))
        }
        .boxed()
    }

    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }
}

impl fmt::Debug for EtcdRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdRegistry").field("options", &self.options).finish_non_exhaustive()
    }
}
