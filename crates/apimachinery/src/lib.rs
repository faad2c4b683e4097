//! Kubernetes objects: schema facts, codecs, selectors, quantities, patches, defaulting, validation, tables.
