//! gRPC server around one engine: admission, token streams, pipeline stages, drain.
