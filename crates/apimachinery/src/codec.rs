//! Encodings of objects: protobuf, JSON and YAML.

pub mod protobuf;
