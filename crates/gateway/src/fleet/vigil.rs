//! Follows one worker's load reports, which are its heartbeat.

use std::error::Error;
use std::io;
use std::sync::Weak;
use std::time::Duration;

use tercet_proto::v1::{self, worker_client::WorkerClient};
use tokio::task::JoinSet;
use tokio::time::{self, Instant, MissedTickBehavior};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::Link;
use super::pulse::Pulse;

/// First wait before reports are asked for again; doubles with each failure in a row. The first
/// time they break off nothing is waited: whether the worker is gone is known from the answer.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest such wait.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Returns the tasks that follow a worker until its link is dropped.
pub(super) fn keep(link: Weak<Link>, channel: Channel, suspect_after: Duration) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(follow(link.clone(), channel, suspect_after));
    tasks.spawn(look(link, suspect_after));
    tasks
}

/// Looks at the clock.
async fn look(link: Weak<Link>, suspect_after: Duration) {
    let mut beat = time::interval(Pulse::beat(suspect_after));
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        let Some(link) = link.upgrade() else { return };
        link.look(Instant::now());
    }
}

/// Asks for reports again and again.
async fn follow(link: Weak<Link>, channel: Channel, suspect_after: Duration) {
    let mut client = WorkerClient::new(channel);
    let beat = Pulse::beat(suspect_after).as_millis();
    let interval_millis = u32::try_from(beat).unwrap_or(u32::MAX);
    let mut wait = Duration::ZERO;
    loop {
        let ended = match client.watch_load(v1::WatchLoadRequest { interval_millis }).await {
            Ok(reports) => {
                let mut reports = reports.into_inner();
                let mut first = true;
                loop {
                    match reports.message().await {
                        Ok(Some(report)) => {
                            let Some(link) = link.upgrade() else { return };
                            link.take_in(report, first, Instant::now());
                            (first, wait) = (false, Duration::ZERO);
                        }
                        Ok(None) => break None,
                        Err(status) => break Some(status),
                    }
                }
            }
            Err(status) => Some(status),
        };
        let Some(link) = link.upgrade() else { return };
        match ended {
            Some(status) if status.code() == Code::Unimplemented => return link.give_up(),
            Some(status) if is_refused(&status) => link.refuse(),
            Some(_) | None => link.lose(),
        }
        drop(link);
        time::sleep(wait).await;
        wait = (wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT);
    }
}

/// Returns whether a connection was refused: the host answers, and nobody listens.
fn is_refused(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        let refused = error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if refused {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_found_below_the_error_of_the_transport() {
        let error = |kind| {
            let error = io::Error::from(kind);
            Status::from_error(Box::new(tonic::ConnectError(Box::new(error))))
        };
        assert!(is_refused(&error(io::ErrorKind::ConnectionRefused)));
        assert!(!is_refused(&error(io::ErrorKind::TimedOut)));
        assert!(!is_refused(&Status::unavailable("connection refused")));
    }
}
