//! What workers report of their load, and what of it others than this gateway have put there.

use std::collections::BTreeMap;
use std::time::Duration;

use tercet_proto::v1;
use tokio::time::Instant;

/// What is known of a worker's load besides what this gateway sent there.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reported {
    /// Requests of all gateways that are computed there, for all models.
    pub running: usize,
    /// Requests of all gateways that wait there, for all models.
    pub waiting: usize,
    /// Tokens that all of these may still take.
    pub outstanding_tokens: u64,
    /// Requests that others than this gateway have there.
    pub other_streams: usize,
    /// Tokens that these may still take.
    pub other_tokens: u64,
    /// Tokens that fit into the KV memory of the model which no request holds.
    pub free_kv_tokens: u64,
    /// Tokens of the model generated per second of computing, all requests together; 0 until known.
    pub decode_tokens_per_second: f64,
    /// Tokens of prompts for the model read per second of computing; 0 until known.
    pub prefill_tokens_per_second: f64,
}

/// The last report of a worker.
#[derive(Debug, Default)]
pub(super) struct Reports {
    at: Option<Instant>,
    /// For all models; the fields of one model are empty.
    sum: Reported,
    models: BTreeMap<String, v1::ModelLoad>,
}

/// What this gateway has at a worker.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own {
    pub(super) streams: usize,
    pub(super) tokens: u64,
}

impl Reports {
    /// Takes over a report that came `now`, when this gateway had `own` there.
    pub(super) fn take_in(&mut self, models: Vec<v1::ModelLoad>, own: Own, now: Instant) {
        let size = |value: u32| usize::try_from(value).unwrap_or(usize::MAX);
        let mut sum = Reported::default();
        for model in &models {
            sum.running = sum.running.saturating_add(size(model.running));
            sum.waiting = sum.waiting.saturating_add(size(model.waiting));
            sum.outstanding_tokens =
                sum.outstanding_tokens.saturating_add(model.outstanding_tokens);
        }
        // What was under way in either direction makes the difference inexact for a moment. Tokens
        // are counted differently here and there, prompts above all: where all requests are this
        // gateway's, so are all tokens.
        sum.other_streams = sum.running.saturating_add(sum.waiting).saturating_sub(own.streams);
        if sum.other_streams > 0 {
            sum.other_tokens = sum.outstanding_tokens.saturating_sub(own.tokens);
        }
        self.at = Some(now);
        self.sum = sum;
        self.models = models.into_iter().map(|model| (model.name.clone(), model)).collect();
    }

    /// Returns the last report as it concerns a model, unless it is older than `valid`.
    pub(super) fn of(&self, model: &str, now: Instant, valid: Duration) -> Option<Reported> {
        self.at.filter(|at| now.saturating_duration_since(*at) < valid)?;
        let load = self.models.get(model);
        Some(Reported {
            free_kv_tokens: load.map_or(0, |load| load.free_kv_tokens),
            decode_tokens_per_second: load.map_or(0.0, |load| load.decode_tokens_per_second),
            prefill_tokens_per_second: load.map_or(0.0, |load| load.prefill_tokens_per_second),
            ..self.sum
        })
    }

    /// Returns the last report of a model, however old it is.
    pub(super) fn last(&self, model: &str) -> Option<v1::ModelLoad> {
        self.models.get(model).cloned()
    }

    /// Returns the time since the last report.
    pub(super) fn age(&self, now: Instant) -> Option<Duration> {
        self.at.map(|at| now.saturating_duration_since(at))
    }

    /// Returns the steps computed of a model, unless the report is older than `valid`.
    pub(super) fn steps(&self, model: &str, now: Instant, valid: Duration) -> Option<u64> {
        self.at.filter(|at| now.saturating_duration_since(*at) < valid)?;
        self.models.get(model).map(|load| load.steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(name: &str, running: u32, waiting: u32, outstanding_tokens: u64) -> v1::ModelLoad {
        v1::ModelLoad {
            name: name.to_owned(),
            running,
            waiting,
            outstanding_tokens,
            free_kv_tokens: 640,
            decode_tokens_per_second: 12.5,
            steps: 9,
            ..v1::ModelLoad::default()
        }
    }

    #[test]
    fn own_requests_are_not_counted_twice() {
        let (now, valid) = (Instant::now(), Duration::from_secs(1));
        let mut reports = Reports::default();
        assert_eq!(reports.of("a", now, valid), None);
        let models = vec![load("a", 3, 1, 1000), load("b", 1, 0, 50)];
        reports.take_in(models, Own { streams: 3, tokens: 600 }, now);
        let of_a = reports.of("a", now, valid).unwrap();
        assert_eq!((of_a.running, of_a.waiting, of_a.outstanding_tokens), (4, 1, 1050));
        assert_eq!((of_a.other_streams, of_a.other_tokens), (2, 450));
        assert_eq!((of_a.free_kv_tokens, of_a.decode_tokens_per_second), (640, 12.5));
        assert_eq!(reports.of("c", now, valid).unwrap().free_kv_tokens, 0);

        // All are this gateway's, which does not count prompts.
        reports.take_in(vec![load("a", 2, 0, 900)], Own { streams: 2, tokens: 100 }, now);
        let of_a = reports.of("a", now, valid).unwrap();
        assert_eq!((of_a.other_streams, of_a.other_tokens), (0, 0));
        // More is under way than the worker knew of.
        reports.take_in(vec![load("a", 2, 0, 900)], Own { streams: 5, tokens: 1500 }, now);
        assert_eq!(reports.of("a", now, valid).unwrap().other_streams, 0);
    }

    #[test]
    fn stale_reports_do_not_count() {
        let (now, valid) = (Instant::now(), Duration::from_secs(1));
        let mut reports = Reports::default();
        reports.take_in(vec![load("a", 1, 0, 10)], Own { streams: 0, tokens: 0 }, now);
        let later = now + Duration::from_millis(999);
        assert!(reports.of("a", later, valid).is_some());
        assert_eq!(reports.steps("a", later, valid), Some(9));
        assert_eq!(reports.steps("b", later, valid), None);
        let later = now + Duration::from_secs(1);
        assert_eq!(reports.of("a", later, valid), None);
        assert_eq!(reports.steps("a", later, valid), None);
    }
}
