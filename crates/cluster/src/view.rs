use std::{collections::BTreeMap, sync::Arc};

use crate::{WorkerId, WorkerRecord};

/// The workers of a cluster as last known.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct View {
    /// The workers by name.
    pub workers: BTreeMap<WorkerId, Arc<WorkerRecord>>,
    /// Grows with the registry's history; 0 before anything is known.
    pub revision: u64,
    /// Whether the registry stands behind this view now. While it does not (before the first answer
    /// and through an outage), the workers are those last known.
    pub current: bool,
}
