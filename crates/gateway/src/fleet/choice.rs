//! Which workers can take a request now.

use tokio::time::Instant;

use super::{Group, Member, Routes, Want};
use crate::Candidate;

/// The workers that can take a request now: at least one.
#[derive(Debug)]
pub(super) struct Choice<'a> {
    pub(super) group: &'a Group,
    pub(super) members: Vec<&'a Member>,
    /// The members as a policy sees them.
    pub(super) candidates: Vec<Candidate<'a>>,
}

impl<'a> Choice<'a> {
    /// Returns the workers that can take a request now, or when one that is being left alone can
    /// be tried again.
    pub(super) fn among(
        routes: &'a Routes,
        want: &Want,
        now: Instant,
    ) -> Result<Self, Option<Instant>> {
        let group = routes.group(want).ok_or(None)?;
        let mut retry_at: Option<Instant> = None;
        let mut members = Vec::with_capacity(group.members.len());
        let mut candidates = Vec::with_capacity(group.members.len());
        for member in &group.members {
            let link = &member.link;
            let (streams, tokens) = link.load();
            if link.answer().is_suspect()
                || link.is_alone()
                || (want.alone && streams > 0)
                || link.is_draining(&want.model, member.generation)
            {
                continue;
            }
            if let Some(until) = link.ejected_until(&want.model, now) {
                retry_at = Some(retry_at.map_or(until, |earliest| earliest.min(until)));
                continue;
            }
            candidates.push(Candidate {
                worker: link.worker(),
                streams,
                tokens,
                max_sequences: member.max_sequences,
                reported: link.reported(&want.model, now),
                slow: link.is_slow(&want.model, now),
            });
            members.push(member);
        }
        if members.is_empty() { Err(retry_at) } else { Ok(Self { group, members, candidates }) }
    }
}
