//! What happens to workers.

use std::time::Duration;

use anyhow::Result;
use tercet_tests::Dice;
use tokio::time::{self, Instant};

use super::cluster::{Cluster, MEMBERS, RELAYED, SPARE};

/// When a fault begins, in milliseconds after the streams.
const AT: std::ops::Range<u32> = 20..800;
/// How long one that ends by itself lasts.
const LASTS: std::ops::Range<u32> = 100..2500;

/// Ways in which things go wrong, or change.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Kind {
    /// `kill -9`.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Stop,
    /// Nothing reaches the worker or comes from it, for a while.
    Partition,
    /// Its connections are reset.
    Reset,
    /// It computes more slowly, or its network is bad, for a while.
    Slow,
    /// It answers and reports, and computes nothing, for a while.
    Hang,
    /// SIGTERM.
    Drain,
    /// A new worker comes.
    Join,
}

impl Kind {
    pub(super) const ALL: [Self; 8] = [
        Self::Kill,
        Self::Stop,
        Self::Partition,
        Self::Reset,
        Self::Slow,
        Self::Hang,
        Self::Drain,
        Self::Join,
    ];
}

/// Something that happens to one worker.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) kind: Kind,
    /// To which of [`MEMBERS`].
    pub(super) member: usize,
    /// After the streams began.
    pub(super) at: Duration,
    /// Until it is undone; after the trial if that is over before.
    pub(super) lasts: Duration,
    /// Which of two ways.
    pub(super) other_way: bool,
}

/// Draws what happens in a trial: a fault of one kind, in one of three trials another one.
pub(super) fn draw(dice: &mut Dice, first: Kind, kinds: &[Kind]) -> Vec<Fault> {
    let mut members: Vec<usize> = MEMBERS.collect();
    let second = dice.once_in(3).then(|| *dice.pick(kinds));
    let mut faults = Vec::new();
    for kind in std::iter::once(first).chain(second) {
        let can: Vec<usize> = match kind {
            Kind::Join => vec![SPARE],
            Kind::Reset => members.iter().copied().filter(|one| RELAYED.contains(one)).collect(),
            _ => members.clone(),
        };
        let member = *dice.pick(&can);
        members.retain(|left| *left != member);
        let (at, lasts) = (dice.millis(AT), dice.millis(LASTS));
        faults.push(Fault { kind, member, at, lasts, other_way: dice.once_in(2) });
    }
    // There is one spare.
    if let [Fault { kind: Kind::Join, .. }, second] = faults.as_mut_slice()
        && second.kind == Kind::Join
    {
        faults.pop();
    }
    faults
}

/// Makes faults happen, each at its time, and undoes those that end during the trial.
pub(super) async fn play(cluster: &mut Cluster, faults: &[Fault]) -> Result<()> {
    let begun = Instant::now();
    let mut steps: Vec<(Duration, bool, Fault)> = Vec::new();
    for fault in faults {
        steps.push((fault.at, true, *fault));
        steps.push((fault.at + fault.lasts, false, *fault));
    }
    steps.sort_by_key(|(at, ..)| *at);
    for (at, begins, fault) in steps {
        time::sleep_until(begun + at).await;
        if begins { cluster.begin(fault).await? } else { cluster.end(fault)? }
    }
    Ok(())
}
