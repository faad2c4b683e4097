//! Hosts, registries, images and peers for tests.
