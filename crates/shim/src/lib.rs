//! The shim of one pod: tasks, logs, exec, exits.
