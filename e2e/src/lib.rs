//! Whole-system tests against real clients.
