//! The worker's place in the registry, kept in step with its models.

use std::{sync::Arc, time::Duration};

use tercet_cluster::{ClusterError, Registry};
use tokio::time;
use tokio_util::sync::CancellationToken;

use crate::core::Core;

/// How often the measured rates are looked at: the registry tells what a worker is, its load
/// reports tell how it does.
const RATES_PERIOD: Duration = Duration::from_secs(60);

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
        if !registration.record().is_near(&wanted) {
            tokio::select! {
                updated = registration.update(|record| *record = wanted) => updated?,
                // What is newer is told instead; what was told already is stored in any case.
                changed = changes.changed() => if changed.is_ok() { continue } else { break },
                () = done.cancelled() => break,
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { break },
            () = time::sleep(RATES_PERIOD) => {}
            () = done.cancelled() => break,
        }
    }
    registration.leave().await;
    Ok(())
}
