//! Revisions, ranges, transactions, watches, leases, compaction, in an embedded durable engine.
