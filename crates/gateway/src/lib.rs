//! gRPC front door: routing over workers and exact resume.
