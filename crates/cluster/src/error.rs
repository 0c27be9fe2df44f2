use std::{io, path::PathBuf};

use thiserror::Error;

use crate::{InvalidName, WorkerId};

/// Why the registry did not do as asked.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// The fault of the configuration.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The fault of the configuration.
    #[error("no etcd endpoint is given: name at least one, such as http://127.0.0.1:2379")]
    NoEndpoint,
    /// The fault of the configuration.
    #[error("`{endpoint}` is not an etcd endpoint: {reason}")]
    InvalidEndpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The fault of the configuration.
    #[error("read {what} from {path}")]
    File {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// The fault of the configuration.
    #[error("the TLS settings for etcd cannot be used: {0}")]
    Tls(String),
    /// The fault of the configuration, here or in etcd.
    #[error("etcd refuses {who}: {reason}; check the user, its password and its role")]
    Refused {
        /// Whom.
        who: String,
        /// What etcd says.
        reason: String,
    },
    /// A later incarnation of the same worker is registered; this one must not serve under its name.
    #[error("worker `{id}` is registered with epoch {theirs}, later than {ours}: it was replaced")]
    Superseded {
        /// Name of both.
        id: WorkerId,
        /// Epoch of the record refused.
        ours: u64,
        /// Epoch of the record stored.
        theirs: u64,
    },
    /// The registry has been shut down.
    #[error("the registry is closed")]
    Closed,
    /// The thread that talks to etcd could not be started.
    #[error("start the membership thread: {0}")]
    Thread(#[source] io::Error),
}
