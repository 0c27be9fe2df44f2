//! The registry in etcd v3: `/tercet/{cluster}/workers/{id}`, each under the worker's lease.

mod access;
mod endpoints;
mod follow;
mod lease;
mod session;
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

pub use self::access::{EtcdCredentials, EtcdPassword, EtcdTls};
use self::{
    endpoints::{Endpoints, Plan, Refusal},
    follow::Follower,
    lease::Tenant,
};
use crate::{ClusterError, ClusterName, Registration, Registry, View, WorkerId, WorkerRecord};

/// Registrations under way at once before callers wait; a process has one worker.
const QUEUE: usize = 4;

/// Where etcd is and how it is used.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// Members of the etcd cluster, tried in turn: `http://HOST:PORT`, `https://HOST:PORT`, or
    /// `HOST:PORT`, which means the latter where `tls` has anything.
    pub endpoints: Vec<String>,
    /// The cluster to register in and to watch.
    pub cluster: ClusterName,
    /// How long a worker that vanished stays registered; etcd takes whole seconds, at least 2.
    pub lease_ttl: Duration,
    /// How connections to `https://` addresses are secured.
    pub tls: EtcdTls,
    /// Whom etcd is to take this process for; `None` for nobody in particular, or for the name in
    /// its certificate.
    pub credentials: Option<EtcdCredentials>,
}

impl EtcdOptions {
    /// Returns options with a lease of 3 seconds and without credentials.
    ///
    /// Whether a worker lives is seen on its connections, sooner, and one that answers stays in use
    /// when its lease lapses; so the lease only bounds how long the registry names the dead. A new
    /// leader of etcd counts all leases anew: after an outage, too, that is the bound.
    pub fn new(endpoints: Vec<String>, cluster: ClusterName) -> Self {
        Self {
            endpoints,
            cluster,
            lease_ttl: Duration::from_secs(3),
            tls: EtcdTls::default(),
            credentials: None,
        }
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
    refused: watch::Receiver<Option<Refusal>>,
}

impl EtcdRegistry {
    /// Starts to follow the cluster. Does not wait for etcd, which may be away.
    ///
    /// # Errors
    /// When an endpoint is malformed, a file cannot be used, or the thread cannot be started.
    pub fn connect(options: EtcdOptions) -> Result<Self, ClusterError> {
        let plan = Plan::new(&options)?;
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ClusterError::Thread)?;
        let (tenants, inbox) = mpsc::channel(QUEUE);
        let (view_in, view) = watch::channel(Arc::default());
        let (prefix, ttl) = (prefix(&options.cluster), options.lease_ttl);
        let endpoints = {
            let _driven_by = runtime.enter();
            Arc::new(Endpoints::new(plan, &options)?)
        };
        let refused = endpoints.refused();
        thread::Builder::new()
            .name("tercet-cluster".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    // A worker notices within half a lease that a new store does not know it.
                    let grace = ttl * 2;
                    let follower = Follower::new(Arc::clone(&endpoints), prefix, grace, view_in);
                    serve(endpoints, follower, inbox, ttl).await;
                });
            })
            .map_err(ClusterError::Thread)?;
        Ok(Self { options, tenants, view, refused })
    }

    /// Returns once etcd has said that it does not let this process take part, if it never did
    /// before. Whom it once let in, it may refuse for a while, such as during a change of
    /// passwords: then the last view stays, as in any outage, and this waits on.
    pub fn refused(&self) -> impl Future<Output = ClusterError> + Send + use<> {
        let mut refused = self.refused.clone();
        async move {
            let refusal =
                refused.wait_for(Option::is_some).await.ok().and_then(|told| told.clone());
            match refusal {
                Some(Refusal { user, reason }) => {
                    let who = user.map_or_else(
                        || "a process that names no user".to_owned(),
                        |user| format!("user `{user}`"),
                    );
                    ClusterError::Refused { who, reason }
                }
                None => std::future::pending().await,
            }
        }
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
    let view = follower.view.subscribe();
    let tasks = TaskTracker::new();
    let closed = CancellationToken::new();
    tasks.spawn({
        let closed = closed.clone();
        async move { closed.run_until_cancelled(follower.run()).await }
    });
    while let Some(tenant) = inbox.recv().await {
        tasks.spawn(tenant.keep(Arc::clone(&endpoints), ttl, view.clone()));
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
            tokio::select! {
                stored = keeper.stored() => stored?,
                refused = self.refused() => return Err(refused),
            }
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
