//! Traces, metrics and admin endpoints.
