//! The KV memory of a worker, and whose it is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

/// More KV memory is asked for than nobody has.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error(
    "{asked} bytes of KV memory are asked for, {unassigned} of the {total} bytes of this worker \
     are unassigned: ask for less, unload a model, or give --kv-memory more"
)]
pub struct NoKvMemory {
    /// Bytes asked for; at least 1.
    pub asked: usize,
    /// Bytes that no model has.
    pub unassigned: usize,
    /// Bytes of the worker.
    pub total: usize,
}

/// The KV memory of a worker. What the models hold never exceeds it.
#[derive(Clone, Debug)]
pub(crate) struct KvBudget(Arc<Ledger>);

#[derive(Debug)]
struct Ledger {
    total: usize,
    unassigned: Mutex<usize>,
}

/// What one model may use; returned when dropped.
#[derive(Debug)]
pub(crate) struct KvShare {
    budget: KvBudget,
    bytes: usize,
}

impl KvBudget {
    pub(crate) fn new(total: usize) -> Self {
        Self(Arc::new(Ledger { total, unassigned: Mutex::new(total) }))
    }

    /// Returns the bytes of all models together.
    pub(crate) fn total(&self) -> usize {
        self.0.total
    }

    /// Returns the bytes that no model has.
    pub(crate) fn unassigned(&self) -> usize {
        *self.lock()
    }

    /// Takes so many bytes, or all that are unassigned.
    pub(crate) fn take(&self, bytes: Option<usize>) -> Result<KvShare, NoKvMemory> {
        let mut unassigned = self.lock();
        let asked = bytes.unwrap_or(*unassigned).max(1);
        if asked > *unassigned {
            return Err(NoKvMemory { asked, unassigned: *unassigned, total: self.0.total });
        }
        *unassigned -= asked;
        drop(unassigned);
        Ok(KvShare { budget: self.clone(), bytes: asked })
    }

    /// Takes the shares of the models that a worker starts with. Those that name no size share
    /// equally what the others leave; with `spare`, one more such share stays unassigned.
    pub(crate) fn share_out(
        &self,
        asked: &[Option<usize>],
        spare: bool,
    ) -> Result<Vec<KvShare>, NoKvMemory> {
        let named: usize = asked.iter().flatten().fold(0, |sum, bytes| sum.saturating_add(*bytes));
        let unnamed = asked.iter().filter(|bytes| bytes.is_none()).count() + usize::from(spare);
        let equal = self.unassigned().saturating_sub(named) / unnamed.max(1);
        asked.iter().map(|bytes| self.take(Some(bytes.unwrap_or(equal)))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        // A number is whole whoever panics.
        self.0.unassigned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KvShare {
    /// Returns the bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns what is more than `bytes`.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        if let Some(more) = self.bytes.checked_sub(bytes) {
            *self.budget.lock() += more;
            self.bytes = bytes;
        }
    }
}

impl Drop for KvShare {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(
        total: usize,
        asked: &[Option<usize>],
        spare: bool,
    ) -> Result<Vec<usize>, NoKvMemory> {
        let shares = KvBudget::new(total).share_out(asked, spare)?;
        Ok(shares.iter().map(KvShare::bytes).collect())
    }

    #[test]
    fn models_without_a_size_share_what_is_left() {
        assert_eq!(shares(100, &[None], false), Ok(vec![100]));
        assert_eq!(shares(100, &[None, None, None], false), Ok(vec![33, 33, 33]));
        assert_eq!(shares(100, &[Some(40), None, None], false), Ok(vec![40, 30, 30]));
        assert_eq!(shares(100, &[None, Some(40)], true), Ok(vec![30, 40]));
        assert_eq!(shares(100, &[Some(60), Some(40)], true), Ok(vec![60, 40]));
        let refused = shares(100, &[Some(60), Some(50)], false).unwrap_err();
        assert_eq!(refused, NoKvMemory { asked: 50, unassigned: 40, total: 100 });
        let refused = shares(100, &[Some(100), None], false).unwrap_err();
        assert_eq!(refused, NoKvMemory { asked: 1, unassigned: 0, total: 100 });
    }

    #[test]
    fn what_is_returned_can_be_taken_again() {
        let budget = KvBudget::new(10);
        let mut first = budget.take(Some(6)).unwrap();
        let rest = budget.take(None).unwrap();
        assert_eq!((rest.bytes(), budget.unassigned()), (4, 0));
        assert!(budget.take(None).is_err(), "a share of nothing");
        first.shrink(1);
        assert_eq!((first.bytes(), budget.unassigned()), (1, 5));
        first.shrink(3);
        assert_eq!((first.bytes(), budget.unassigned()), (1, 5), "a share never grows");
        drop(rest);
        drop(first);
        assert_eq!(budget.unassigned(), budget.total());
    }
}
