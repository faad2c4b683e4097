//! An OCI bundle to a process: a library and a command with runc's verbs.
