//! The node agent: pods of one node, through any CRI runtime.
