//! Membership: workers under a lease, watched by gateways; etcd and in-memory.
