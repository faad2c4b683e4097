//! A CRI v1 runtime: pods, containers, images.
