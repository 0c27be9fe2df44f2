//! Generated wire types, validated domain types and status mapping.
