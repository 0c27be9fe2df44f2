//! Model file to tokens: loading, forward pass, scheduling, sampling. Synchronous.
