//! The worker's place in the registry, kept in step with its models.

use std::sync::Arc;

use tercet_cluster::{ClusterError, Registry};
use tokio_util::sync::CancellationToken;

use crate::core::Core;

/// Registers the worker and tells every change of its models, until `done`; then leaves.
///
/// An unreachable registry delays this and nothing else.
pub(crate) async fn take_part(
    core: Arc<Core>,
    registry: Arc<dyn Registry>,
    done: CancellationToken,
) -> Result<(), ClusterError> {
    let mut changes = core.changes();
    let first = core.record();
    let registered = done.run_until_cancelled(registry.register(first)).await;
    let Some(mut registration) = registered.transpose()? else { return Ok(()) };
    loop {
        changes.mark_unchanged();
        let wanted = core.record();
        if *registration.record() != wanted {
            tokio::select! {
                updated = registration.update(|record| *record = wanted) => updated?,
                // What is newer is told instead; what was told already is stored in any case.
                changed = changes.changed() => if changed.is_ok() { continue } else { break },
                () = done.cancelled() => break,
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { break },
            () = done.cancelled() => break,
        }
    }
    registration.leave().await;
    Ok(())
}
