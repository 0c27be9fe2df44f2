//! The worker's place in the registry, kept in step with its phase.

use std::sync::Arc;

use tercet_cluster::{ClusterError, Registry};
use tokio_util::sync::CancellationToken;

use crate::core::Core;

/// Registers the worker and tells every change of its phase, until `done`; then leaves.
///
/// An unreachable registry delays this and nothing else.
pub(crate) async fn take_part(
    core: Arc<Core>,
    registry: Arc<dyn Registry>,
    done: CancellationToken,
) -> Result<(), ClusterError> {
    let mut phase = core.phase();
    let first = core.record(&phase.borrow_and_update());
    let registered = done.run_until_cancelled(registry.register(first)).await;
    let Some(mut registration) = registered.transpose()? else { return Ok(()) };
    loop {
        let wanted = core.record(&phase.borrow_and_update());
        if *registration.record() != wanted {
            tokio::select! {
                updated = registration.update(|record| *record = wanted) => updated?,
                // What is newer is told instead; what was told already is stored in any case.
                changed = phase.changed() => if changed.is_ok() { continue } else { break },
                () = done.cancelled() => break,
            }
        }
        tokio::select! {
            changed = phase.changed() => if changed.is_err() { break },
            () = done.cancelled() => break,
        }
    }
    registration.leave().await;
    Ok(())
}
