//! The controllers that turn Deployments into Pods and clean up after them.
